"""Runs one system in its own process, on request.

Reads lines of JSON, `{"action": "prepare" | "answer", "passages": K}`, and writes the measurements.
"""

import contextlib
import json
import os
import pathlib
import resource
import sys
import time
from typing import Any

from benchmarks.peaks import bound_seconds
from benchmarks.setting import Setting
from glimmer_jax.runtime.host_memory import keep_freed_memory


def main() -> None:
    """Answers requests, one JSON object per line, until standard input ends."""
    # Standard output carries the results; output of libraries goes to standard error.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    system, dtype, setting = json.loads(sys.argv[1])
    setting = Setting(**setting)
    # As `glimmer` does. PyTorch is as fast without.
    keep_freed_memory()
    if hasattr(os, "sched_setaffinity"):
        # XLA uses as many threads as the process may use cores.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[: setting.threads])
    with contextlib.closing(_load(system, dtype, setting)) as worker:
        channel.write(json.dumps({"ready": True}) + "\n")
        for line in sys.stdin:
            request = json.loads(line)
            action = {"prepare": _prepare, "answer": _answer}[request["action"]]
            channel.write(json.dumps(action(worker, request["passages"])) + "\n")


def _load(system: str, dtype: str, setting: Setting) -> Any:
    if system == "pytorch_fid":
        from benchmarks import torch_fid

        kind = torch_fid.TorchTraining if setting.training else torch_fid.TorchFid
        return kind(system, dtype, setting)
    if setting.training:
        from benchmarks.jax_training import JaxTraining

        return JaxTraining(system, dtype, setting)
    from benchmarks.jax_systems import JaxSystem

    return JaxSystem(system, dtype, setting)


def _prepare(worker: Any, passages: int) -> dict[str, Any]:
    worker.prepare(passages)
    flops, peaks = worker.flops(passages), worker.peaks()
    bound = bound_seconds(flops, worker.decoder_bytes, worker.setting.answer, peaks)
    return {"flops": flops, "bound_seconds": bound, **peaks, **worker.details}


def _answer(worker: Any, passages: int) -> dict[str, Any]:
    _reset_peak_rss()
    worker.reset_peak()
    busy, cpu, start = _busy_seconds(), time.process_time(), time.perf_counter()
    worker.answer(passages)
    seconds = time.perf_counter() - start
    cpu, busy = time.process_time() - cpu, _busy_seconds() - busy
    on_device = worker.peak_bytes()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        # Of the work of all cores in the meantime. A GPU leaves them idle.
        "cpu_share": min(cpu / busy, 1.0) if busy > 0 and on_device is None else 1.0,
        "peak_bytes": _peak_rss() if on_device is None else on_device,
    }


def _busy_seconds() -> float:
    """Busy seconds of all cores so far, including time stolen by the host."""
    try:
        first = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, first[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _reset_peak_rss() -> None:
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def _peak_rss() -> int:
    """Peak RAM since `_reset_peak_rss`, in bytes, weights included."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
