"""Cycle counts from the compiler's schedules."""

import importlib.util

import pytest

from benchmarks import kernel_cycles

SCHEDULE = """Schedule analysis:
\ttotal scheduled bundles:    {total}
\tempty scheduled bundles:    15
\tnon empty scheduled bundles: {count}
\t%a = custom-call(%b), custom_call_target="{target}", op_name="jit(total)/{name}/pallas_call"
"""


def write(folder, number, count, name, target="tpu_custom_call"):
    text = SCHEDULE.format(total=count + 15, count=count, target=target, name=name)
    (folder / f"1-a-{number}-schedule-analysis_final_bundles.txt").write_text(text)


def test_bundles_of_both_kernels_are_read_and_other_programs_ignored(tmp_path):
    write(tmp_path, 1, 100, "jvp()")
    write(tmp_path, 2, 300, "transpose(jvp())")
    write(tmp_path, 3, 999, "jvp()", target="other")
    assert kernel_cycles.read_schedules(tmp_path) == {"forward": 100, "backward": 300}


def test_a_dump_without_a_kernel_is_rejected(tmp_path):
    write(tmp_path, 1, 100, "jvp()")
    with pytest.raises(ValueError, match=r"forward and a backward.*\['forward'\]"):
        kernel_cycles.read_schedules(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_compiler_schedules_both_kernels():
    found = kernel_cycles.cycles("v5e:2x2")
    # More than the matrix unit alone would take, and no more than ten times as much.
    assert 483 < found["forward"] < 4830 and 1209 < found["backward"] < 12090
