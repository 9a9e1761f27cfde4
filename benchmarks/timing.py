"""Systems side by side: each round asks every one for an answer, one after the other.

What the machine does meanwhile then strikes all of them alike. A run that had to share the cores
with somebody is thrown away and made again in a later round.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.setting import Setting

LEAST_SHARE = 0.9  # of the work of all cores during a run
ROUNDS_FOR_ONE = 4  # rounds at most, for each run that is wanted


class Worker:
    """A process of `benchmarks.worker`."""

    def __init__(self, system: str, dtype: str, setting: Setting):
        self.system, self.dtype = system, dtype
        given = json.dumps([system, dtype, dataclasses.asdict(setting)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # All of them share the device: none may take its memory before it needs it.
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        self._answer()

    def ask(self, do: str, passages: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "passages": passages}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            code = self._process.returncode
            raise RuntimeError(
                f"The process of {self.system} in {self.dtype} ended with {code}; its last words "
                "are above."
            )
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def measure(
    workers: Sequence[Worker], passages: int, runs: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each worker, all with `runs` runs of their own, or flagged.

    Returns:
      `{system, dtype, passages, median_seconds, ...}`; `undisturbed_runs` is less than `runs` where the
      machine was never quiet for long enough; where it is 0, the medians are over the least disturbed.
    """
    prepared = []
    for worker in workers:
        prepared.append(worker.ask("prepare", passages))
        say(f"  {worker.system} {worker.dtype} is ready for {passages} passages")
    if len({ready["device"] == "cpu" for ready in prepared}) > 1:
        devices = {
            f"{w.system}: {ready['device']}" for w, ready in zip(workers, prepared, strict=True)
        }
        raise RuntimeError(
            f"JAX and PyTorch work on different kinds of device ({', '.join(sorted(devices))}), which is "
            "no comparison. Install both for the same one, or leave some out with --systems."
        )
    made: list[list[dict[str, Any]]] = [[] for _ in workers]
    for _ in range(runs * ROUNDS_FOR_ONE):
        missing = [i for i, done in enumerate(made) if len(_quiet(done)) < runs]
        if not missing:
            break
        for i in missing:
            made[i].append(workers[i].ask("answer", passages))
    return [
        _row(worker, passages, ready, done, runs)
        for worker, ready, done in zip(workers, prepared, made, strict=True)
    ]


def _quiet(done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in done if one["cpu_share"] >= LEAST_SHARE]


def _row(
    worker: Worker, passages: int, ready: dict[str, Any], done: list[dict[str, Any]], runs: int
) -> dict[str, Any]:
    quiet = _quiet(done)
    best = sorted(done, key=lambda one: -one["cpu_share"])[:runs]
    used = quiet or best
    return {
        "system": worker.system,
        "dtype": worker.dtype,
        "passages": passages,
        "median_seconds": statistics.median(one["seconds"] for one in used),
        "peak_bytes": max(one["peak_bytes"] for one in used),
        "undisturbed_runs": len(quiet),
        "discarded_runs": len(done) - len(used),
        "seconds": [round(one["seconds"], 4) for one in used],
        "cpu_seconds": statistics.median(one["cpu_seconds"] for one in used),
        "cpu_share": min(one["cpu_share"] for one in used),
        **ready,
    }
