"""T5X's public form, written here as T5X writes it: msgpack, and zarr arrays beside it."""

import dataclasses
import shutil

import flax.serialization
import flax.traverse_util
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from glimmer_jax.models.recut import recut
from glimmer_jax.weights import t5_names
from glimmer_jax.weights.load import load
from tests.models import tiny

V1_0 = dataclasses.replace(
    tiny.FID, t5=dataclasses.replace(tiny.T5, mlp_activations=("relu",), tie_output=True)
)


def write(folder, flat):
    """Matrices as zarr arrays, their specifications and the vectors in the msgpack file."""
    target = {}
    for name, array in flat.items():
        if array.ndim < 2:
            target[name] = array
            continue
        metadata = {
            "shape": list(array.shape),
            "chunks": [array.shape[0], -(-array.shape[1] // 2)],
            "dtype": array.dtype.str,
            "compressor": {"id": "gzip"},
        }
        where = "target." + name.replace("/", ".")
        spec = {"driver": "zarr", "metadata": metadata, "dtype": array.dtype.name}
        kvstore = {"driver": "file", "path": f"{folder}/{where}"}
        ts.open({**spec, "kvstore": kvstore}, create=True).result().write(array).result()
        # Written elsewhere: the path in the file is not where the array lies now.
        target[name] = {**spec, "kvstore": {"driver": "gfile", "path": f"gs://bucket/tmp/{where}"}}
    content = {
        "version": 3,
        "optimizer": {
            "target": flax.traverse_util.unflatten_dict(target, sep="/"),
            "state": {"step": np.int32(7)},
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(content))


@pytest.mark.parametrize("config", [tiny.FID, V1_0], ids=["v1.1", "v1.0"])
def test_names_sizes_and_bits_come_from_the_checkpoint(tmp_path, config):
    params = tiny.params(config)
    write(tmp_path, t5_names.flat_from(params))
    loaded = load(tmp_path)
    assert loaded.vocabulary_fingerprint is None
    assert dataclasses.replace(loaded.config.t5, scan_layers=True) == config.t5
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, config), params)
    assert loaded.what.startswith(f"a T5X checkpoint in {tmp_path}: ")


def write_orbax(folder, tree):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "state", args=ocp.args.PyTreeSave(tree))


def test_its_orbax_form_gives_the_same_bits(tmp_path):
    params = tiny.params(tiny.FID)
    target = flax.traverse_util.unflatten_dict(t5_names.flat_from(params), sep="/")
    write_orbax(tmp_path, {"target": target, "state": {"step": np.int32(3)}})
    loaded = load(tmp_path)
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, tiny.FID), params)
    write_orbax(tmp_path / "other", {"weights": {"a": np.ones(3, np.float32)}})
    with pytest.raises(ValueError, match=r"holds \['weights'\] and no target"):
        load(tmp_path / "other")


def test_what_is_missing_or_misshapen_is_named(tmp_path):
    flat = t5_names.flat_from(tiny.params(tiny.FID))
    del flat["decoder/layers_1/pre_mlp_layer_norm/scale"]
    flat["encoder/encoder_norm/scale"] = np.ones(8, np.float32)
    write(tmp_path, flat)
    message = r"layers_1/pre_mlp_layer_norm/scale \[16\] is missing; encoder/encoder_norm/scale has"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    shutil.rmtree(tmp_path / "target.token_embedder.embedding")
    with pytest.raises(ValueError, match="lacks the array target.token_embedder.embedding"):
        load(tmp_path)


def test_a_missing_chunk_is_no_zeros(tmp_path):
    write(tmp_path, t5_names.flat_from(tiny.params(tiny.FID)))
    (tmp_path / "target.token_embedder.embedding" / "0.1").unlink()
    with pytest.raises(ValueError, match="0.1.*missing"):
        load(tmp_path)


def test_other_contents_are_refused(tmp_path):
    (tmp_path / "checkpoint").write_bytes(flax.serialization.msgpack_serialize({"params": {}}))
    with pytest.raises(ValueError, match=r"holds \['params'\] and no optimizer/target"):
        load(tmp_path)
    write(tmp_path, {"encoder/encoder/layers/norm": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="stacked by scanning are not read"):
        load(tmp_path)
