"""Checkpoints of a run: Orbax arrays, JSON metadata, checksums; the latest and the best are kept.

A run's folder holds one folder for each step:

    <directory>/<step>/params/...     the parameters, readable without the rest
    <directory>/<step>/training/...   step counter and optimiser state
    <directory>/<step>/metadata/...   JSON: step, dev metrics, and what the run says about itself
    <directory>/<step>/checksums.json written last; a step without it does not count
    <directory>/unfinished/<step>     what a killed writer left of the newest step; never read
    <directory>/damaged/<step>        a newest step that no longer is what was written; never read
    <directory>/deleted/<step>        an empty file: the step is being deleted, and no longer counts

One writer at a time may open it: hold the run's lock (`lock.WriterLock`) meanwhile. Saving copies to
the host and returns; a thread waits for the files, writes the checksums, and removes what need not
be kept. Arrays carry no mesh: a step restores bit-exactly onto any.
"""

import concurrent.futures
import logging
import math
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from glimmer_jax.training.state import TrainState
from glimmer_jax.weights.checksums import has_sidecar, verify_sidecar, write_sidecar
from glimmer_jax.weights.steps import best_step, read_metadata, restore_item, write_metadata

_DELETED, _UNFINISHED, _DAMAGED = "deleted", "unfinished", "damaged"
_logger = logging.getLogger(__name__)


