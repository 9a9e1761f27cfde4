"""Eight virtual CPU devices, warnings are errors (pyproject.toml), rank promotion raises.

`GLIMMER_TEST_PLATFORM=cuda` puts the tests of `gpu_test.py` on the GPUs of this machine.
"""

import os

# Before jax is imported by anybody.
os.environ["JAX_PLATFORMS"] = os.environ.get("GLIMMER_TEST_PLATFORM", "cpu")
# Tests run tiny programs a few times: compiling them is the cost, and without optimisation it halves.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

from glimmer_jax.runtime.preemption import STOP

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def no_stop_requested():
    """The stop signal belongs to the process: no test inherits that of another."""
    yield
    STOP.clear()


PARITY_REQUIRED = os.environ.get("GLIMMER_REQUIRE_PARITY") == "1"


def _refuse_skip(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"A parity test may not be skipped (GLIMMER_REQUIRE_PARITY=1): {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    is_parity = "parity" in item.nodeid or item.get_closest_marker("parity")
    return _refuse_skip(report) if PARITY_REQUIRED and is_parity else report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    return _refuse_skip(report) if PARITY_REQUIRED and "parity" in collector.nodeid else report
