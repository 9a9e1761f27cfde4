"""Progress lines: count, rate, time left and further facts, not too often."""

import math

import pytest

from glimmer_jax.runtime import progress
from glimmer_jax.runtime.progress import Progress, format_seconds, with_progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_at_most_one_line_every_few_seconds():
    clock, lines = Clock(), []
    counted = Progress("index", 100, "passages", emit=lines.append, every_seconds=10, clock=clock)
    for _ in range(50):
        clock.now += 1.0
        counted.advance()
    assert len(lines) == 5
    assert lines[0] == "index: 10 of 100 passages, 1 passages/s, 1m30s left"
    assert counted.rate == pytest.approx(1.0)


def test_details_and_totals_are_part_of_a_line():
    clock, lines = Clock(), []
    counted = Progress(
        "x", 4, "steps", details=lambda: f"{counted.totals['tokens']} tokens", emit=lines.append,
        clock=clock,
    )  # fmt: skip
    counted.advance(2, tokens=5)
    counted.advance(0, tokens=2)
    clock.now = 4.0
    counted.log("loss 2.5")
    assert lines == ["x: 2 of 4 steps, 0.5 steps/s, 7 tokens, loss 2.5, 4s left"]


def test_bytes_are_shown_as_gigabytes_and_an_unknown_total_is_left_out():
    clock, lines = Clock(), []
    Progress("x", 4 * 10**9, "bytes", done=10**9, emit=lines.append, clock=clock).log()
    unknown = Progress("x", None, "questions", emit=lines.append, clock=clock)
    clock.now = 2.0
    unknown.advance(3)
    unknown.log()
    assert lines == ["x: 1 of 4 GB, 0 MB/s, ? left", "x: 3 questions, 1.5 questions/s"]
    assert unknown.seconds_left == math.inf


def test_what_came_before_a_restart_does_not_count_in_the_rate():
    clock = Clock()
    counted = Progress("x", 10, "steps", clock=clock)
    clock.now = 100.0  # Compiles.
    counted.advance()
    counted.restart()
    clock.now = 102.0
    counted.advance(4)
    assert counted.rate == 2.0 and counted.seconds_left == 2.5


def test_items_pass_through_while_they_are_counted(monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    with caplog.at_level("INFO", "glimmer_jax"):
        assert list(with_progress([4, 5], "verify", "shards")) == [4, 5]
    assert "verify: 1 of 2 shards" in caplog.text and "verify: 2 of 2 shards" in caplog.text


@pytest.mark.parametrize(
    "seconds, text", [(7, "7s"), (67, "1m07s"), (7384.2, "2h03m"), (math.inf, "?")]
)
def test_durations_are_short(seconds, text):
    assert format_seconds(seconds) == text
