"""The training loop. It knows batches, steps and folders, and nothing of tasks, gin or clouds."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from glimmer_jax.runtime.preemption import Interrupted, Preempted, Watcher
from glimmer_jax.runtime.prefetch import Prefetch
from glimmer_jax.storage.folder import open_folder
from glimmer_jax.storage.lease import WriterLock
from glimmer_jax.training.checkpoint import Checkpoints
from glimmer_jax.training.log import (
    Averages,
    Goodput,
    MetricWriter,
    Progress,
    Skips,
    format_scalars,
    print_once,
)
from glimmer_jax.training.optimizer import Optimizer
from glimmer_jax.training.restore import start_state
from glimmer_jax.training.state import TrainState, state_shardings
from glimmer_jax.training.step import Model, jit_train_step, make_train_step

LOCK = "run.lock"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Lengths and intervals of a run, all in steps."""

    total_steps: int  # updates in all, those of earlier starts included
    num_microbatches: int = 1  # parts of a batch that go through one after the other
    seed: int = 0  # of dropout
    log_every: int = 50
    eval_every: int = 0  # 0: never
    checkpoint_every: int = 1000  # or later, if the one before is still written; the last always is
    keep_latest: int = 2  # checkpoints
    best_metric: str | None = None  # name of the dev metric whose best checkpoint is kept as well
    best_is_max: bool = True
    max_skipped: int = 10  # in a row, for a loss or gradient that is not finite; then the run ends

    def __post_init__(self):
        for name in ("total_steps", "num_microbatches", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be 0 (never) or more, got {self.eval_every}.")
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped must be 0 (none) or more, got {self.max_skipped}.")
        if self.best_metric is not None and not self.eval_every:
            raise ValueError(
                f"best_metric={self.best_metric!r} needs evaluations: set eval_every above 0."
            )


def train(
    config: TrainConfig,
    model: Model,
    optimizer: Optimizer,
    mesh: Mesh,
    model_dir: Any,
    make_batches: Callable[[int], Iterator[dict[str, Any]]],
    fresh_params: Callable[[], Any],
    *,
    initial_params: Callable[[], Any] | None = None,
    on_start: Callable[[TrainState], None] | None = None,
    evaluate: Callable[[TrainState, Callable[[], None]], dict[str, float]] | None = None,
    metadata: dict[str, Any] | None = None,
) -> TrainState:
    """Trains until `total_steps`, going on from the newest checkpoint in `model_dir`.

    Args:
      config: lengths and intervals.
      model: gives loss and denominators.
      optimizer: from `make_optimizer`.
      mesh: the devices.
      model_dir: folder of the run; gets `checkpoints/`, `train/` (TensorBoard, `metrics.jsonl`), and
        while it runs `run.lock`.
      make_batches: step -> iterator of numpy batches (this process's rows) from that step on; the
        same step must give the same batches, or a restarted run differs.
      fresh_params: traceable; random parameters of the model.
      initial_params: loads given parameters; called if the run has no checkpoint of its own.
      on_start: called with the first state when it is known that this run may go on here, and before
        the first batch; raises where the state does not belong to the data.
      evaluate: (state, poll) -> dev metrics, called every `eval_every` steps and at the end. It calls
        `poll()` between batches, and lets through what that raises.
      metadata: saved with every checkpoint; what `same_run` compares should be in it.

    Returns:
      The state after the last step.

    Raises:
      Preempted: SIGTERM came; the state is saved.
      NonFiniteError: loss or gradient were not finite for too many steps in a row.
      ValueError: another process trains in `model_dir`, the data ended early, or what is restored
        does not fit.
    """
    lock = WriterLock(open_folder(str(model_dir)), LOCK) if jax.process_index() == 0 else None
    model_dir = epath.Path(model_dir)
    with contextlib.ExitStack() as stack:
        watcher = stack.enter_context(Watcher(together=True))
        if lock is not None:
            stack.enter_context(lock)
        checkpoints = stack.enter_context(
            Checkpoints(
                model_dir / "checkpoints",
                metadata={**(metadata or {}), "seed": config.seed},
                keep_latest=config.keep_latest,
                best_metric=config.best_metric,
                best_is_max=config.best_is_max,
            )
        )
        stack.enter_context(jax.set_mesh(mesh))
        state, source = start_state(checkpoints, optimizer, mesh, fresh_params, initial_params)
        step = int(state.step)
        print_once(f"Training from step {step} to {config.total_steps}, from {source}.")
        if not config.eval_every:
            evaluate = None
        dev_metrics: dict[str, float] | None
        if step >= config.total_steps:
            if evaluate and not checkpoints.metadata(step)["dev_metrics"]:
                # The last evaluation was interrupted.
                with _Log(model_dir / "train", step, config) as log:
                    try:
                        dev_metrics = evaluate(state, watcher.poll)
                    except Interrupted:
                        raise Preempted(
                            f"Stopped evaluating step {step}, which is saved."
                        ) from None
                    log.write_dev(step, dev_metrics)
                checkpoints.add_dev_metrics(step, dev_metrics)
            return state
        if on_start is not None:
            on_start(state)
        train_step = jit_train_step(
            make_train_step(model, optimizer, config.num_microbatches, config.seed),
            state_shardings(optimizer, state.params, mesh),
            mesh,
        )
        log = _Log(model_dir / "train", step, config)
        due = False
        with log, Prefetch(make_batches(step), mesh, config.num_microbatches) as batches:
            while step < config.total_steps:
                batch = next(batches, None)
                if batch is None:
                    raise ValueError(
                        f"The data ended after step {step} of {config.total_steps}: repeat it, or "
                        "train for fewer steps."
                    )
                state, metrics = train_step(state, batch)
                step += 1
                log.add(step, metrics, jax.tree.leaves(batch)[0].shape[0])

                last = step == config.total_steps
                dev_metrics = None
                if evaluate and (last or step % config.eval_every == 0):
                    log.flush()
                    # Interrupted, the step is saved without dev metrics.
                    with contextlib.suppress(Interrupted), log.goodput.lost():
                        dev_metrics = evaluate(state, watcher.poll)
                        log.write_dev(step, dev_metrics)
                stopping = watcher.requested_at()
                saving = last or stopping or checkpoints.is_best(dev_metrics)
                if not saving and (due or step % config.checkpoint_every == 0):
                    # Of a slow disk the steps do not wait: what is written late is saved later.
                    saving = not checkpoints.busy()
                    if not saving and not due:
                        print_once(
                            f"Step {step}: the checkpoint before this one is still being written; "
                            "the next is saved as soon as it is there."
                        )
                    due = not saving
                if saving:
                    due = False
                    # Nothing is saved of a run that ends for its losses.
                    log.flush()
                    if lock is not None:
                        lock.check()
                    with log.goodput.lost():
                        checkpoints.save(state, dev_metrics)
                interrupted = last and evaluate is not None and dev_metrics is None
                if interrupted or (stopping and not last):
                    checkpoints.wait()
                    raise Preempted(f"Stopped at step {step} of {config.total_steps}, saved.")
        checkpoints.wait()
    return state


class _Log:
    """Metrics, one step late: asking for those of the step just started would wait for it.

    The devices work on step n while the host reads n - 1, so that they always have a next step
    queued. `flush` reads the last one too, before anything that must know that all is well.
    """

    def __init__(self, directory: epath.Path, start_step: int, config: TrainConfig):
        self._config = config
        self._writer = MetricWriter(directory, start_step)
        self._averages = Averages()
        earlier = self._writer.earlier
        self._skips = Skips(config.max_skipped, earlier.skipped)
        self.goodput = Goodput(earlier=earlier)
        self._late: tuple[int, Any] | None = None
        self._first_step = start_step + 1
        self._progress: Progress | None = None

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: Any) -> None:
        if exc_type is None:
            self.flush()
        self._writer.close()

    def add(self, step: int, metrics: Any, batch_size: int) -> None:
        """Takes the metrics of a step that has been started, reads those of the step before."""
        if self._progress is None:
            self._progress = Progress(step, self._config.total_steps, batch_size)
        late, self._late = self._late, (step, metrics)
        self._read(late)

    def flush(self) -> None:
        """Reads what has not been read."""
        late, self._late = self._late, None
        self._read(late)

    def write_dev(self, step: int, dev_metrics: dict[str, float]) -> None:
        """Logs dev metrics and leaves the time they took out of the speed."""
        self._writer.write(step, dev_metrics, "dev")
        print_once(f"step {step}  dev  {format_scalars(dev_metrics)}")
        if self._progress is not None:
            self._progress.restart(step)

    def _read(self, late: tuple[int, Any] | None) -> None:
        if late is None:
            return
        step, metrics = late[0], jax.device_get(late[1])
        if not self._skips.add(step, metrics):
            self._averages.add(metrics)
        assert self._progress is not None
        if step == self._first_step:
            self._progress.restart(step)  # the first step compiles
            self.goodput.started()
        if step % self._config.log_every == 0 or step == self._config.total_steps:
            scalars = self._averages.take()
            speeds = self._progress.report(step, scalars)
            run = {**self.goodput.report(), "skipped_steps": self._skips.total}
            self._writer.write(step, {**scalars, **speeds, **run}, "train")
