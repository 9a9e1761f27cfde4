"""T5X checkpoints: the legacy form, in which all public T5 weights are stored, and Orbax's.

    checkpoint                                     msgpack: {"version", "optimizer": {"target", "state"}}
    target.encoder.layers_0.mlp.wi_0.kernel/       a zarr array for each large parameter

    state/                                         Orbax: {"target", "state"}

The msgpack file holds the small parameters and the TensorStore specification of each large one. T5X's
names are ours, and sizes follow from shapes. T5X's scanned layers (`encoder/encoder/...`, with a layer
axis in the middle) are unrolled. Checkpoints that T5X trained through `t5x_adapter`, and those of
`save_tree`, hold the tree of one of our models without its configuration.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import msgpack
import numpy as np
import tensorstore as ts

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.storage import folder
from glimmer_jax.storage.json_lines import parse_line
from glimmer_jax.weights import t5_names
from glimmer_jax.weights.file_errors import InvalidWeights, check_dtype, parsing
from glimmer_jax.weights.lazy_arrays import (
    ORBAX_METADATA,
    checked_shape,
    has_bytes,
    open_orbax,
    open_zarr,
    read,
    wait_for,
)
from glimmer_jax.weights.model_config import build_t5, config_from

_FILE, _ORBAX = "checkpoint", "state"
_SETTINGS = "glimmer_jax"  # a key beside T5X's own, which T5X ignores
_STEP = re.compile(r"checkpoint_(\d+)")
_OURS = "live_encoder/"  # in all of our models, and in no T5
_TABLE = "relpos_bias/rel_embedding"
_MAX_LAYERS = 512  # of a stack; damaged sizes must not unroll without end
_SIZED = (
    "token_embedder/embedding",
    f"encoder/{_TABLE}",
    "encoder/layers_0/attention/query/kernel",
    "encoder/layers_0/mlp/wo/kernel",
)


def is_folder(kvstore: ts.KvStore) -> bool:
    """Whether a folder holds a T5X checkpoint."""
    return has_bytes(kvstore, _FILE) or has_bytes(kvstore, f"{_ORBAX}/{ORBAX_METADATA}")


def load(
    path: Any, kvstore: ts.KvStore
) -> tuple[dict[str, Any], GlimmerConfig | None, Mapping[str, Any], str]:
    """The parameters of a checkpoint.

    Args:
      path: of the folder, for messages.
      kvstore: the folder, local or a bucket.

    Returns:
      Parameters (TensorStores), their configuration (None for the tree of one of our models), what
      `save` recorded besides (`describe`), and a description.

    Raises:
      InvalidWeights: the folder is not such a checkpoint, layers have different position tables, or
        parameters are missing, extra or misshapen, all of which are named.
    """
    described: Mapping[str, Any] = {}
    if has_bytes(kvstore, _FILE):
        arrays, described = _arrays(path, kvstore)
        form = "legacy"
    else:
        arrays = open_orbax(folder.subfolder(kvstore, _ORBAX), ("target",))
        form = "Orbax"
    setting = config_from(described, path)
    if setting is None and any(name.startswith(_OURS) for name in arrays):
        ours = {name: t5_names.float32(array) for name, array in arrays.items()}
        params = flax.traverse_util.unflatten_dict(ours, sep="/")
        return params, None, {}, f"a T5X checkpoint of a glimmer_jax model in {path} ({form})"
    scanned = any(name.startswith("encoder/encoder/") for name in arrays)
    if scanned:
        arrays = _unscan(path, arrays)
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    config = t5_names.unrolled(setting) if setting else GlimmerConfig(_t5_of(path, shapes))
    t5_names.check_layers(path, config, len(shapes))
    t5_names.check(path, t5_names.shapes(config), shapes)
    params = t5_names.tree_from(config, arrays.__getitem__)
    description = f"a T5X checkpoint in {path} ({form}{', scanned' if scanned else ''}): "
    description += t5_names.describe(params, config.t5)
    return params, config, described, description


def save(path: Any, params: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    """Writes parameters in T5X's legacy form, in float32: the arrays, and the msgpack file last.

    T5X reads an undivided T5 (FiD) as its own, without optimiser state. A divided encoder has the
    names of its parts. `load` reads both.

    Args:
      path: of the folder, local or in a bucket.
      params: numpy arrays, JAX arrays or TensorStores.
      described: `model_config.describe` of their model.

    Raises:
      ValueError: the folder holds a checkpoint, or a parameter is not finite.
      StopRequested: a stop was requested. The msgpack file is missing, and a rerun writes all again.
    """
    _check_free(path)
    _save(path, t5_names.flat_from(params), 0, {_SETTINGS: json.dumps(described)})


def save_tree(path: Any, params: Mapping[str, Any]) -> None:
    """Writes parameters as `save` does, but under our own names and with the layers of `params`.

    T5X starts from this when it trains our models (`t5x_adapter`). There is no optimiser state, and no
    configuration, which T5X would lose.

    Args:
      path: folder `checkpoint_N`, local or in a bucket, without a checkpoint. N becomes the step.
      params: of any model: numpy arrays, JAX arrays or TensorStores.

    Raises:
      ValueError: the folder has another name or holds a checkpoint, or a parameter is not finite.
    """
    name = pathlib.PurePosixPath(path).name
    if (match := _STEP.fullmatch(name)) is None:
        raise ValueError(f"OUTPUT_PATH must end in checkpoint_N, as T5X names steps, got {name}.")
    _check_free(path)
    _save(path, flax.traverse_util.flatten_dict(params, sep="/"), int(match[1]), {})


def _check_free(path: Any) -> None:
    # Overwriting it would mix two checkpoints until the last file is written.
    if has_bytes(folder.open_folder(path), _FILE):
        raise ValueError(f"{path} holds a checkpoint already. Remove it, or choose another folder.")


def _save(path: Any, flat: Mapping[str, Any], step: int, extra: Mapping[str, Any]) -> None:
    kvstore = folder.open_folder(path)
    target: dict[str, Any] = {}
    for name, leaf in flat.items():
        STOP.poll()
        array = read(name, leaf).astype(np.float32)
        target[name] = array if array.ndim < 2 else _write(kvstore, _folder_of(name), array)
    content = {
        "version": 3,
        "optimizer": {
            "target": flax.traverse_util.unflatten_dict(target, sep="/"),
            "state": {"step": np.int32(step)},
        },
        **extra,
    }
    folder.write_file(kvstore, _FILE, flax.serialization.msgpack_serialize(content))


def _write(kvstore: ts.KvStore, name: str, array: np.ndarray) -> dict[str, Any]:
    """Writes a zarr array; returns its specification for T5X's file."""
    metadata = {
        "shape": list(array.shape),
        "chunks": [min(size, 2048) for size in array.shape],
        "dtype": array.dtype.str,
        "compressor": {"id": "gzip"},
    }
    spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
    # Chunks of zeros are written too, because a missing chunk is an error when it is read.
    future = ts.open(
        {**spec, "store_data_equal_to_fill_value": True},
        kvstore=folder.subfolder(kvstore, name),
        create=True,
        delete_existing=True,
    )
    future.result().write(array).result()
    # T5X prepends its own folder to the path.
    return {**spec, "kvstore": {"driver": "file", "path": name}}


