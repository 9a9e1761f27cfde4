"""Parameters are read from files into their shardings: each device's share, once."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import tensorstore as ts

from glimmer_jax import partitioning
from glimmer_jax.memory.fingerprint import encoder_fingerprint
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.weights import huggingface, lazy_arrays, parameters, t5x
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.models import tiny

# Large enough for blocks and chunks to matter: 8 million parameters.
T5 = T5Config(
    vocab_size=1024,
    emb_dim=512,
    num_heads=8,
    head_dim=64,
    mlp_dim=512,
    num_encoder_layers=3,
    num_decoder_layers=1,
    mlp_activations=("relu",),
    scan_layers=False,
)
FID = dataclasses.replace(tiny.FID, t5=T5)
GLIMMER = dataclasses.replace(
    tiny.GLIMMER, t5=dataclasses.replace(T5, scan_layers=True), memory_layers=1
)
BYTES = 4 * sum(leaf.size for leaf in jax.tree.leaves(tiny.abstract(FID)[0]))


@pytest.fixture(scope="module")
def params():
    """Numbers that gzip compresses quickly."""
    rows = np.arange(1024, dtype=np.float32)
    return jax.tree.map(
        lambda leaf: np.broadcast_to(rows[: leaf.shape[-1]], leaf.shape), tiny.abstract(FID)[0]
    )


def test_a_device_reads_only_its_share_of_a_scanned_glimmer(params, tmp_path, monkeypatch):
    huggingface.save(tmp_path, params, FID, describe(FID, "v"))
    asked = 0
    virtual_chunked = ts.virtual_chunked

    def counting(fill, **kwargs):
        def count(domain, array, more):
            nonlocal asked
            asked += array.nbytes
            fill(domain, array, more)

        return virtual_chunked(count, **kwargs)

    monkeypatch.setattr(lazy_arrays.ts, "virtual_chunked", counting)
    model = GlimmerModel(GLIMMER)
    leaves = parameters.load(tmp_path, model, "v")
    comparing = asked  # the output layer with the embedding
    assert comparing < BYTES / 10
    _, names = model.abstract_variables()
    shardings = partitioning.shardings(names, make_mesh(MeshConfig(1, 2, 4)))
    share = 0
    for leaf, sharding in zip(jax.tree.leaves(leaves), jax.tree.leaves(shardings), strict=True):
        if isinstance(leaf, ts.TensorStore):
            index = sharding.devices_indices_map(tuple(leaf.shape))[jax.devices()[3]]
            share += leaf[index].read().result().nbytes
    assert share < BYTES / 7
    assert asked - comparing < 1.1 * share


def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_no_second_copy_is_kept_on_the_host(params, tmp_path):
    t5x.save(tmp_path, params, describe(FID, "v"))
    mesh, model = make_mesh(MeshConfig(1, 2, 4)), GlimmerModel(GLIMMER)
    leaves = parameters.load(tmp_path, model, "v")
    jax.block_until_ready(jax.device_put(np.ones(8), jax.devices()[0]))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    placed = parameters.place(leaves, model, mesh)
    # The memory of virtual devices is that of the host: one copy is needed.
    grown = status("VmHWM") - before
    assert grown < 1.6 * BYTES
    of_files = encoder_fingerprint(leaves, GLIMMER)
    assert of_files == encoder_fingerprint(placed, GLIMMER)
    kernel = placed["memory_encoder"]["layers"]["mlp"]["wo"]["kernel"]
    np.testing.assert_array_equal(kernel[0], np.broadcast_to(np.arange(512.0), (512, 512)))


def test_replicas_on_one_host_share_one_read(tmp_path):
    reads = []

    def fill(domain, array, _):
        reads.append(domain.index_exp)
        array[...] = 1.0

    leaf = ts.virtual_chunked(fill, domain=ts.IndexDomain(shape=[8, 4]), dtype=ts.float32)
    mesh = make_mesh(MeshConfig(8, 1, 1))
    got = parameters.put({"a": leaf}, {"a": partitioning.replicated(mesh)})["a"]
    assert len(reads) == 1 and len(got.addressable_shards) == 8
    assert {shard.data.shape for shard in got.addressable_shards} == {(8, 4)}


def test_parameters_that_contradict_their_configuration_are_reported(tmp_path):
    params = tiny.params(tiny.FID)
    del params["decoder"]["decoder_norm"]
    params["extra"] = np.ones(3, np.float32)
    params["live_encoder"]["encoder_norm"]["scale"] = np.ones(8, np.float32)
    save_params_file(tmp_path / "fid.safetensors", params, describe(tiny.FID, "v"))
    message = (
        r"model_config: 3 parameters differ.*decoder/decoder_norm/scale \[16\].*missing; "
        r"extra \[3\].*unexpected; live_encoder/encoder_norm/scale .*\[8\].*\[16\]"
    )
    with pytest.raises(ValueError, match=message):
        parameters.load(tmp_path / "fid.safetensors", GlimmerModel(tiny.FID), "v")


def test_codebooks_of_another_version_are_learned_again(tmp_path):
    config = dataclasses.replace(tiny.GLIMMER, memory_codec="pq")
    params = tiny.params(config)
    del params["memory_codebooks"]["frequencies"]
    save_params_file(tmp_path / "pq.safetensors", params, describe(config, "v"))
    with pytest.raises(ValueError, match="frequencies.*missing.*run_mode=codebooks"):
        parameters.load(tmp_path / "pq.safetensors", GlimmerModel(config), "v")
