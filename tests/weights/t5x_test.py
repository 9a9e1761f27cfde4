"""T5X checkpoints, written here as T5X writes them: msgpack with zarr arrays, and Orbax."""

import dataclasses
import json
import re
import shutil

import flax.serialization
import flax.traverse_util
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.recut import recut
from glimmer_jax.weights import parameters, t5_names, t5x
from glimmer_jax.weights.load import load
from glimmer_jax.weights.model_config import describe
from tests.models import tiny


def write(folder, flat, path_at_top=False):
    """Matrices as zarr arrays, their specifications and the vectors in the msgpack file."""
    target = {}
    for name, array in flat.items():
        if array.ndim < 2:
            target[name] = array
            continue
        metadata = {
            "shape": list(array.shape),
            "chunks": [array.shape[0], -(-array.shape[1] // 2), *array.shape[2:]],
            "dtype": array.dtype.str,
            "compressor": {"id": "gzip"},
        }
        where = "target." + name.replace("/", ".")
        spec = {"driver": "zarr", "metadata": metadata, "dtype": array.dtype.name}
        kvstore = {"driver": "file", "path": f"{folder}/{where}"}
        ts.open({**spec, "kvstore": kvstore}, create=True).result().write(array).result()
        # Written elsewhere: the path in the file is not where the array lies now.
        elsewhere = {"driver": "gfile", "path": f"gs://bucket/tmp/{where}"}
        target[name] = {**spec, "kvstore": elsewhere}
        if path_at_top:
            target[name] = {**spec, "kvstore": {"driver": "gfile"}, "path": elsewhere["path"]}
    content = {
        "version": 3,
        "optimizer": {
            "target": flax.traverse_util.unflatten_dict(target, sep="/"),
            "state": {"step": np.int32(7)},
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(content))


@pytest.mark.parametrize("config", [tiny.FID, tiny.V1_0], ids=["v1.1", "v1.0"])
def test_sizes_and_parameters_come_from_the_checkpoint(tmp_path, config):
    params = tiny.params(config)
    write(tmp_path, t5_names.flat_from(params))
    loaded = load(tmp_path)
    assert loaded.vocabulary_fingerprint is None
    assert dataclasses.replace(loaded.config.t5, scan_layers=True) == config.t5
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, config), params)
    assert loaded.what.startswith(f"a T5X checkpoint in {tmp_path} (legacy): ")


def write_orbax(folder, tree):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "state", args=ocp.args.PyTreeSave(tree))


def test_orbax_checkpoints_are_read_bit_exactly(tmp_path):
    params = tiny.params(tiny.FID)
    target = flax.traverse_util.unflatten_dict(t5_names.flat_from(params), sep="/")
    write_orbax(tmp_path, {"target": target, "state": {"step": np.int32(3)}})
    loaded = load(tmp_path)
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, tiny.FID), params)
    write_orbax(tmp_path / "other", {"weights": {"a": np.ones(3, np.float32)}})
    with pytest.raises(ValueError, match="weights.*target"):
        load(tmp_path / "other")


def test_missing_and_misshapen_parameters_are_reported(tmp_path):
    flat = t5_names.flat_from(tiny.params(tiny.FID))
    del flat["decoder/layers_1/pre_mlp_layer_norm/scale"]
    flat["encoder/encoder_norm/scale"] = np.ones(8, np.float32)
    write(tmp_path, flat)
    message = r"layers_1/pre_mlp_layer_norm/scale \[16\] is missing; encoder/encoder_norm/scale has"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("form", ["legacy", "Orbax"])
def test_all_missing_arrays_are_reported(tmp_path, form):
    names = ["decoder/layers_1/mlp/wo/kernel", "token_embedder/embedding"]
    flat = t5_names.flat_from(tiny.params(tiny.FID))
    if form == "legacy":
        write(tmp_path, flat)
        folder, file = tmp_path, "checkpoint"
    else:
        tree = {"target": flax.traverse_util.unflatten_dict(flat, sep="/")}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(tmp_path / "state", args=ocp.args.PyTreeSave(tree))
        folder, file = tmp_path / "state", "_METADATA"
    for name in names:
        shutil.rmtree(folder / f"target.{name}".replace("/", "."))
    message = f"2 arrays.*{file}.*missing.*{names[0]}, {names[1]}"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_missing_chunk_does_not_read_as_zeros(tmp_path):
    write(tmp_path, t5_names.flat_from(tiny.params(tiny.FID)))
    (tmp_path / "target.token_embedder.embedding" / "0.1").unlink()
    with pytest.raises(ValueError, match="0.1.*missing"):
        np.asarray(load(tmp_path).params["token_embedder"]["embedding"])


