"""Runs a sweep as an XManager experiment on this machine; each unit is a `python -m launch` of its own.

XManager's local executor starts the units and shows what they print; where the work is done is the
business of each unit's target, so one experiment covers all of them.
"""

import asyncio
import atexit
import contextlib
import os
import signal
import sys

from glimmer_jax import shipped
from glimmer_jax.main import DONE, START_AGAIN
from launch.sweep import Sweep


def run(sweep: Sweep, title: str) -> int:
    """Runs all units; one that fails does not stop the others.

    Args:
      sweep: the units.
      title: of the experiment.

    Returns:
      0; 1 if units failed; 42 after Ctrl-C or SIGTERM, which the units get as well.

    Raises:
      ValueError: XManager is not installed.
    """
    try:
        import xmanager.xm_local  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"Target xm needs XManager, but {error}. Install it with: pip install xmanager"
        ) from error
    # XManager ends its units when Python ends. What is registered before is called after that.
    atexit.register(_wait_for_children)
    from absl import flags

    flags.FLAGS(["launch"])  # XManager reads its settings there
    # asyncio ends in good order at Ctrl-C only.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        failed = asyncio.run(_run(sweep, title))
    except KeyboardInterrupt:
        return START_AGAIN
    for unit, failure in failed:
        print(f"launch: unit {unit} failed: {failure}", flush=True)
    return 1 if failed else DONE


async def _run(sweep: Sweep, title: str) -> list[tuple[int, Exception]]:
    from xmanager import xm, xm_local

    failed = []
    limit = asyncio.Semaphore(sweep.parallel)
    experiment = xm_local.create_experiment(experiment_title=title)
    spec = xm_local.Local.Spec()
    path = os.pathsep.join(filter(None, (str(shipped.root()), os.environ.get("PYTHONPATH"))))
    [executable] = experiment.package(
        [xm.binary(executor_spec=spec, path=sys.executable, env_vars={"PYTHONPATH": path})]
    )

    async def one(number: int, unit: tuple[str, ...]) -> None:
        async with limit:
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

    try:
        async with experiment:
            await asyncio.gather(*(one(*unit) for unit in enumerate(sweep.units, start=1)))
    except RuntimeError:
        # XManager tells of the first failed unit once more when it leaves the experiment.
        if not failed:
            raise
    return failed


def _wait_for_children() -> None:
    """So that units that save when they are ended have done so before the shell's prompt is back."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
