"""Reading the checkpoints of a run: choosing a step, and its metadata, parameters or arrays."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from glimmer_jax.storage.folder import local_path, open_folder
from glimmer_jax.weights.checksums import (
    SIDECAR,
    DamagedCheckpoint,
    has_sidecar,
    read_verified,
    replace_file,
    verify_sidecar,
)
from glimmer_jax.weights.file_errors import parsing
from glimmer_jax.weights.lazy_arrays import open_orbax

# Orbax's JsonSave writes the item `metadata` to this file.
_METADATA = "metadata/metadata"
# Not `str.isdigit`, which accepts `²`.
_STEP = re.compile(r"0|[1-9][0-9]{0,8}")
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Step:
    """The folder of a step, and why it was chosen."""

    folder: epath.Path
    why: str


def step_number(name: str) -> int | None:
    """The step of a folder of this name, None if it is not named like a step."""
    return int(name) if _STEP.fullmatch(name) else None


def list_steps(directory: Any) -> list[int]:
    """The steps that have a folder in `directory`, oldest first, finished or not."""
    directory = epath.Path(directory)
    children = directory.iterdir() if directory.exists() else ()
    numbers = (step_number(child.name) for child in children)
    return sorted(number for number in numbers if number is not None)


def find_step(path: Any) -> Step:
    """The step to read: `path` itself, or the best finished step below it, or the newest.

    The best step is chosen by the dev metric that the run named; the earliest of equals wins. A run
    without such a metric, or without an evaluation so far, gives its newest step. (A resumed run always
    takes its newest intact step: see `training.checkpoint`.)

    An older step with damaged metadata is reported and not considered.

    Raises:
      ValueError: neither `path` nor a folder in it is a checkpoint.
      DamagedCheckpoint: the metadata of the newest step is damaged.
    """
    path = epath.Path(local_path(path)).resolve()
    for folder in (path, path / "checkpoints"):
        if (folder / "params").exists():
            return Step(folder, "the given step")
        found = list_steps(folder)
        steps = [step for step in found if has_sidecar(folder / str(step))]
        # The newest may be one that is being written.
        for step in sorted(set(found[:-1]) - set(steps)):
            _logger.warning(
                "%s has no %s. It is not considered: copy it again.", folder / str(step), SIDECAR
            )
        if steps:
            return _best_or_newest(folder, steps)
    raise ValueError(
        f"{path} is not a checkpoint. Expected the folder of a step (with params/ in it), the folder "
        "of a run with finished steps, a .safetensors file, or a folder of public T5 weights."
    )


def run_folder(step_folder: Any) -> epath.Path:
    """The folder of the run that a step belongs to; the step's own if it stands alone."""
    step_folder = epath.Path(step_folder)
    checkpoints = step_folder.parent
    return checkpoints.parent if checkpoints.name == "checkpoints" else step_folder


def best_step(scores: Mapping[int, float | None], best_is_max: bool = True) -> int | None:
    """The step with the best score, the earliest of equals; None if no step has a score."""
    sign = 1 if best_is_max else -1
    scored = {step: sign * score for step, score in scores.items() if score is not None}
    return max(scored, key=lambda step: (scored[step], -step)) if scored else None


def _best_or_newest(directory: epath.Path, steps: list[int]) -> Step:
    *older, newest = steps
    metadata = {newest: read_metadata(directory / str(newest))}
    best_metric = metadata[newest].get("best_metric")
    if best_metric is None:
        return Step(directory / str(newest), "the newest")
    for step in older:
        try:
            metadata[step] = read_metadata(directory / str(step))
        except DamagedCheckpoint as error:
            _logger.warning("%s It is not considered as the best step.", error)
    name = best_metric["name"]
    scores = {step: metadata[step]["dev_metrics"].get(name) for step in metadata}
    best = best_step(scores, best_metric["is_max"])
    if best is None:
        return Step(directory / str(newest), "the newest")
    return Step(directory / str(best), f"the best by dev metric {name}, {scores[best]:.4g}")


def read_metadata(folder: Any) -> dict[str, Any]:
    """The JSON saved with a step.

    Raises:
      DamagedCheckpoint: the file is not the one that was written, is not as a run writes it, or belongs
        to another step.
    """
    folder = epath.Path(folder)
    metadata = _parse_metadata(read_verified(folder, _METADATA))
    if metadata is None:
        raise DamagedCheckpoint(
            f"Checkpoint {folder} is damaged: {_METADATA} does not hold the step, dev metrics and best "
            "metric of a run. Copy it again, or use another step."
        )
    step = step_number(folder.name)
    if step is not None and metadata["step"] != step:
        raise DamagedCheckpoint(
            f"Checkpoint {folder} is damaged: it holds step {metadata['step']}. Rename it, or copy "
            f"step {step} again."
        )
    return metadata


def _parse_metadata(data: bytes) -> dict[str, Any] | None:
    """The metadata, if its values have the types that a run writes."""
    try:
        metadata = json.loads(data)
        scores = metadata["dev_metrics"].values()
        best = metadata.get("best_metric")
        valid = (
            type(metadata["step"]) is int
            and all(type(x) is float or (type(x) is int and abs(x) < 2**63) for x in scores)
            and (best is None or (type(best["name"]), type(best["is_max"])) == (str, bool))
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return metadata if valid else None


def write_metadata(folder: Any, metadata: dict[str, Any]) -> None:
    """Replaces the JSON saved with a step; a kill leaves the old one or the new one."""
    replace_file(folder, _METADATA, json.dumps(metadata).encode())


def restore_params(folder: Any) -> dict[str, Any]:
    """Only the parameters of a step, as TensorStores that have read nothing yet.

    Every file of the step is read once for its checksum.

    Raises:
      DamagedCheckpoint: files are damaged or missing.
    """
    verify_sidecar(folder)
    flat = open_orbax(open_folder(epath.Path(folder) / "params"))
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def restore_item(folder: Any, item: str, target: Any) -> Any:
    """The arrays of an item of a step's folder. Does not verify checksums.

    Args:
      folder: of a step.
      item: `params` or `training`.
      target: tree of ShapeDtypeStructs with shardings.

    Raises:
      ValueError: names, shapes or dtypes differ from `target`'s, or Orbax cannot read the files.
    """
    with _checkpointer() as checkpointer:
        with parsing(folder, "Orbax"):
            saved = checkpointer.metadata(folder).item_metadata[item].tree
        _check_equal_shapes(folder, item, saved, target)
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
        with parsing(folder, "Orbax"):
            return checkpointer.restore(folder, args=args)[item]


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            params=ocp.StandardCheckpointHandler(), training=ocp.StandardCheckpointHandler()
        )
    )


def _check_equal_shapes(folder: epath.Path, item: str, saved: Any, target: Any) -> None:
    # Orbax would cast, crop or pad silently.
    describe = lambda leaf: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"  # noqa: E731
    have, want = (
        {path: describe(leaf) for path, leaf in _flat(tree).items()} for tree in (saved, target)
    )
    differing = sorted(
        path for path in have.keys() | want.keys() if have.get(path) != want.get(path)
    )
    if differing:
        listed = "; ".join(
            f"{path}: expected {want.get(path, 'nothing')}, saved {have.get(path, 'nothing')}"
            for path in differing[:5]
        )
        raise ValueError(
            f"Checkpoint {folder} differs in {len(differing)} arrays of {item}: {listed}. Restore it "
            "with the configuration it was saved with."
        )


def _flat(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")