def test_other_contents_are_rejected(tmp_path):
    (tmp_path / "checkpoint").write_bytes(flax.serialization.msgpack_serialize({"params": {}}))
    with pytest.raises(ValueError, match="params.*optimizer/target"):
        load(tmp_path)
    write(tmp_path, {"encoder/layers_0/mlp/wo/kernel": np.ones((3, 4), np.float32)})
    with pytest.raises(ValueError, match="lacks.*token_embedder/embedding.*sizes"):
        load(tmp_path)
    write(tmp_path, {"encoder/encoder/mlp/wo/kernel": np.ones((3, 2, 4), np.float32)})
    with pytest.raises(ValueError, match="lacks.*token_embedder/embedding.*scanned"):
        load(tmp_path)


def scanned(params, axis):
    """What T5X's scanned layers hold: a layer axis, and the position table in every layer."""
    flat, stacks = {}, {}
    for name, array in t5_names.flat_from(params).items():
        match = re.fullmatch(r"(encoder|decoder)/(layers_\d+|relpos_bias)/(.+)", name)
        if match is None:
            flat[name] = array
        elif match[2] == "relpos_bias":
            layers = {"encoder": 4, "decoder": 2}[match[1]]
            stacks[f"{match[1]}/{match[1]}/relpos_bias/{match[3]}"] = [array] * layers
        else:
            stacks.setdefault(f"{match[1]}/{match[1]}/{match[3]}", []).append(array)
    return flat | {name: np.stack(layers, axis) for name, layers in stacks.items()}


@pytest.mark.parametrize(("form", "axis"), [("legacy", 1), ("legacy", 0), ("Orbax", 1)])
def test_scanned_layers_are_read_bit_exactly(tmp_path, form, axis):
    params = tiny.params(tiny.FID)
    flat = scanned(params, axis)
    if form == "legacy":
        write(tmp_path, flat)
    else:
        write_orbax(tmp_path, {"target": flax.traverse_util.unflatten_dict(flat, sep="/")})
    loaded = load(tmp_path)
    assert dataclasses.replace(loaded.config.t5, scan_layers=True) == tiny.T5
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, tiny.FID), params)
    assert f"({form}, scanned)" in loaded.what


def test_a_layer_axis_of_a_damaged_size_is_not_unrolled(tmp_path):
    write(tmp_path, scanned(tiny.params(tiny.FID), 1))
    (metadata,) = tmp_path.glob("target.encoder.encoder.mlp.wo.kernel/.zarray")
    fields = json.loads(metadata.read_text())
    fields["shape"][1] = 10**9
    metadata.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="mlp/wo/kernel has 1000000000 layers, expected at most"):
        load(tmp_path)


def test_different_position_tables_per_layer_are_rejected(tmp_path):
    flat = scanned(tiny.params(tiny.FID), 1)
    flat["decoder/decoder/relpos_bias/rel_embedding"][0, 1, 3] += 1.0
    write(tmp_path, flat)
    with pytest.raises(ValueError, match="decoder.*different position tables"):
        load(tmp_path)


def test_specifications_with_the_path_at_the_top_are_read(tmp_path):
    params = tiny.params(tiny.FID)
    write(tmp_path, t5_names.flat_from(params), path_at_top=True)
    loaded = load(tmp_path)
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, tiny.FID), params)


@pytest.mark.parametrize("form", ["legacy", "Orbax"])
def test_checkpoints_in_a_bucket_are_read_bit_exactly(tmp_path, serve, form):
    params = tiny.params(tiny.FID)
    flat = t5_names.flat_from(params)
    if form == "legacy":
        write(tmp_path, flat)
    else:
        write_orbax(tmp_path, {"target": flax.traverse_util.unflatten_dict(flat, sep="/")})
    url, server = serve(tmp_path)
    loaded = load(url)
    assert f"T5X checkpoint in {url} ({form})" in loaded.what
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, tiny.FID), params)
    server.status = 403
    with pytest.raises(OSError, match="could not be read.*command again"):
        load(url)


