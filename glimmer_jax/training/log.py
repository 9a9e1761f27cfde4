"""Training metrics: TensorBoard files, a JSON Lines log, and one line on stderr."""

import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath

from glimmer_jax.runtime.progress import Progress
from glimmer_jax.storage.folder import in_bucket
from glimmer_jax.storage.lines import is_regular_file
from glimmer_jax.training.goodput import Goodput, PreviousRuns

FLUSH_SECONDS = 10.0  # between TensorBoard's values on disk


class NonFiniteError(Exception):
    """The loss or its gradient was not finite for too many consecutive steps."""


class TrainingLog:
    """Logs the metrics of each step, one step late. A context.

    Reading the metrics of a step waits for the devices to finish it. The host reads step n - 1 while
    the devices compute step n, so that they always have a next step queued. `flush` reads the last
    step too; it precedes everything that must know whether all steps were finite.
    """

    def __init__(
        self, directory: Any, *, start_step: int, total_steps: int, log_every: int, max_skipped: int
    ):
        """Opens the log.

        Args:
          directory: gets TensorBoard files and `metrics.jsonl`.
          start_step: lines of later steps are dropped; a kill undid these steps.
          total_steps: of the run.
          log_every: steps between two log lines.
          max_skipped: consecutive steps that may be skipped.
        """
        self._total_steps = total_steps
        self._log_every = log_every
        self._first_step = start_step + 1
        self._writer = MetricWriter(directory, start_step)
        self._averages = Averages()
        self._skipped = SkippedSteps(max_skipped, self._writer.previous.skipped_steps)
        self.goodput = Goodput(previous=self._writer.previous)
        self._unread: tuple[int, Any] | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: Any) -> None:
        if exc_type is None:
            self.flush()
        self._writer.close()

    def add(self, step: int, metrics: Any, batch_size: int) -> None:
        """Takes the metrics of a step that was dispatched, and reads those of the previous step."""
        if self._progress is None:
            self._progress = Progress(
                "train", self._total_steps, "steps", emit=print_once, every_seconds=math.inf
            )
            self._batch_size = batch_size
        unread, self._unread = self._unread, (step, metrics)
        self._read(unread)

    def flush(self) -> None:
        """Reads the metrics that have not been read.

        Raises:
          NonFiniteError: too many consecutive steps were not finite.
        """
        unread, self._unread = self._unread, None
        self._read(unread)

    def write_dev(self, step: int, dev_metrics: dict[str, float]) -> None:
        """Logs dev metrics and excludes the time of the evaluation from the speed."""
        self._writer.write(step, dev_metrics, "dev")
        print_once(f"step {step}  dev  {format_scalars(dev_metrics)}")
        if self._progress is not None:
            self._progress.done = step
            self._progress.restart()

    def _read(self, unread: tuple[int, Any] | None) -> None:
        if unread is None:
            return
        step, metrics = unread[0], jax.device_get(unread[1])
        if not self._skipped.add(step, metrics):
            self._averages.add(metrics)
        progress = self._progress
        assert progress is not None
        progress.done = step
        if step == self._first_step:
            progress.restart()  # The first step compiles.
            self.goodput.mark_started()
        if step % self._log_every == 0 or step == self._total_steps:
            scalars = self._averages.take()
            examples_per_second = progress.rate * self._batch_size
            speeds = {
                "steps_per_second": progress.rate,
                "examples_per_second": examples_per_second,
            }
            progress.log(f"{examples_per_second:.3g} examples/s, {format_scalars(scalars)}")
            progress.restart()
            totals = {**self.goodput.report(), "skipped_steps": self._skipped.total}
            self._writer.write(step, {**scalars, **speeds, **totals}, "train")


