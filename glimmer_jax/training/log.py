"""Where a run's numbers go: TensorBoard, a JSON Lines log, and one line on stderr."""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath

# About when the process began: modules are imported first.
_BEGIN = time.monotonic()


class NonFiniteError(Exception):
    """The loss or its gradient is no longer a number."""


def means(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """`{name: (total, weight)}` -> `{name: total / weight}`; names without weight are left out."""
    return {
        name: float(total) / float(weight)
        for name, (total, weight) in sums.items()
        if float(weight) != 0.0
    }


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What a run came to before this process began, as far as its log tells.

    Time between the last line and the end of a life is not known, and counts nowhere.
    """

    alive: float = 0.0  # seconds of all lives
    useful: float = 0.0  # of them, in training steps; not in those that a kill has undone
    skipped: int = 0  # steps, as `Skips` counts them

    @classmethod
    def of(cls, lines: list[dict[str, Any]], step: int) -> "Earlier":
        """From all lines of the log, of which those up to `step` still count."""
        told = [line for line in lines if "train/alive_seconds" in line]
        if not told:
            return cls()
        alive, kept = told[-1]["train/alive_seconds"], [one for one in told if one["step"] <= step]
        if not kept:
            return cls(alive)
        useful = kept[-1]["train/goodput"] * kept[-1]["train/alive_seconds"]
        return cls(alive, useful, int(kept[-1]["train/skipped_steps"]))


class Averages:
    """Metrics of several steps made one: sums are added, scalars averaged."""

    def __init__(self) -> None:
        self._scalars: dict[str, list[float]] = {}
        self._sums: dict[str, np.ndarray] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """One step's metrics, already on the host."""
        for name, value in metrics.items():
            if name not in ("sums", "skipped"):
                self._scalars.setdefault(name, []).append(float(value))
        for name, pair in metrics["sums"].items():
            # float64: thousands of float32 token counts are added.
            self._sums[name] = self._sums.get(name, 0.0) + np.asarray(pair, np.float64)

    def take(self) -> dict[str, float]:
        """The averages since the last call."""
        scalars = {name: sum(values) / len(values) for name, values in self._scalars.items()}
        result = {**means({name: tuple(pair) for name, pair in self._sums.items()}), **scalars}
        self._scalars, self._sums = {}, {}
        return result


class Skips:
    """Steps whose loss or gradient was not finite, which have changed nothing.

    One comes from an unlucky batch now and then; many in a row come from parameters that are beyond
    help, and the run ends.
    """

    def __init__(self, at_most: int, total: int = 0):
        """`at_most` in a row are borne; `total` were skipped before."""
        self.total = total
        self._at_most = at_most
        self._row = 0

    def add(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Whether the step was skipped; tells of it.

        Raises:
          NonFiniteError: one too many in a row; names the step and the values.
        """
        if not float(metrics["skipped"]):
            self._row = 0
            return False
        self.total += 1
        self._row += 1
        what = (
            f"Step {step}: loss {float(metrics['loss'])}, gradient norm "
            f"{float(metrics['grad_norm'])}"
        )
        if self._row > self._at_most:
            raise NonFiniteError(
                f"{what}; not finite {self._row} times in a row, of which {self._at_most} are borne "
                "(MAX_SKIPPED_STEPS). The parameters are those from before; go on from the last "
                f"checkpoint with a lower learning rate, or look at the batch of step {step}."
            )
        print_once(f"{what}: skipped, {self._row} in a row, {self.total} in all.")
        return True


class Goodput:
    """Share of a run's lives that went into training steps.

    What is lost is named by the caller: all until the first step is done, evaluations, waiting for
    checkpoints. So is what a killed process had trained and not saved; `Earlier` knows of it.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, earlier: Earlier = Earlier()):
        self._now = now
        self._earlier = earlier
        self._begin = min(_BEGIN, now())
        self._lost = 0.0

    def started(self) -> None:
        """All time so far is lost."""
        self._lost = self._now() - self._begin

    @contextlib.contextmanager
    def lost(self) -> Iterator[None]:
        """The time inside is lost."""
        begin = self._now()
        try:
            yield
        finally:
            self._lost += self._now() - begin

    def report(self) -> dict[str, float]:
        """The share, from 0 to 1, and the seconds that it is of."""
        life = self._now() - self._begin
        alive, useful = self._earlier.alive + life, self._earlier.useful + life - self._lost
        return {"goodput": useful / alive if alive > 0 else 0.0, "alive_seconds": alive}


class MetricWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard; only process 0 does.

    Started again at a step, it forgets what a killed run logged after that step, but for the time it
    took (`earlier`). In a bucket, where nothing can be appended, the log is written anew each time, and
    so is TensorBoard's file, which may lack the newest numbers until the next ones come.
    """

    def __init__(self, directory: Any, start_step: int = 0):
        self.earlier = Earlier()
        self._tensorboard: Any = None
        self._file: TextIO | None = None
        # Where TensorBoard's file, which its library writes to a local disk alone, is copied from.
        self._copied: tempfile.TemporaryDirectory[str] | None = None
        if jax.process_index() != 0:
            return
        self._path = epath.Path(directory)
        self._path.mkdir(parents=True, exist_ok=True)
        self._log = self._path / "metrics.jsonl"
        self._lines: list[str] = []
        if self._log.exists():
            lines = [line for line in self._log.read_text().splitlines() if _logged(line)]
            self._lines = [line for line in lines if _logged(line)["step"] <= start_step]
            self.earlier = Earlier.of([_logged(line) for line in lines], start_step)
            partial = self._path / "metrics.jsonl.partial"
            partial.write_text(_text(self._lines))
            partial.replace(self._log)
        if "://" in str(directory):
            self._copied = tempfile.TemporaryDirectory(prefix="glimmer-tensorboard-")
        else:
            self._file = self._log.open("a")
        # Here, because it imports torch wherever torch is installed, which takes seconds.
        import tensorboardX

        local = str(self._path) if self._copied is None else self._copied.name
        self._tensorboard = tensorboardX.SummaryWriter(
            local,
            purge_step=start_step + 1,
            # Its names are of the second: a copy must not replace that of an earlier life.
            filename_suffix=f".{start_step}",
        )

    def write(self, step: int, scalars: Mapping[str, float], prefix: str) -> None:
        """Logs `prefix/name` for each scalar at a step."""
        if jax.process_index() != 0:
            return
        named = {f"{prefix}/{name}": float(value) for name, value in scalars.items()}
        line = json.dumps({"step": step, **named})
        for name, value in named.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._file is not None:
            self._file.write(f"{line}\n")
            self._file.flush()
            return
        self._lines.append(line)
        self._log.write_text(_text(self._lines))
        self._tensorboard.flush()
        self._copy()

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._file is not None:
            self._file.close()
        if self._copied is not None:
            self._copy()
            self._copied.cleanup()

    def _copy(self) -> None:
        # What a thread of the library has still to write comes with the next copy, or the last.
        assert self._copied is not None
        for file in pathlib.Path(self._copied.name).iterdir():
            (self._path / file.name).write_bytes(file.read_bytes())


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _logged(line: str) -> dict[str, Any]:
    # The line that a kill cut in two belongs to no step.
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return found if "step" in found else {}


def print_once(line: str) -> None:
    """Prints a line on stderr, on process 0 only."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


class Progress:
    """Speed and time left, measured between reports."""

    def __init__(self, start_step: int, total_steps: int, batch_size: int):
        self._total_steps = total_steps
        self._batch_size = batch_size
        self.restart(start_step)

    def restart(self, step: int) -> None:
        """Starts measuring here; called after what should not count, compiling above all."""
        self._step, self._time = step, time.monotonic()

    def report(self, step: int, scalars: Mapping[str, float]) -> dict[str, float]:
        """Prints one line on stderr, starts measuring anew, returns the speeds as scalars."""
        seconds = max(time.monotonic() - self._time, 1e-9)
        steps_per_second = (step - self._step) / seconds
        left = (self._total_steps - step) / steps_per_second if steps_per_second else math.inf
        speeds = {
            "steps_per_second": steps_per_second,
            "examples_per_second": steps_per_second * self._batch_size,
        }
        print_once(
            f"step {step}/{self._total_steps}  {format_scalars(scalars)}  "
            f"{steps_per_second:.3g} steps/s  {speeds['examples_per_second']:.3g} examples/s  "
            f"{format_seconds(left)} left"
        )
        self.restart(step)
        return speeds


def format_scalars(scalars: Mapping[str, float]) -> str:
    """`{"loss": 2.34567}` -> `loss 2.346`."""
    return "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())


def format_seconds(seconds: float) -> str:
    """`7384.2` -> `2h03m`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
