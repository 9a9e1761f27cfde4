"""Runs a sweep as an XManager experiment on this machine; each unit is a `python -m launch` command.

XManager's local executor starts the units and shows their output. Each unit's target decides where its
job runs, so that one experiment covers all targets.

XManager leaves its units running when it is killed. So they inherit a pipe as their input and stop when
its other end, which only this process holds, is closed on purpose or by its death.
"""

import asyncio
import os
import sys

from glimmer_jax import shipped
from glimmer_jax.runtime.exit_codes import BUG, DONE, RETRY
from glimmer_jax.runtime.preemption import stop_signals
from launch.processes import TIED, say
from launch.sweep import Sweep


def run(sweep: Sweep, title: str) -> int:
    """Runs all units; a failed unit does not stop the others.

    Args:
      sweep: the units.
      title: of the experiment.

    Returns:
      0; 1 if units failed; 42 after Ctrl-C, SIGTERM or SIGHUP, which stop the units.

    Raises:
      ValueError: XManager is not installed.
    """
    try:
        import xmanager.xm_local  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"Target xm needs XManager, but {error}. Install it, in the checkout, with: "
            "pip install -c constraints.txt '.[xm]' (without the constraints pip searches very long)"
        ) from error
    from absl import flags

    flags.FLAGS(["launch"])  # XManager reads its settings there
    read_end, write_end = os.pipe()
    os.dup2(read_end, 0)
    os.close(read_end)
    stopped, failed = asyncio.run(_run(sweep, title, write_end))
    for unit, failure in failed:
        say(f"launch: unit {unit} failed: {failure}")
    if stopped:
        return RETRY
    return BUG if failed else DONE


async def _run(
    sweep: Sweep, title: str, write_end: int
) -> tuple[bool, list[tuple[int, Exception]]]:
    """Whether it was asked to stop, and the units that failed."""
    from xmanager import xm, xm_local

    failed: list[tuple[int, Exception]] = []
    stopping = asyncio.Event()
    limit = asyncio.Semaphore(sweep.parallel)
    experiment = xm_local.create_experiment(experiment_title=title)
    path = os.pathsep.join(filter(None, (str(shipped.root()), os.environ.get("PYTHONPATH"))))
    python = xm.binary(
        executor_spec=xm_local.Local.Spec(),
        path=sys.executable,
        env_vars={"PYTHONPATH": path, TIED: "1"},
    )
    [executable] = experiment.package([python])

    def stop() -> None:
        if not stopping.is_set():
            stopping.set()
            os.close(write_end)

    async def run_unit(number: int, unit: tuple[str, ...]) -> None:
        async with limit:
            if stopping.is_set():
                return
            job = xm.Job(
                executable,
                executor=xm_local.Local(),
                name=f"unit{number}",
                args=["-m", "launch", *unit],
            )
            work_unit = await experiment.add(job)
            try:
                await work_unit.wait_until_complete()
            except xm.ExperimentUnitError as error:
                failed.append((number, error))

    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        async with experiment:
            await asyncio.gather(*(run_unit(*unit) for unit in enumerate(sweep.units, start=1)))
    except RuntimeError:
        # XManager raises the first unit's failure once more at the end of the experiment.
        if not failed:
            raise
    return stopping.is_set(), failed