def test_written_checkpoints_have_the_form_of_t5x(tmp_path):
    params = tiny.params(tiny.FID)
    t5x.save(tmp_path, params, describe(tiny.FID, "v"))
    content = flax.serialization.msgpack_restore((tmp_path / "checkpoint").read_bytes())
    assert content["version"] == 3
    target = content["optimizer"]["target"]
    spec = target["encoder"]["layers_3"]["mlp"]["wi_1"]["kernel"]
    assert spec["kvstore"] == {"driver": "file", "path": "target.encoder.layers_3.mlp.wi_1.kernel"}
    # T5X prepends its own folder to the path.
    spec["kvstore"]["path"] = f"{tmp_path}/{spec['kvstore']['path']}"
    kernel = ts.open(ts.Spec(spec), open=True).result().read().result()
    layers = params["live_encoder"]["live_b"]["layers"]
    np.testing.assert_array_equal(kernel, layers["mlp"]["wi_1"]["kernel"][3])
    np.testing.assert_array_equal(
        target["encoder"]["layers_3"]["pre_mlp_layer_norm"]["scale"],
        layers["pre_mlp_layer_norm"]["scale"][3],
    )


@pytest.mark.parametrize("config", [tiny.FID, tiny.GLIMMER], ids=["fid", "glimmer"])
def test_a_saved_tree_is_read_bit_exactly(tmp_path, config):
    params = tiny.params(config)
    t5x.save_tree(tmp_path / "checkpoint_7", params)
    content = flax.serialization.msgpack_restore(
        (tmp_path / "checkpoint_7/checkpoint").read_bytes()
    )
    assert content.keys() == {"version", "optimizer"}
    assert content["version"] == 3 and content["optimizer"]["state"] == {"step": 7}
    # The folder can be moved: arrays are found beside the msgpack file.
    (tmp_path / "checkpoint_7").rename(tmp_path / "moved")
    loaded = load(tmp_path / "moved")
    assert loaded.config is None and loaded.vocabulary_fingerprint is None
    assert (
        loaded.what == f"a T5X checkpoint of a glimmer_jax model in {tmp_path / 'moved'} (legacy)"
    )
    tiny.assert_trees_equal(loaded.params, params)
    tiny.assert_trees_equal(parameters.load(tmp_path / "moved", GlimmerModel(config), "v"), params)


def test_a_tree_without_configuration_must_match_the_model(tmp_path):
    write_orbax(tmp_path, {"target": tiny.params(tiny.LUMEN), "state": {"step": np.int32(3)}})
    read = parameters.load(tmp_path, GlimmerModel(tiny.LUMEN), "v")
    tiny.assert_trees_equal(read, tiny.params(tiny.LUMEN))
    wanted, found = (
        {
            (name, leaf.shape)
            for name, leaf in flax.traverse_util.flatten_dict(
                tiny.abstract(config)[0], sep="/"
            ).items()
        }
        for config in (tiny.GLIMMER, tiny.LUMEN)
    )
    differing = {name for name, _ in wanted ^ found}
    message = rf"does not record.*{len(differing)} parameters differ: .*gin files"
    with pytest.raises(ValueError, match=message) as caught:
        parameters.load(tmp_path, GlimmerModel(tiny.GLIMMER), "v")
    assert len(differing) > 2
    assert set(re.findall(r"(\S+/\S+) (?:\[|has shape)", str(caught.value))) == differing


def test_trees_are_saved_only_into_new_folders_named_checkpoint_n(tmp_path):
    params = tiny.params(tiny.FID)
    with pytest.raises(ValueError, match="OUTPUT_PATH.*checkpoint_N.*step_7"):
        t5x.save_tree(tmp_path / "step_7", params)
    t5x.save_tree(tmp_path / "checkpoint_7", params)
    with pytest.raises(ValueError, match="checkpoint_7 holds a checkpoint"):
        t5x.save_tree(tmp_path / "checkpoint_7", params)
