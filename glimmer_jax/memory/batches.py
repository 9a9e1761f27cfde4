"""Which passages are encoded together, and at which length.

The composition of a batch depends on the passages of its shard alone: not on the number of devices
or processes, nor on what was built before. Together with a fixed program that makes every build
of a shard give the same bytes.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Group:
    """One device's batch."""

    positions: np.ndarray  # int64 [<= rows], passages counted from the start of the shard
    bucket: int  # tokens the batch is padded to


def default_buckets(max_length: int, step: int = 32) -> tuple[int, ...]:
    """Multiples of `step` up to `max_length`, and `max_length` itself."""
    return (*range(step, max_length, step), max_length)


def groups(lengths: np.ndarray, rows: int, buckets: Sequence[int]) -> list[Group]:
    """Groups of `rows` passages of similar length, shortest first; only the last is partial.

    Args:
      lengths: int `[n]`, tokens of each passage of the shard, at most buckets[-1].
      rows: passages a device encodes at once.
      buckets: increasing lengths; a group takes the smallest that holds its longest passage.
    """
    order = np.argsort(lengths, kind="stable")
    result = []
    for start in range(0, len(order), rows):
        positions = order[start : start + rows]
        longest = int(lengths[positions[-1]])
        result.append(Group(positions, int(buckets[int(np.searchsorted(buckets, longest))])))
    return result


def padded(tokens: np.ndarray, rows: int) -> np.ndarray:
    """Tokens `[n, P]` of a group as int32 `[rows, P]`, filled up with empty passages."""
    batch = np.zeros((rows, tokens.shape[1]), np.int32)
    batch[: len(tokens)] = tokens
    return batch


def calls(all_groups: Sequence[Group], devices: int) -> Iterator[list[Group]]:
    """Groups of one bucket, one for each device; fewer where the bucket has no more."""
    pending: list[Group] = []
    for group in all_groups:
        if pending and (len(pending) == devices or pending[0].bucket != group.bucket):
            yield pending
            pending = []
        pending.append(group)
    if pending:
        yield pending
