"""Interleaved measurement: each round runs every system once.

Load from other processes thus affects all systems equally. A run that shared the cores with other
processes is discarded and repeated in a later round.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.setting import DTYPES, Setting
from benchmarks.table import render
from glimmer_jax.runtime import compilation_cache

MIN_CPU_SHARE = 0.9  # of the work of all cores during a run
MAX_ROUNDS_PER_RUN = 4


class Worker:
    """A process of `benchmarks.worker`."""

    def __init__(self, system: str, dtype: str, setting: Setting):
        self.system, self.dtype = system, dtype
        arguments = json.dumps([system, dtype, dataclasses.asdict(setting)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # The processes share the device, so that none may preallocate its memory.
            env={
                compilation_cache.VARIABLE: compilation_cache.FOLDER,
                **os.environ,
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            },
        )
        self._answer()

    def request(self, action: str, passages: int) -> dict[str, Any]:
        """The worker's answer to `prepare` or `answer`. Raises RuntimeError if the process ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"action": action, "passages": passages}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            code = self._process.returncode
            raise RuntimeError(
                f"The process of {self.system} in {self.dtype} ended with {code}; its output is above."
            )
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class OneAtATime:
    """A `Worker` whose process lives only during a request: a training step takes up to 8 GB."""

    def __init__(self, system: str, dtype: str, setting: Setting):
        self.system, self.dtype, self._setting = system, dtype, setting

    def request(self, action: str, passages: int) -> dict[str, Any]:
        """As `Worker.request`; every process prepares first."""
        worker = Worker(self.system, self.dtype, self._setting)
        try:
            ready = worker.request("prepare", passages)
            return ready if action == "prepare" else worker.request(action, passages)
        finally:
            worker.close()

    def close(self) -> None:
        """Nothing is left to end."""


def measure_all(
    systems: Sequence[str],
    dtypes: Sequence[str] | None,
    setting: Setting,
    runs: int,
    path: pathlib.Path,
) -> None:
    """Measures systems at every number of passages, writes the rows as JSON, and prints the tables.

    Args:
      systems: each runs in one process per dtype.
      dtypes: None is all on a CPU, and bfloat16 on a GPU.
      setting: the shape of a question.
      runs: undisturbed runs per row.
      path: of the JSON file.
    """
    dtypes = dtypes or _default_dtypes()
    workers: list[Worker | OneAtATime] = []
    kind = OneAtATime if setting.training else Worker
    rows = []
    try:
        for system in systems:
            for dtype in dtypes:
                if dtype == "int8" and (system != "pytorch_fid" or setting.training):
                    print(f"no {system} in int8: only answers of pytorch_fid", flush=True)
                    continue
                print(f"starting {system} in {dtype}", flush=True)
                workers.append(kind(system, dtype, setting))
        for passages in setting.passages:
            rows += measure(workers, passages, runs, lambda line: print(line, flush=True))
            # After each size, so that an interrupted run keeps its results.
            path.write_text(json.dumps(rows, indent=1) + "\n")
            print(render(rows), flush=True)
    finally:
        for worker in workers:
            worker.close()


def _default_dtypes() -> Sequence[str]:
    # In another process, so that this one does not occupy the device.
    code = "import jax; print(jax.default_backend())"
    result = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    return DTYPES if result.stdout.strip() == "cpu" else ("bfloat16",)


def measure(
    workers: Sequence[Worker | OneAtATime], passages: int, runs: int, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row per worker, over `runs` undisturbed runs.

    Returns:
      `{system, dtype, passages, median_seconds, ...}`; `undisturbed_runs` is less than `runs` if the
      machine was too busy. If it is 0, the medians are over the least disturbed runs.
    """
    prepared = []
    for worker in workers:
        prepared.append(worker.request("prepare", passages))
        log(f"  {worker.system} {worker.dtype} is ready for {passages} passages")
    if len({ready["device"] == "cpu" for ready in prepared}) > 1:
        devices = {
            f"{w.system}: {ready['device']}" for w, ready in zip(workers, prepared, strict=True)
        }
        raise RuntimeError(
            f"JAX and PyTorch run on different kinds of device ({', '.join(sorted(devices))}) and cannot "
            "be compared. Install both for the same device, or select systems with --systems."
        )
    results: list[list[dict[str, Any]]] = [[] for _ in workers]
    for _ in range(runs * MAX_ROUNDS_PER_RUN):
        missing = [i for i, done in enumerate(results) if len(_undisturbed(done)) < runs]
        if not missing:
            break
        for i in missing:
            results[i].append(workers[i].request("answer", passages))
    return [
        _row(worker, passages, ready, done, runs)
        for worker, ready, done in zip(workers, prepared, results, strict=True)
    ]


def _undisturbed(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if run["cpu_share"] >= MIN_CPU_SHARE]


def _row(
    worker: Worker | OneAtATime,
    passages: int,
    ready: dict[str, Any],
    done: list[dict[str, Any]],
    runs: int,
) -> dict[str, Any]:
    undisturbed = _undisturbed(done)
    best = sorted(done, key=lambda run: -run["cpu_share"])[:runs]
    used = undisturbed or best
    return {
        "system": worker.system,
        "dtype": worker.dtype,
        "passages": passages,
        "median_seconds": statistics.median(run["seconds"] for run in used),
        "peak_bytes": max(run["peak_bytes"] for run in used),
        "undisturbed_runs": len(undisturbed),
        "discarded_runs": len(done) - len(used),
        "seconds": [round(run["seconds"], 4) for run in used],
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in used),
        "cpu_share": min(run["cpu_share"] for run in used),
        **ready,
    }
