"""T5X's own checkpoints: in their first form, in which all public T5 weights lie, and in Orbax's.

    checkpoint                                     msgpack: {"version", "optimizer": {"target", "state"}}
    target.encoder.layers_0.mlp.wi_0.kernel/       a zarr array for each large parameter

    state/                                         Orbax: {"target", "state"}

A large parameter's place in the msgpack holds the specification of its array. Names are ours already;
the sizes follow from the shapes. T5X's scanned layers (`encoder/encoder/...`, a layer axis in the middle)
are told apart into layers. What T5X trained through `t5x_adapter` is the tree of one of our models, as it
is and without its setting; so is what `save_tree` writes for T5X to start from.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import numpy as np
import tensorstore as ts

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.storage import folder
from glimmer_jax.weights import t5_names
from glimmer_jax.weights.lazy_arrays import METADATA, exists, open_arrays, opened
from glimmer_jax.weights.model_config import config_from

_FILE, _ORBAX = "checkpoint", "state"
_SETTING = "glimmer_jax"  # beside T5X's own keys; T5X does not look at it
_STEP = re.compile(r"checkpoint_(\d+)")
_OURS = "live_encoder/"  # all our models have one, and no T5 has
_TABLE = "relpos_bias/rel_embedding"
_SIZED = (
    "token_embedder/embedding",
    f"encoder/{_TABLE}",
    "encoder/layers_0/attention/query/kernel",
    "encoder/layers_0/mlp/wo/kernel",
)


def is_folder(kvstore: ts.KvStore) -> bool:
    """Whether a T5X checkpoint lies there."""
    return exists(kvstore, _FILE) or exists(kvstore, f"{_ORBAX}/{METADATA}")


def load(
    path: Any, kvstore: ts.KvStore
) -> tuple[dict[str, Any], GlimmerConfig | None, str | None, str]:
    """The parameters of a step's folder.

    Args:
      path: of the folder, for messages.
      kvstore: the folder, local or a bucket.

    Returns:
      Parameters (TensorStores), the setting they belong to (None of a tree of ours, with which T5X
      writes none), the fingerprint of their vocabulary where `save` has written it, and in words what
      was found.

    Raises:
      ValueError: not such a checkpoint, one position table for each layer, or parameters that are
        missing, extra or misshapen, all of which are named.
    """
    described: Mapping[str, Any] = {}
    if exists(kvstore, _FILE):
        arrays, described = _arrays(path, kvstore)
        form = "legacy"
    else:
        arrays = open_arrays(folder.subfolder(kvstore, _ORBAX), ("target",))
        form = "Orbax"
    setting = config_from(described, path)
    if setting is None and any(name.startswith(_OURS) for name in arrays):
        ours = {name: t5_names.float32(array) for name, array in arrays.items()}
        params = flax.traverse_util.unflatten_dict(ours, sep="/")
        return params, None, None, f"a T5X checkpoint of one of our models in {path} ({form})"
    scanned = any(name.startswith("encoder/encoder/") for name in arrays)
    if scanned:
        arrays = _unscanned(path, arrays)
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    config = t5_names.looped(setting) if setting else t5_names.fid(_sizes(path, found))
    t5_names.check(path, t5_names.shapes(config), found)
    params = t5_names.tree_from(config, arrays.__getitem__)
    what = f"a T5X checkpoint in {path} ({form}{', scanned' if scanned else ''})"
    what += f": {t5_names.in_words(params, config.t5)}"
    return params, config, described.get("vocabulary_fingerprint"), what


def save(
    path: Any, params: Mapping[str, Any], config: GlimmerConfig, described: Mapping[str, Any]
) -> None:
    """Writes parameters in T5X's first form, float32: the arrays, and the msgpack file last.

    T5X takes a whole T5 (FiD) as its own, without optimiser state; a divided encoder has the names of
    its parts. `load` reads both.

    Args:
      path: of the folder, local or a bucket.
      params: of `config`, numpy, JAX arrays or TensorStores.
      config: the setting; `described` says it already.
      described: what `model_config.describe` says of it.

    Raises:
      ValueError: a checkpoint is there already.
    """
    del config
    _check_free(path)
    _save(path, t5_names.flat_from(params), 0, {_SETTING: json.dumps(described)})


def save_tree(
    path: Any, params: Mapping[str, Any], config: GlimmerConfig, described: Mapping[str, Any]
) -> None:
    """Writes parameters as `save` does, but under our own names, layers as `params` has them.

    It is what T5X starts from where it drives our models (`t5x_adapter`), without optimiser state.

    Args:
      path: folder `checkpoint_N`, local or a bucket, with no checkpoint in it; N becomes the step.
      params: of any cut, numpy, JAX arrays or TensorStores.
      config: not written: T5X would lose it.
      described: nor is this.

    Raises:
      ValueError: another name, or a checkpoint is there already.
    """
    del config, described
    name = pathlib.PurePosixPath(path).name
    if (match := _STEP.fullmatch(name)) is None:
        raise ValueError(f"T5X finds steps by their names: wanted checkpoint_N, got {name}.")
    _check_free(path)
    _save(path, flax.traverse_util.flatten_dict(params, sep="/"), int(match[1]), {})


def _check_free(path: Any) -> None:
    # Written over, it would be a mixture of two until the end.
    if exists(folder.open_folder(path), _FILE):
        raise ValueError(f"{path} holds a checkpoint already. Remove it, or write another one.")


def _save(path: Any, flat: Mapping[str, Any], step: int, beside: Mapping[str, Any]) -> None:
    kvstore = folder.open_folder(path)
    target: dict[str, Any] = {}
    for name, leaf in flat.items():
        array = np.asarray(leaf, np.float32)
        target[name] = array if array.ndim < 2 else _write(kvstore, _folder_of(name), array)
    content = {
        "version": 3,
        "optimizer": {
            "target": flax.traverse_util.unflatten_dict(target, sep="/"),
            "state": {"step": np.int32(step)},
        },
        **beside,
    }
    folder.write_file(kvstore, _FILE, flax.serialization.msgpack_serialize(content))


def _write(kvstore: ts.KvStore, name: str, array: np.ndarray) -> dict[str, Any]:
    """Writes a zarr array; returns what T5X's file says of it."""
    metadata = {
        "shape": list(array.shape),
        "chunks": [min(size, 2048) for size in array.shape],
        "dtype": array.dtype.str,
        "compressor": {"id": "gzip"},
    }
    spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
    here = folder.subfolder(kvstore, name)
    # A chunk of zeros is written, because a missing one is an error when it is read.
    future = ts.open(
        {**spec, "store_data_equal_to_fill_value": True},
        kvstore=here,
        create=True,
        delete_existing=True,
    )
    future.result().write(array).result()
    # T5X's own form: it puts its folder in front of the path.
    return {**spec, "kvstore": {"driver": "file", "path": name}}