def steps_to_keep(
    scores: dict[int, float | None], keep_latest: int, best_is_max: bool = True
) -> set[int]:
    """Steps that stay: the `keep_latest` newest, and the best scored (the earliest of equals).

    Args:
      scores: dev score of each step, None where it was not evaluated.
      keep_latest: how many of the newest stay.
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
        """Opens, or creates, the folder.

        Args:
          directory: of this run's checkpoints.
          metadata: JSON-able facts saved with every step: vocabulary fingerprint, operative gin
            config, model config, seed, ...
          keep_latest: number of newest steps kept.
          best_metric: name among the dev metrics whose best step is kept as well.
          best_is_max: whether higher is better.

        Raises:
          ValueError: nothing would be kept, steps have lost their checksums, or all are damaged.
        """
        if keep_latest < 1:
            raise ValueError(f"keep_latest must be at least 1 checkpoint, got {keep_latest}.")
        self.directory = epath.Path(directory).resolve()
        self.run_metadata = dict(metadata or {})
        self._keep_latest = keep_latest
        self._best_metric = best_metric
        self._best_is_max = best_is_max
        self._finish_deletions()
        self._put_unfinished_aside()
        self._verified = self._put_damaged_aside()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True),
        )
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        # Of every step that is kept, the one being saved included. Only the caller's thread looks.
        self._scores: dict[int, float | None] = {}
        for step in self._manager.all_steps():
            saved = read_metadata(self.directory / str(step))
            self._scores[step] = self._score(saved["dev_metrics"])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Finished steps, oldest first; waits for the one being saved."""
        self.wait()
        return sorted(self._scores)

    def latest_step(self) -> int | None:
        """The newest finished step, None if there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best dev metric, None if none was evaluated."""
        return best_step(self._scores, self._best_is_max)

    def is_best(self, dev_metrics: dict[str, float] | None) -> bool:
        """Whether a state with these dev metrics would be the best one so far."""
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
        """Whether the last save is still being written, by this process or another.

        To be asked by all processes of a job at the same step.
        """
        busy = self._pending is not None and not self._pending[1].done()
        if jax.process_count() > 1:
            busy = bool(multihost_utils.process_allgather(np.bool_(busy)).any())
        return busy

    def save(self, state: TrainState, dev_metrics: dict[str, float] | None = None) -> None:
        """Starts saving a state under its own step; returns once its arrays may be donated.

        Waits for the save before this one, and raises whatever that failed with.
        """
        self.wait()
        step = int(state.step)
        score = self._score(dev_metrics)
        metadata = {**self.run_metadata, "step": step, "dev_metrics": dev_metrics or {}}
        if self._best_metric is not None:
            # For readers of the folder: by what they choose a step.
            metadata["best_metric"] = {"name": self._best_metric, "is_max": self._best_is_max}
        # Plain dicts: the files do not depend on the classes of the optimiser's state.
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
        old = [one for one in self._scores if one not in keep]
        for one in old:
            del self._scores[one]
        self._pending = step, self._worker.submit(self._finish, step, old)

    def add_dev_metrics(self, step: int, dev_metrics: dict[str, float]) -> None:
        """Writes dev metrics into a finished step that was saved without.

        Killed in here, the step counts as damaged, and a run goes on from the one before it.
        """
        self.wait()
        self._scores[step] = self._score(dev_metrics)
        if jax.process_index() == 0:
            write_metadata(
                self.directory / str(step), {**self.metadata(step), "dev_metrics": dev_metrics}
            )
            write_sidecar(self.directory / str(step))

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises what it failed with."""
        if self._pending is not None:
            (step, pending), self._pending = self._pending, None
            error = pending.exception()
            if error is not None:
                del self._scores[step]
                raise error

    def close(self) -> None:
        """Waits for the last save and lets go of Orbax's threads."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._manager.close()

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step."""
        return read_metadata(self.directory / str(step))

    def restore(self, target: TrainState, step: int | None = None) -> TrainState:
        """The state of a step (default: the newest), placed as `target` says, bit for bit.

        Args:
          target: ShapeDtypeStructs with shardings, from `state.abstract_state`.
          step: a finished step.

        Raises:
          ValueError: no such step, files damaged, or arrays of other names, shapes or dtypes.
        """
        step = self.latest_step() if step is None else step
        if step is None or step not in self._scores:
            raise ValueError(
                f"{self.directory} has no finished checkpoint {'' if step is None else step}; "
                f"it has {self.steps()}."
            )
        folder = self.directory / str(step)
        if step != self._verified:
            verify_sidecar(folder)
        opt_target = {"step": target.step, "opt": target.opt_state}
        params = restore_item(folder, "params", target.params)
        training = restore_item(folder, "training", flax.serialization.to_state_dict(opt_target))
        training = flax.serialization.from_state_dict(opt_target, training)
        return TrainState(training["step"], params, training["opt"])

    def _score(self, dev_metrics: dict[str, float] | None) -> float | None:
        if self._best_metric is None or not dev_metrics:
            return None
        if self._best_metric not in dev_metrics:
            raise ValueError(
                f"The best checkpoint is chosen by dev metric {self._best_metric!r}, and the "
                f"evaluation returned {sorted(dev_metrics)}. Set best_metric to one of these."
            )
        score = float(dev_metrics[self._best_metric])
        return None if math.isnan(score) else score  # NaN is neither better nor worse

    def _finish(self, step: int, old: list[int]) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            write_sidecar(self.directory / str(step))
            # Not by the manager: all its processes meet when it deletes, by a collective that would come
            # between those of the training step, in another order on each.
            for one in old:
                self._delete(one)

    def _delete(self, step: int) -> None:
        """Removes a step. Killed in here, the next start goes on with it: a bucket renames no folder."""
        marker = self.directory / _DELETED / str(step)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        folder = self.directory / str(step)
        if folder.exists():
            folder.rmtree()
        marker.unlink()

    def _finish_deletions(self) -> None:
        deleted = self.directory / _DELETED
        if jax.process_index() == 0 and deleted.exists():
            for marker in sorted(deleted.iterdir()):
                if marker.name.isdigit() and not marker.is_dir():
                    self._delete(int(marker.name))
            deleted.rmtree()
        # Nobody looks at the steps before.
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("deleted steps")

    def _put_unfinished_aside(self) -> None:
        """Nothing without checksums is read, and nothing of it is deleted."""
        steps = self._step_folders()
        unfinished = [step for step in steps if not has_sidecar(self.directory / str(step))]
        # A step is begun only when the one before it is finished, so a kill leaves one: the newest.
        if unfinished and unfinished != steps[-1:]:
            raise ValueError(
                f"{self.directory}: steps {unfinished} of {steps} have no checksums.json; more than "
                "a killed writer can leave, so the folder was copied without them. Copy it again "
                "with every checksums.json, or move these steps away."
            )
        if unfinished and jax.process_index() == 0:
            folder, aside = self._put_aside(unfinished[0], _UNFINISHED)
            _logger.warning("%s was not finished when its writer stopped: now %s.", folder, aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("unfinished steps")

    def _put_damaged_aside(self) -> int | None:
        """The newest step whose files are what was written; newer ones make way for it.

        Process 0 reads all files of a step once, for all processes.
        """
        steps = self._step_folders()
        damaged: dict[int, str] = {}
        if jax.process_index() == 0:
            for step in reversed(steps):
                try:
                    verify_sidecar(self.directory / str(step))
                except ValueError as error:
                    damaged[step] = str(error)
                else:
                    break
        lost = len(damaged)
        if jax.process_count() > 1:
            lost = int(multihost_utils.broadcast_one_to_all(np.int32(lost)))
        if lost and lost == len(steps):
            raise ValueError(
                f"{self.directory}: every step is damaged: {'; '.join(damaged.values())} Nothing was "
                "moved or deleted. Copy one again, or start in a new folder from other weights."
            )
        for step, problem in damaged.items():
            _, aside = self._put_aside(step, _DAMAGED)
            _logger.warning(
                "%s Going on from the step before it; this one is now %s.", problem, aside
            )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged steps")
        return steps[-1 - lost] if steps else None

    def _put_aside(self, step: int, where: str) -> tuple[epath.Path, epath.Path]:
        folder = self.directory / str(step)
        aside = self.directory / where / folder.name
        while aside.exists():
            aside = aside.with_name(f"{aside.name}+")
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
        return folder, aside

    def _step_folders(self) -> list[int]:
        folders = self.directory.iterdir() if self.directory.exists() else ()
        return sorted(int(folder.name) for folder in folders if folder.name.isdigit())