def _folder_of(name: str) -> str:
    return "target." + name.replace("/", ".")


def _arrays(path: Any, kvstore: ts.KvStore) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Numpy arrays and opened TensorStores by name, and the metadata that `save` wrote."""
    file = f"{path}/{_FILE}"
    with parsing(file, "T5X checkpoint (a msgpack file; TensorFlow's `checkpoint` is a text file)"):
        data = folder.read_file(kvstore, _FILE) or b""
        _check_keys(data)
        content = flax.serialization.msgpack_restore(data)
        if "target" not in content.get("optimizer", {}):
            raise InvalidWeights(
                f"{file} holds {sorted(content)[:10]}, but no optimizer/target. Give the folder of a "
                "T5X checkpoint in the form of the public T5 weights."
            )
        is_leaf = lambda _, value: isinstance(value, dict) and "driver" in value  # noqa: E731
        paths = flax.traverse_util.flatten_dict(content["optimizer"]["target"], is_leaf=is_leaf)
        flat = {"/".join(keys): value for keys, value in paths.items()}
        if len(flat) < len(paths):
            raise ValueError("two parameters have the same name")
        folders = {}
        for name, value in flat.items():
            if isinstance(value, dict):
                folders[name] = _array_folder(name, value)
            else:
                flat[name] = _array(file, name, value)
        described = parse_line(content.get(_SETTINGS, "{}").encode(), file)
    futures = {name: open_zarr(folder.subfolder(kvstore, place)) for name, place in folders.items()}
    return flat | wait_for(path, _FILE, futures), described


def _check_keys(data: bytes) -> None:
    """Raises ValueError if a msgpack map has a key twice, of which Flax would take the last."""

    def check(pairs: list[tuple[Any, Any]]) -> None:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError("a key is repeated")

    msgpack.unpackb(data, object_pairs_hook=check, ext_hook=lambda code, data: None)


def _array(file: str, name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    check_dtype(file, name, array.dtype)
    checked_shape(file, name, array.shape)
    return array


def _array_folder(name: str, spec: Mapping[str, Any]) -> str:
    """The folder of a large parameter, beside the msgpack file wherever that was moved."""
    # Specifications of the first TensorStores have the path at the top.
    path = spec["path"] if "path" in spec else spec["kvstore"]["path"]
    place = pathlib.PurePosixPath(path.rstrip("/")).name
    if place != _folder_of(name):
        raise ValueError(f"{name} is stored in {place!r:.80}, expected {_folder_of(name)!r}")
    return place


def _unscan(path: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Unrolled layers, as views of T5X's scanned ones."""
    embedding, norm = _SIZED[0], "encoder/encoder/pre_mlp_layer_norm/scale"
    if missing := [name for name in (embedding, norm) if name not in arrays]:
        raise InvalidWeights(f"{path} lacks {missing} of a scanned T5. Download it again.")
    if arrays[norm].ndim != 2 or arrays[embedding].ndim != 2:
        raise InvalidWeights(
            f"{path}: {embedding} and {norm} must have two axes. Download it again."
        )
    # T5X's param_scan_axis, 1 by default, follows from the shape of a norm.
    axis = int(arrays[norm].shape[0] == arrays[embedding].shape[1])
    out = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"(encoder|decoder)/\1/(.+)", name)
        if match is None:
            out[name] = array
            continue
        stack, rest = match.groups()
        if array.ndim <= axis:
            raise InvalidWeights(f"{path}: {name} has no layer axis {axis}. Download it again.")
        if array.shape[axis] > _MAX_LAYERS:
            raise InvalidWeights(
                f"{path}: {name} has {array.shape[axis]} layers, expected at most {_MAX_LAYERS}. "
                "Download it again."
            )
        layers = [array[(slice(None),) * axis + (i,)] for i in range(array.shape[axis])]
        if rest == _TABLE:
            # In T5X's scanned layers each has a table of its own; a T5 has one per stack.
            tables = [read(name, layer) for layer in layers]
            if any(not np.array_equal(table, tables[0]) for table in tables):
                raise InvalidWeights(
                    f"{path}: the layers of the {stack} have different position tables, as in umT5 or "
                    "in a T5 that T5X trained with scanned layers. All layers of a stack share one "
                    "table here. Use weights of T5 1.0, T5 v1.1, mT5 or Flan-T5."
                )
            out[f"{stack}/{_TABLE}"] = layers[0]
        else:
            out |= {f"{stack}/layers_{i}/{rest}": layer for i, layer in enumerate(layers)}
    return out


