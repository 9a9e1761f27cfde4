"""Reading checkpoints: finding a step, its metadata, its arrays, or its parameters alone."""

from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from glimmer_jax.training.checksums import has_sidecar, verify_sidecar


def find_step(path: Any) -> epath.Path:
    """The folder of one step: `path` itself, or the newest finished step below it.

    Raises:
      ValueError: neither `path` nor a folder in it is a checkpoint.
    """
    path = epath.Path(path).resolve()
    for folder in (path, path / "checkpoints"):
        if (folder / "params").exists():
            return folder
        steps = [
            child
            for child in (folder.iterdir() if folder.exists() else ())
            if child.name.isdigit() and has_sidecar(child)
        ]
        if steps:
            return max(steps, key=lambda child: int(child.name))
    raise ValueError(
        f"{path} is no checkpoint: expected the folder of a step (with params/ in it), or the "
        "folder of a run with finished steps."
    )


def read_metadata(path: Any) -> dict[str, Any]:
    """The JSON saved with a checkpoint; `path` as for `find_step`."""
    with _checkpointer() as checkpointer:
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        return checkpointer.restore(find_step(path), args=args).metadata


def restore_params(path: Any, target: Any = None) -> Any:
    """Only the parameters of one of our checkpoints, whatever it was trained with.

    Args:
      path: a step's folder, or a run's (its newest finished step is taken).
      target: tree of ShapeDtypeStructs with shardings to place the parameters; None gives numpy.

    Raises:
      ValueError: no checkpoint there, files damaged, or arrays other than `target`'s.
    """
    folder = find_step(path)
    verify_sidecar(folder)
    return restore_item(folder, "params", target)


def restore_item(folder: Any, item: str, target: Any) -> Any:
    """The arrays of one item (`params`, `training`) of a step's folder; does not verify checksums.

    Args:
      folder: of a step.
      item: `params` or `training`.
      target: tree of ShapeDtypeStructs with shardings; None gives numpy.

    Raises:
      ValueError: names, shapes or dtypes other than `target`'s.
    """
    with _checkpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata[item].tree
        if target is None:
            target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved)
        _check_same(folder, item, saved, target)
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
        return checkpointer.restore(folder, args=args)[item]


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            params=ocp.StandardCheckpointHandler(),
            training=ocp.StandardCheckpointHandler(),
            metadata=ocp.JsonCheckpointHandler(),
        )
    )


def _check_same(folder: epath.Path, item: str, saved: Any, target: Any) -> None:
    # Orbax would cast, crop or pad without a word.
    describe = lambda leaf: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"  # noqa: E731
    have, want = (
        {path: describe(leaf) for path, leaf in _flat(tree).items()} for tree in (saved, target)
    )
    differing = sorted(
        path for path in have.keys() | want.keys() if have.get(path) != want.get(path)
    )
    if differing:
        shown = "; ".join(
            f"{path}: wanted {want.get(path, 'nothing')}, saved {have.get(path, 'nothing')}"
            for path in differing[:5]
        )
        raise ValueError(
            f"Checkpoint {folder} does not fit in {len(differing)} arrays of {item}: {shown}. "
            "Restore it with the configuration it was saved with."
        )


def _flat(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")
