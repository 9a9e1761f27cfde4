"""Checkpoints of a run: Orbax arrays, JSON metadata and checksums. The latest and the best are kept.

A run's folder holds one folder for each step:

    <directory>/<step>/params/...     the parameters, readable without the rest
    <directory>/<step>/training/...   step counter and optimiser state
    <directory>/<step>/metadata/...   JSON: step, dev metrics, and the settings of the run
    <directory>/<step>/checksums.json written last; a step without it is unfinished
    <directory>/unfinished/<step>     the newest step of a writer that was killed; never read
    <directory>/damaged/<step>        a step whose files changed after they were written; never read
    <directory>/deleted/<step>        an empty file that marks a step whose deletion has begun

Only one writer at a time may open the folder: hold the run's lock (`lease.WriterLock`) meanwhile.
Saving copies the arrays to the host and returns. A thread waits for the files, writes the
checksums, and deletes steps that are no longer kept. Arrays carry no mesh: a step restores
bit-exactly onto any.
"""

import concurrent.futures
import logging
import math
import os
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from glimmer_jax.training.state import TrainState
from glimmer_jax.weights.checksums import (
    DamagedCheckpoint,
    has_sidecar,
    verify_sidecar,
    write_sidecar,
)
from glimmer_jax.weights.steps import (
    best_step,
    list_steps,
    read_metadata,
    restore_item,
    step_number,
    write_metadata,
)

_DELETED, _UNFINISHED, _DAMAGED = "deleted", "unfinished", "damaged"
_logger = logging.getLogger(__name__)


def steps_to_keep(
    scores: dict[int, float | None], keep_latest: int, best_is_max: bool = True
) -> set[int]:
    """The `keep_latest` newest steps, and the step with the best score (the earliest of equals).

    Args:
      scores: dev score of each step, None for a step that was not evaluated.
      keep_latest: number of newest steps to keep.
      best_is_max: whether a higher score is better.
    """
    best = best_step(scores, best_is_max)
    return set(sorted(scores)[-keep_latest:]) | ({best} if best is not None else set())


