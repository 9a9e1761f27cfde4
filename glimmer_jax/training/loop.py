"""A training run: its folder, its initial state, and the loop over batches.

    with Run(config, model, optimizer, mesh, model_dir) as run:
        state = run.restore(fresh_params)
        batches = ...  # an iterator that starts at step int(state.step)
        state = run.train(state, batches, evaluate)

The loop knows batches, steps and folders. It does not know tasks, gin or clouds.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from glimmer_jax.partitioning import put_batch
from glimmer_jax.runtime.preemption import STOP, StopRequested
from glimmer_jax.runtime.prefetch import prefetch
from glimmer_jax.storage.folder import local_path, open_folder
from glimmer_jax.storage.lease import WriterLock
from glimmer_jax.training.checkpoint import Checkpoints
from glimmer_jax.training.log import TrainingLog, print_once
from glimmer_jax.training.optimizer import Optimizer
from glimmer_jax.training.restore import restore
from glimmer_jax.training.state import TrainState, state_shardings
from glimmer_jax.training.step import Model, jit_train_step, make_train_step

LOCK = "run.lock"
# The stop signal is polled after each step. The launchers leave 120 s between SIGTERM and SIGKILL.
GRACE_SECONDS = 100.0

# (state, poll) -> dev metrics. It calls `poll()` between batches and lets its exception pass.
Evaluate = Callable[[TrainState, Callable[[], None]], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and intervals of a run, in steps."""

    total_steps: int  # includes the steps of previous starts
    num_microbatches: int = 1  # each batch is processed in this many sequential parts
    seed: int = 0  # of dropout
    log_every: int = 50
    eval_every: int = 0  # 0: never
    checkpoint_every: int = 1000  # delayed while the previous checkpoint is still being written
    keep_latest: int = 2  # number of newest checkpoints to keep
    best_metric: str | None = None  # dev metric whose best checkpoint is kept as well
    best_is_max: bool = True
    max_skipped: int = (
        10  # consecutive steps with a non-finite loss or gradient before the run ends
    )

    def __post_init__(self):
        for name in ("total_steps", "num_microbatches", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be at least 0 (0: never), got {self.eval_every}.")
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped must be at least 0, got {self.max_skipped}.")
        if self.best_metric is not None and not self.eval_every:
            raise ValueError(
                f"best_metric={self.best_metric!r} needs evaluations: set eval_every above 0."
            )


class Run:
    """A run's folder, held by one job: its lock, its checkpoints and its stop signal. A context.

    `model_dir` gets `checkpoints/`, `train/` (TensorBoard files and `metrics.jsonl`), and `run.lock`
    while the run is open.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        optimizer: Optimizer,
        mesh: Mesh,
        model_dir: Any,
        metadata: dict[str, Any] | None = None,
    ):
        """Nothing is opened before the context is entered.

        Args:
          config: length and intervals.
          model: computes the loss and its denominators.
          optimizer: from `make_optimizer`.
          mesh: the devices.
          model_dir: folder of the run, local or in a bucket.
          metadata: JSON-able facts saved with every checkpoint. It must hold the settings that
            `restore.check_resume_compatible` compares.
        """
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._mesh = mesh
        self._model_dir = epath.Path(local_path(model_dir))
        self._metadata = {**(metadata or {}), "seed": config.seed}
        self._lock: WriterLock | None = None
        if jax.process_index() == 0:
            self._lock = WriterLock(open_folder(str(model_dir)), LOCK)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        """Locks the folder and opens its checkpoints.

        Raises:
          ValueError: another job trains in the folder, or all of its checkpoints are damaged.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(STOP.installed())
            if self._lock is not None:
                stack.enter_context(self._lock)
            self._checkpoints = stack.enter_context(
                Checkpoints(
                    self._model_dir / "checkpoints",
                    metadata=self._metadata,
                    keep_latest=self._config.keep_latest,
                    best_metric=self._config.best_metric,
                    best_is_max=self._config.best_is_max,
                )
            )
            stack.enter_context(jax.set_mesh(self._mesh))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.__exit__(*exc_info)

    def restore(
        self, fresh_params: Callable[[], Any], load_initial: Callable[[], Any] | None = None
    ) -> TrainState:
        """The initial state, by the order of preference of `restore.restore`."""
        state, source = restore(
            self._checkpoints, self._optimizer, self._mesh, fresh_params, load_initial
        )
        print_once(
            f"Training from step {int(state.step)} to {self._config.total_steps}, from {source}."
        )
        return state

    def train(
        self,
        state: TrainState,
        batches: Iterator[dict[str, Any]],
        evaluate: Evaluate | None = None,
    ) -> TrainState:
        """Trains until `total_steps`.

        Args:
          state: from `restore`.
          batches: numpy batches (this process's rows) from step `state.step` on. The same step must
            always get the same batch, or a resumed run differs from an uninterrupted one.
          evaluate: called every `eval_every` steps and at the end.

        Returns:
          The state after the last step.

        Raises:
          StopRequested: the job was asked to stop; the state is saved.
          NonFiniteError: too many consecutive steps had a non-finite loss or gradient.
          ValueError: the data ended early.
        """
        config, step = self._config, int(state.step)
        if not config.eval_every:
            evaluate = None
        if step >= config.total_steps:
            self._complete_evaluation(state, evaluate)
            return state
        train_step = jit_train_step(
            make_train_step(self._model, self._optimizer, config.num_microbatches, config.seed),
            state_shardings(self._optimizer, state.params, self._mesh),
            self._mesh,
        )
        overdue, first_step = False, step + 1
        device_batches = prefetch(
            batches, lambda batch: put_batch(batch, self._mesh, config.num_microbatches)
        )
        with (
            self._open_log(step) as log,
            contextlib.closing(device_batches),
            contextlib.ExitStack() as stack,
        ):
            while step < config.total_steps:
                batch = next(device_batches, None)
                if batch is None:
                    raise ValueError(
                        f"The data ended after step {step} of {config.total_steps}. Repeat the "
                        "data, or lower TRAIN_STEPS."
                    )
                state, metrics = train_step(state, batch)
                step += 1
                # It is compiled, and from here on there is progress to save.
                if step == first_step:
                    stack.enter_context(STOP.grace(GRACE_SECONDS))
                log.add(step, metrics, jax.tree.leaves(batch)[0].shape[0])

                last = step == config.total_steps
                dev_metrics = None
                if evaluate and (last or step % config.eval_every == 0):
                    dev_metrics = self._evaluate(evaluate, state, log)
                stopping = STOP.agreed()
                saving = last or stopping or self._checkpoints.is_best(dev_metrics)
                if not saving and (overdue or step % config.checkpoint_every == 0):
                    # Training does not wait for a slow disk: the checkpoint is delayed instead.
                    saving = not self._checkpoints.busy()
                    if not saving and not overdue:
                        print_once(
                            f"Step {step}: the previous checkpoint is still being written. The next "
                            "one is saved once it is complete."
                        )
                    overdue = not saving
                if saving:
                    overdue = False
                    self._save(state, dev_metrics, log)
                unevaluated = last and evaluate is not None and dev_metrics is None
                if unevaluated or (stopping and not last):
                    self._checkpoints.wait()
                    raise StopRequested(f"Stopped at step {step} of {config.total_steps}, saved.")
        self._checkpoints.wait()
        return state

    def _open_log(self, step: int) -> TrainingLog:
        config = self._config
        return TrainingLog(
            self._model_dir / "train",
            start_step=step,
            total_steps=config.total_steps,
            log_every=config.log_every,
            max_skipped=config.max_skipped,
        )

    def _evaluate(
        self, evaluate: Evaluate, state: TrainState, log: TrainingLog
    ) -> dict[str, float] | None:
        """Dev metrics, or None if the evaluation was interrupted."""
        # A run that ends because of its losses must end before the evaluation.
        log.flush()
        with contextlib.suppress(StopRequested), log.goodput.lost_time():
            dev_metrics = evaluate(state, STOP.poll_together)
            log.write_dev(int(state.step), dev_metrics)
            return dev_metrics
        return None

    def _save(
        self, state: TrainState, dev_metrics: dict[str, float] | None, log: TrainingLog
    ) -> None:
        # A run that ends because of its losses must not save them.
        log.flush()
        if self._lock is not None:
            self._lock.check()
        with log.goodput.lost_time():
            self._checkpoints.save(state, dev_metrics)

    def _complete_evaluation(self, state: TrainState, evaluate: Evaluate | None) -> None:
        """Evaluates a finished run whose last evaluation was interrupted."""
        step = int(state.step)
        if evaluate is None or self._checkpoints.metadata(step)["dev_metrics"]:
            return
        with self._open_log(step) as log:
            dev_metrics = self._evaluate(evaluate, state, log)
        if dev_metrics is None:
            raise StopRequested(f"Stopped during the evaluation of step {step}, which is saved.")
        self._checkpoints.add_dev_metrics(step, dev_metrics)
