"""T5X's own checkpoints: in their first form, in which all public T5 weights lie, and in Orbax's.

    checkpoint                                     msgpack: {"version", "optimizer": {"target", "state"}}
    target.encoder.layers_0.mlp.wi_0.kernel/       a zarr array for each large parameter

    state/                                         Orbax: {"target", "state"}

A large parameter's place in the msgpack holds the specification of its array. Names are ours already;
the sizes follow from the shapes.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.weights import t5_names

_FILE, _ORBAX = "checkpoint", "state"
_SIZED = (
    "token_embedder/embedding",
    "encoder/relpos_bias/rel_embedding",
    "encoder/layers_0/attention/query/kernel",
    "encoder/layers_0/mlp/wo/kernel",
)


def is_folder(path: Any) -> bool:
    """Whether a T5X checkpoint lies there."""
    path = pathlib.Path(path)
    return (path / _FILE).is_file() or (path / _ORBAX / "_METADATA").is_file()


def load(path: Any) -> tuple[dict[str, Any], GlimmerConfig, str]:
    """(FiD's parameters, their setting, in words what was found) of a step's folder.

    Raises:
      ValueError: not such a checkpoint, or parameters that are missing, extra or misshapen, all of
        which are named.
    """
    path = pathlib.Path(path)
    arrays = _arrays(path) if (path / _FILE).is_file() else _orbax_arrays(path)
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    t5 = _sizes(path, found)
    t5_names.check(path, t5_names.shapes(t5), found)

    def read(name: str) -> np.ndarray:
        array = arrays[name]
        if isinstance(array, ts.TensorStore):
            array = array.read().result()
        return array.astype(np.float32, copy=False)

    params = t5_names.tree_from(t5, read)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    what = (
        f"a T5X checkpoint in {path}: {count:,} parameters, {t5.num_encoder_layers} and "
        f"{t5.num_decoder_layers} layers of width {t5.emb_dim}, {t5.mlp_activations}, output layer "
        f"{'tied' if t5.tie_output else 'of its own'}"
    )
    return params, t5_names.fid(t5), what


def _arrays(path: pathlib.Path) -> dict[str, Any]:
    """Numpy arrays and opened TensorStores, by name."""
    content = flax.serialization.msgpack_restore((path / _FILE).read_bytes())
    if "optimizer" not in content or "target" not in content["optimizer"]:
        raise ValueError(
            f"{path / _FILE} holds {sorted(content)} and no optimizer/target: it is not a T5X "
            "checkpoint of the form that public T5 weights have."
        )
    is_leaf = lambda _, value: isinstance(value, dict) and "driver" in value  # noqa: E731
    flat = flax.traverse_util.flatten_dict(content["optimizer"]["target"], sep="/", is_leaf=is_leaf)
    opened = {name: _open(path, spec) for name, spec in flat.items() if isinstance(spec, dict)}
    return flat | {name: future.result() for name, future in opened.items()}


def _orbax_arrays(path: pathlib.Path) -> dict[str, Any]:
    """Numpy arrays by name; the optimiser's are not read."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(path / _ORBAX).item_metadata.tree
        if "target" not in saved:
            raise ValueError(
                f"{path / _ORBAX} holds {sorted(saved)} and no target: it is no T5X checkpoint."
            )
        target = {"target": jax.tree.map(lambda leaf: np.empty(leaf.shape), saved["target"])}
        args = ocp.args.PyTreeRestore(
            item=target,
            partial_restore=True,
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target),
        )
        found = checkpointer.restore(path / _ORBAX, args=args)["target"]
    return flax.traverse_util.flatten_dict(found, sep="/")


def _open(path: pathlib.Path, spec: Mapping[str, Any]) -> Any:
    # The array lies beside this file, wherever it was when the specification was written.
    name = pathlib.PurePosixPath(spec["kvstore"]["path"].rstrip("/")).name
    if not (path / name / ".zarray").is_file():
        raise ValueError(
            f"{path} lacks the array {name}, which its file {_FILE} names. Fetch it again."
        )
    # A missing chunk would read as zeros.
    return ts.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(path / name)},
            "fill_missing_data_reads": False,
        },
        open=True,
        read=True,
    )


def _sizes(path: pathlib.Path, found: Mapping[str, tuple[int, ...]]) -> T5Config:
    if missing := [name for name in _SIZED if name not in found]:
        scanned = (
            " (layers stacked by scanning are not read)" if "encoder/encoder" in str(found) else ""
        )
        raise ValueError(
            f"The sizes of the T5 in {path} follow from {', '.join(_SIZED)}, and {missing} are not "
            f"there{scanned}; there are {', '.join(sorted(found)[:10])} ..."
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