def _folder_of(name: str) -> str:
    return "target." + name.replace("/", ".")


def _arrays(path: Any, kvstore: ts.KvStore) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Numpy arrays and opened TensorStores by name; what `save` has written of the setting."""
    content = _content(path, folder.read_file(kvstore, _FILE) or b"\x80")
    if "target" not in content.get("optimizer", {}):
        raise ValueError(
            f"{path}/{_FILE} holds {sorted(content)} and no optimizer/target: it is not a T5X "
            "checkpoint of the form that public T5 weights have."
        )
    is_leaf = lambda _, value: isinstance(value, dict) and "driver" in value  # noqa: E731
    flat = flax.traverse_util.flatten_dict(content["optimizer"]["target"], sep="/", is_leaf=is_leaf)
    places = {name: _array_folder(spec) for name, spec in flat.items() if isinstance(spec, dict)}
    arrays = opened(path, _FILE, {place: _open(kvstore, place) for place in places.values()})
    flat |= {name: arrays[place] for name, place in places.items()}
    return flat, json.loads(content.get(_SETTING, "{}"))


def _content(path: Any, data: bytes) -> dict[str, Any]:
    try:
        content = flax.serialization.msgpack_restore(data)
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__} and no names")
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{path}/{_FILE} is no T5X checkpoint, or is damaged: {error}. TensorFlow's form, which "
            "has a text file of that name, is not read; give the folder of a T5X checkpoint, or fetch "
            "the file again."
        ) from error
    return content


def _open(kvstore: ts.KvStore, place: str) -> ts.Future:
    return ts.open(
        # A missing chunk would read as zeros.
        {"driver": "zarr", "fill_missing_data_reads": False},
        # The array lies beside the file, wherever it was when its specification was written.
        kvstore=folder.subfolder(kvstore, place),
        open=True,
        read=True,
    )


def _array_folder(spec: Mapping[str, Any]) -> str:
    # TensorStore had the path at the top before it had key-value stores.
    where = spec["path"] if "path" in spec else spec["kvstore"]["path"]
    return pathlib.PurePosixPath(where.rstrip("/")).name


def _unscanned(path: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Layers one by one, as views of T5X's scanned ones."""
    embedding, norm = _SIZED[0], "encoder/encoder/pre_mlp_layer_norm/scale"
    if missing := [name for name in (embedding, norm) if name not in arrays]:
        raise ValueError(f"{path} lacks {missing}, which a scanned T5 has. Fetch it again.")
    # T5X's param_scan_axis: 1 unless somebody turned it. A norm tells.
    axis = int(arrays[norm].shape[0] == arrays[embedding].shape[1])
    out = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"(encoder|decoder)/\1/(.+)", name)
        if match is None:
            out[name] = array
            continue
        stack, rest = match.groups()
        layers = [array[(slice(None),) * axis + (i,)] for i in range(array.shape[axis])]
        if rest == _TABLE:
            # T5X's scanned layers have a table each, T5's one for all.
            tables = [np.asarray(layer) for layer in layers]
            if any(not np.array_equal(table, tables[0]) for table in tables):
                raise ValueError(
                    f"{path} has another position table in each layer of its {stack} (as umT5 has, "
                    "or a T5 that T5X trained with scanned layers), and here all layers of a stack "
                    "share one. Use weights of T5 1.0, T5 v1.1, mT5 or Flan-T5."
                )
            out[f"{stack}/{_TABLE}"] = layers[0]
        else:
            out |= {f"{stack}/layers_{i}/{rest}": layer for i, layer in enumerate(layers)}
    return out


def _sizes(path: Any, found: Mapping[str, tuple[int, ...]]) -> T5Config:
    if missing := [name for name in _SIZED if name not in found]:
        raise ValueError(
            f"The sizes of the T5 in {path} follow from {', '.join(_SIZED)}, and {missing} are not "
            f"there; there are {', '.join(sorted(found)[:10])} ..."
        )
    embedding, table, query, wo = (found[name] for name in _SIZED)
    return T5Config(
        vocab_size=embedding[0],
        emb_dim=embedding[1],
        num_heads=table[0],
        head_dim=query[1] // table[0],
        mlp_dim=wo[0],
        num_encoder_layers=_count(found, "encoder"),
        num_decoder_layers=_count(found, "decoder"),
        # The names of the projections say whether they are gated, and T5 is gated by GELU.
        mlp_activations=("relu",)
        if "encoder/layers_0/mlp/wi/kernel" in found
        else ("gelu", "linear"),
        relpos_buckets=table[1],
        scan_layers=False,
        tie_output="decoder/logits_dense/kernel" not in found,
    )


def _count(found: Mapping[str, Any], stack: str) -> int:
    return len({name.split("/")[1] for name in found if re.match(rf"{stack}/layers_\d+/", name)})