def means(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """`{name: (total, weight)}` -> `{name: total / weight}`, without names of zero weight."""
    return {
        name: float(total) / float(weight)
        for name, (total, weight) in sums.items()
        if float(weight) != 0.0
    }


class Averages:
    """Averages of metrics over steps: sums are added before they are divided, scalars averaged."""

    def __init__(self) -> None:
        self._scalars: dict[str, list[float]] = {}
        self._sums: dict[str, np.ndarray] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds the metrics of one step, which are on the host."""
        for name, value in metrics.items():
            if name not in ("sums", "skipped"):
                self._scalars.setdefault(name, []).append(float(value))
        for name, pair in metrics["sums"].items():
            # In float64, because thousands of float32 token counts are added.
            self._sums[name] = self._sums.get(name, 0.0) + np.asarray(pair, np.float64)

    def take(self) -> dict[str, float]:
        """The averages since the last call."""
        scalars = {name: sum(values) / len(values) for name, values in self._scalars.items()}
        result = {**means({name: tuple(pair) for name, pair in self._sums.items()}), **scalars}
        self._scalars, self._sums = {}, {}
        return result


class SkippedSteps:
    """Counts steps with a non-finite loss or gradient, which leave the state unchanged.

    A single one comes from an unusual batch. Many in a row come from diverged parameters, and end
    the run.
    """

    def __init__(self, max_consecutive: int, total: int = 0):
        """Starts counting.

        Args:
          max_consecutive: consecutive skips allowed.
          total: steps that previous processes of the run skipped.
        """
        self.total = total
        self._max_consecutive = max_consecutive
        self._consecutive = 0

    def add(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Whether the step was skipped; logs each skipped step.

        Raises:
          NonFiniteError: more than `max_consecutive` consecutive steps were skipped.
        """
        if not float(metrics["skipped"]):
            self._consecutive = 0
            return False
        self.total += 1
        self._consecutive += 1
        values = (
            f"Step {step}: loss {float(metrics['loss'])}, gradient norm "
            f"{float(metrics['grad_norm'])}"
        )
        if self._consecutive > self._max_consecutive:
            raise NonFiniteError(
                f"{values}. {self._consecutive} consecutive steps were not finite; "
                f"MAX_SKIPPED_STEPS={self._max_consecutive} are allowed. They did not change the "
                "parameters. Resume from the last checkpoint with a lower learning rate, or inspect "
                f"the batch of step {step}."
            )
        print_once(f"{values}: skipped, {self._consecutive} consecutive, {self.total} in total.")
        return True


class MetricWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard, on process 0 only.

    Opened at a step, it drops the lines of later steps, which a kill undid; `previous` keeps their
    time. Buckets cannot append to a file, so that both files are rewritten there after every line.
    Elsewhere, TensorBoard's file may lack values until a line that comes `FLUSH_SECONDS` later.
    """

    def __init__(self, directory: Any, start_step: int = 0):
        self.previous = PreviousRuns()
        self._tensorboard: Any = None
        self._next_flush = 0.0
        self._file: TextIO | None = None
        # TensorBoard's library writes to a local disk only; its file is copied from here.
        self._local_copy: tempfile.TemporaryDirectory[str] | None = None
        if jax.process_index() != 0:
            return
        self._path = epath.Path(directory)
        self._path.mkdir(parents=True, exist_ok=True)
        self._log = self._path / "metrics.jsonl"
        self._lines: list[str] = []
        if self._log.exists():
            if not is_regular_file(self._log):
                raise ValueError(
                    f"{self._log} is not a regular file. Remove it, or change MODEL_DIR."
                )
            text = self._log.read_bytes().decode(errors="replace")
            lines = [line for line in text.splitlines() if _parse(line)]
            self._lines = [line for line in lines if _parse(line)["step"] <= start_step]
            self.previous = PreviousRuns.from_log([_parse(line) for line in lines], start_step)
            partial = self._path / "metrics.jsonl.partial"
            partial.write_text(_join(self._lines))
            partial.replace(self._log)
        if in_bucket(directory):
            self._local_copy = tempfile.TemporaryDirectory(prefix="glimmer-tensorboard-")
        else:
            self._file = self._log.open("a")
        # Imported here, because it imports torch if torch is installed, which takes seconds.
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.proto.summary_pb2 import Summary
        except ModuleNotFoundError:
            print_once(
                "TensorBoard files are not written, only metrics.jsonl. To write them: pip install "
                "'glimmer-jax[tensorboard]'"
            )
            return
        # Not SummaryWriter: it writes from a thread, whose death, as by a full disk, blocks us.
        place = str(self._path) if self._local_copy is None else self._local_copy.name
        # File names have a resolution of one second: two starts must not share a name.
        self._tensorboard = EventsWriter(f"{place}/events", f".{start_step}")
        self._event, self._summary = Event, Summary
        # Hides what an earlier run logged from this step on.
        started = SessionLog(status=SessionLog.START)
        self._add(Event(step=start_step + 1, session_log=started))

    def write(self, step: int, scalars: Mapping[str, float], prefix: str) -> None:
        """Logs `prefix/name` for each scalar at a step."""
        if jax.process_index() != 0:
            return
        named = {f"{prefix}/{name}": float(value) for name, value in scalars.items()}
        line = json.dumps({"step": step, **named})
        if self._file is not None:
            self._file.write(f"{line}\n")
            self._file.flush()
        else:
            self._lines.append(line)
            self._log.write_text(_join(self._lines))
        if self._tensorboard is not None:
            values = [self._summary.Value(tag=tag, simple_value=x) for tag, x in named.items()]
            self._add(self._event(step=step, summary=self._summary(value=values)))
        if self._local_copy is not None:
            self._copy()

    def close(self) -> None:
        """Closes all files."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._file is not None:
            self._file.close()
        if self._local_copy is not None:
            self._copy()
            self._local_copy.cleanup()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._tensorboard.write_event(event)
        # A flush waits for the disk.
        if self._local_copy is not None or time.monotonic() > self._next_flush:
            self._tensorboard.flush()
            self._next_flush = time.monotonic() + FLUSH_SECONDS

    def _copy(self) -> None:
        assert self._local_copy is not None
        for file in pathlib.Path(self._local_copy.name).iterdir():
            (self._path / file.name).write_bytes(file.read_bytes())


def _join(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _parse(line: str) -> dict[str, Any]:
    # A line that a kill truncated, or that is damaged, belongs to no step.
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return {}
    numbers = (type(x) is float or (type(x) is int and abs(x) < 2**63) for x in values.values())
    return values if all(numbers) else {}


def print_once(line: str) -> None:
    """Prints a line on stderr, on process 0 only."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def format_scalars(scalars: Mapping[str, float]) -> str:
    """`{"loss": 2.34567, "z_loss": 0.1}` -> `loss 2.346, z_loss 0.1`."""
    return ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
