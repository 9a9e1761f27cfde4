"""Reading checkpoints: finding a step, its metadata, its arrays, or its parameters alone."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from glimmer_jax.storage.folder import local_path, open_folder
from glimmer_jax.weights.checksums import has_sidecar, verify_sidecar
from glimmer_jax.weights.lazy_arrays import open_arrays


@dataclasses.dataclass(frozen=True)
class Step:
    """The folder of one step, and why it was taken."""

    folder: epath.Path
    why: str


def find_step(path: Any) -> Step:
    """The step to read: `path` itself, or the best finished step below it, or the newest.

    The best is that of the dev metric which the run named, the earliest of equals. A run that named
    none, or has not evaluated yet, gives its newest. (A run that goes on takes its newest always:
    see `training.checkpoint`.)

    Raises:
      ValueError: neither `path` nor a folder in it is a checkpoint.
    """
    path = epath.Path(local_path(path)).resolve()
    for folder in (path, path / "checkpoints"):
        if (folder / "params").exists():
            return Step(folder, "the step given")
        steps = [
            child
            for child in (folder.iterdir() if folder.exists() else ())
            if child.name.isdigit() and has_sidecar(child)
        ]
        if steps:
            return _best_or_newest(sorted(steps, key=lambda child: int(child.name)))
    raise ValueError(
        f"{path} is no checkpoint: expected the folder of a step (with params/ in it), the folder "
        "of a run with finished steps, a .safetensors file, or a folder of public T5 weights."
    )


def best_step(scores: Mapping[int, float | None], best_is_max: bool = True) -> int | None:
    """The step with the best score, the earliest of equals; None if none has a score."""
    sign = 1 if best_is_max else -1
    scored = {step: sign * score for step, score in scores.items() if score is not None}
    return max(scored, key=lambda step: (scored[step], -step)) if scored else None


def _best_or_newest(steps: list[epath.Path]) -> Step:
    chosen_by = read_metadata(steps[-1]).get("best_metric")
    if chosen_by is not None:
        name, best_is_max = chosen_by["name"], chosen_by["is_max"]
        dev = {int(step.name): read_metadata(step)["dev_metrics"].get(name) for step in steps}
        if (best := best_step(dev, best_is_max)) is not None:
            folder = next(step for step in steps if int(step.name) == best)
            return Step(folder, f"the best by dev metric {name}, {dev[best]:.4g}")
    return Step(steps[-1], "the newest")


def read_metadata(folder: Any) -> dict[str, Any]:
    """The JSON saved with a step."""
    with _checkpointer() as checkpointer:
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        return checkpointer.restore(epath.Path(folder), args=args).metadata


def write_metadata(folder: Any, metadata: dict[str, Any]) -> None:
    """Replaces the JSON saved with a step; its checksums must be written anew."""
    # Where Orbax's JsonSave puts the item `metadata`.
    file = epath.Path(folder) / "metadata" / "metadata"
    partial = file.with_name("metadata.partial")
    partial.write_text(json.dumps(metadata))
    partial.replace(file)


def restore_params(folder: Any) -> dict[str, Any]:
    """Only the parameters of one of our steps, whatever it was trained with, as TensorStores.

    Every file is read once for its checksum; of the arrays nothing is read yet.

    Raises:
      ValueError: files damaged or missing.
    """
    verify_sidecar(folder)
    flat = open_arrays(open_folder(epath.Path(folder) / "params"))
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def restore_item(folder: Any, item: str, target: Any) -> Any:
    """The arrays of one item (`params`, `training`) of a step's folder; does not verify checksums.

    Args:
      folder: of a step.
      item: `params` or `training`.
      target: tree of ShapeDtypeStructs with shardings.

    Raises:
      ValueError: names, shapes or dtypes other than `target`'s.
    """
    with _checkpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata[item].tree
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