class Checkpoints:
    """The checkpoints in one run's folder, local or a bucket. Use as a context, or call `close`."""

    def __init__(
        self,
        directory: Any,
        *,
        metadata: dict[str, Any] | None = None,
        keep_latest: int = 2,
        best_metric: str | None = None,
        best_is_max: bool = True,
    ):
        """Opens or creates the folder.

        Unfinished and damaged steps are moved aside, each with a warning. The newest step is
        verified completely. For older steps only the metadata is verified, because it decides which
        step is the best and which are deleted.

        Args:
          directory: of this run's checkpoints.
          metadata: JSON-able facts saved with every step: vocabulary fingerprint, operative gin
            config, model config, seed, ...
          keep_latest: number of newest steps to keep.
          best_metric: name of the dev metric whose best step is kept as well.
          best_is_max: whether a higher value is better.

        Raises:
          ValueError: `keep_latest` is below 1, no step has checksums, or every step is damaged.
        """
        if keep_latest < 1:
            raise ValueError(f"keep_latest must be at least 1 checkpoint, got {keep_latest}.")
        self.directory = epath.Path(directory).resolve()
        self.run_metadata = dict(metadata or {})
        self._keep_latest = keep_latest
        self._best_metric = best_metric
        self._best_is_max = best_is_max
        self._verified = self._clean_up()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True),
        )
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        # One entry for each kept step, including the one being saved. Used by the caller's thread
        # only.
        self._scores: dict[int, float | None] = {
            step: self._score(self.metadata(step)["dev_metrics"])
            for step in list_steps(self.directory)
        }

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Finished steps, oldest first. Waits for the one being saved."""
        self.wait()
        return sorted(self._scores)

    def latest_step(self) -> int | None:
        """The newest finished step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best dev metric, or None if no step was evaluated."""
        return best_step(self._scores, self._best_is_max)

    def is_best(self, dev_metrics: dict[str, float] | None) -> bool:
        """Whether a state with these dev metrics would be the best so far."""
        score = self._score(dev_metrics)
        if score is None:
            return False
        best = self.best_step()
        new = max(self._scores, default=0) + 1
        return (
            best is None
            or best_step({best: self._scores[best], new: score}, self._best_is_max) == new
        )

    def busy(self) -> bool:
        """Whether any process is still writing the last save.

        A collective: all processes of a job must call it at the same step.
        """
        busy = self._pending is not None and not self._pending[1].done()
        if jax.process_count() > 1:
            busy = bool(multihost_utils.process_allgather(np.bool_(busy)).any())
        return busy

    def save(self, state: TrainState, dev_metrics: dict[str, float] | None = None) -> None:
        """Starts saving a state under its own step; returns once its arrays may be donated.

        Waits for the previous save, and raises its error if it failed.
        """
        self.wait()
        step = int(state.step)
        score = self._score(dev_metrics)
        metadata = {**self.run_metadata, "step": step, "dev_metrics": dev_metrics or {}}
        if self._best_metric is not None:
            # Readers of the folder choose a step by this metric.
            metadata["best_metric"] = {"name": self._best_metric, "is_max": self._best_is_max}
        # Plain dicts, so that the files do not depend on the classes of the optimiser's state.
        training = flax.serialization.to_state_dict({"step": state.step, "opt": state.opt_state})
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                training=ocp.args.StandardSave(training),
                metadata=ocp.args.JsonSave(metadata),
            ),
        )
        self._scores[step] = score
        keep = steps_to_keep(self._scores, self._keep_latest, self._best_is_max)
        dropped = [kept for kept in self._scores if kept not in keep]
        for old in dropped:
            del self._scores[old]
        self._pending = step, self._worker.submit(self._finish, step, dropped)

    def add_dev_metrics(self, step: int, dev_metrics: dict[str, float]) -> None:
        """Adds dev metrics to a finished step that was saved without them; a kill leaves it intact."""
        self.wait()
        self._scores[step] = self._score(dev_metrics)
        if jax.process_index() == 0:
            metadata = {**self.metadata(step), "dev_metrics": dev_metrics}
            write_metadata(self.directory / str(step), metadata)

    def wait(self) -> None:
        """Waits until the last save is complete; raises its error if it failed."""
        if self._pending is not None:
            (step, pending), self._pending = self._pending, None
            error = pending.exception()
            if error is not None:
                del self._scores[step]
                raise error

    def close(self) -> None:
        """Waits for the last save and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._manager.close()

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step."""
        return read_metadata(self.directory / str(step))

    def restore(self, target: TrainState, step: int | None = None) -> TrainState:
        """The state of a step (default: the newest), bit-exact and placed according to `target`.

        Args:
          target: ShapeDtypeStructs with shardings, from `state.abstract_state`.
          step: a finished step.

        Raises:
          ValueError: there is no such step, or its arrays differ in names, shapes or dtypes.
          DamagedCheckpoint: files of the step changed.
        """
        step = self.latest_step() if step is None else step
        if step is None or step not in self._scores:
            raise ValueError(
                f"{self.directory} has no finished checkpoint {'' if step is None else step}. Its "
                f"finished steps are {self.steps()}."
            )
        folder = self.directory / str(step)
        if step != self._verified:
            verify_sidecar(folder)
        opt_target = {"step": target.step, "opt": target.opt_state}
        params = restore_item(folder, "params", target.params)
        training = restore_item(folder, "training", flax.serialization.to_state_dict(opt_target))
        training = flax.serialization.from_state_dict(opt_target, training)
        if int(training["step"]) != step:
            raise DamagedCheckpoint(
                f"Checkpoint {folder} is damaged: its state is that of step {int(training['step'])}. "
                f"Rename it, or copy step {step} again."
            )
        return TrainState(training["step"], params, training["opt"])

    def _score(self, dev_metrics: dict[str, float] | None) -> float | None:
        if self._best_metric is None or not dev_metrics:
            return None
        if self._best_metric not in dev_metrics:
            raise ValueError(
                f"BEST_METRIC={self._best_metric!r} is not a dev metric of the evaluation, which "
                f"returned {sorted(dev_metrics)}. Set it to one of these, or to None."
            )
        score = float(dev_metrics[self._best_metric])
        return None if math.isnan(score) else score  # NaN has no rank

    def _finish(self, step: int, dropped: list[int]) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            write_sidecar(self.directory / str(step))
            # Orbax's manager deletes with a collective, which would interleave with those of the
            # training step, in a different order on each process.
            for old in dropped:
                self._delete(old)

    def _delete(self, step: int) -> None:
        # Buckets cannot rename folders. The marker lets the next start complete the deletion.
        marker = self.directory / _DELETED / str(step)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        folder = self.directory / str(step)
        if os.path.islink(folder):
            folder.unlink()  # What it points to belongs to somebody else.
        elif folder.exists():
            folder.rmtree()
        marker.unlink()

    def _clean_up(self) -> int | None:
        """Process 0 completes deletions and moves unfinished and damaged steps aside.

        Returns:
          The newest intact step, the same on all processes.
        """
        verified: int | None = None
        error: Exception | None = None
        if jax.process_index() == 0:
            try:
                self._finish_deletions()
                self._move_unfinished()
                verified = self._move_damaged()
            except (ValueError, OSError) as raised:
                error = raised
        if jax.process_count() > 1:
            # -2: process 0 has raised. -1: there is no step.
            code = -2 if error else -1 if verified is None else verified
            code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
            verified = code if code >= 0 else None
            if code == -2 and error is None:
                error = ValueError(f"{self.directory}: process 0 could not open the checkpoints.")
        if error is not None:
            raise error
        return verified

    def _finish_deletions(self) -> None:
        deleted = self.directory / _DELETED
        if deleted.exists():
            for marker in sorted(deleted.iterdir()):
                if (step := step_number(marker.name)) is not None and not marker.is_dir():
                    self._delete(step)
            deleted.rmtree()

    def _move_unfinished(self) -> None:
        steps = list_steps(self.directory)
        unfinished = [step for step in steps if not has_sidecar(self.directory / str(step))]
        # A step is started only when the previous one is finished, so that a kill leaves at most
        # one.
        if len(unfinished) > 1 and unfinished == steps:
            raise ValueError(
                f"{self.directory}: steps {unfinished} have no checksums.json. A killed writer leaves "
                "at most one such step, so the folder was copied without these files. Copy it again "
                "with every checksums.json, or move the steps away."
            )
        if steps[-1:] == unfinished[-1:] and unfinished:
            folder, aside = self._move_aside(steps[-1], _UNFINISHED)
            _logger.warning("%s was not finished. It is now %s.", folder, aside)

    def _move_damaged(self) -> int | None:
        steps = list_steps(self.directory)
        damaged: dict[int, str] = {}
        newest: int | None = None
        for step in reversed(steps):
            folder = self.directory / str(step)
            try:
                if newest is None:
                    verify_sidecar(folder)
                read_metadata(folder)
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
            else:
                newest = step if newest is None else newest
        if steps and newest is None:
            raise ValueError(
                f"{self.directory}: every step is damaged: {' '.join(damaged.values())} Nothing was "
                "moved or deleted. Copy a step again, or start in another MODEL_DIR."
            )
        for step, problem in damaged.items():
            _, aside = self._move_aside(step, _DAMAGED)
            _logger.warning(
                "%s Using step %s instead. The folder is now %s.", problem, newest, aside
            )
        return newest

    def _move_aside(self, step: int, subfolder: str) -> tuple[epath.Path, epath.Path]:
        folder = self.directory / str(step)
        aside = self.directory / subfolder / folder.name
        while aside.exists():
            aside = aside.with_name(f"{aside.name}+")
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
        return folder, aside