def _t5_of(path: Any, shapes: Mapping[str, tuple[int, ...]]) -> T5Config:
    """The sizes of a T5, from the shapes of its parameters."""
    if missing := [name for name in _SIZED if name not in shapes]:
        raise InvalidWeights(
            f"{path} lacks {missing}, from which the sizes of a T5 follow. It holds "
            f"{', '.join(sorted(shapes)[:10])} ... Download it again."
        )
    embedding, table, query, wo = (shapes[name] for name in _SIZED)
    with parsing(path, "T5X checkpoint"):
        (vocab_size, emb_dim), (num_heads, buckets), (_, joined), (mlp_dim, _) = (
            embedding,
            table,
            query,
            wo,
        )
        return build_t5(
            path,
            vocab_size=vocab_size,
            emb_dim=emb_dim,
            num_heads=num_heads,
            head_dim=joined // num_heads,
            mlp_dim=mlp_dim,
            num_encoder_layers=_count(shapes, "encoder"),
            num_decoder_layers=_count(shapes, "decoder"),
            # The names show whether the feed-forward is gated, but not by which function: GELU, as
            # in all public weights.
            mlp_activations=("relu",)
            if "encoder/layers_0/mlp/wi/kernel" in shapes
            else ("gelu", "linear"),
            relpos_buckets=buckets,
            scan_layers=False,
            tie_output="decoder/logits_dense/kernel" not in shapes,
        )


def _count(shapes: Mapping[str, Any], stack: str) -> int:
    return len({name.split("/")[1] for name in shapes if re.match(rf"{stack}/layers_\d+/", name)})
