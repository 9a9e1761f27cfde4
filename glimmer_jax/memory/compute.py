"""The computing half of the build: one shard's passages to one shard's arrays, in RAM.

The device encodes one batch while the host puts the last one in place, over the end of a shard too,
and a thread reads the next shard's passages; so nobody waits.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from glimmer_jax import codecs
from glimmer_jax.memory import batches
from glimmer_jax.memory.encoder import Encode
from glimmer_jax.memory.identity import Identity, Program
from glimmer_jax.memory.progress import Progress
from glimmer_jax.memory.read_ahead import ReadAhead
from glimmer_jax.memory.source import Passages, Source, read_source
from glimmer_jax.preemption import Preempted, Watcher


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How passages become memory: the encode step, and what is recorded of it."""

    encode: Encode
    identity: Identity
    program: Program
    devices: int = 1  # that `encode` spreads its rows over, `program.rows` on each
    codebooks: codecs.Arrays | None = None  # of the codec, where it has any

    def __post_init__(self):
        if self.program.buckets[-1] != self.identity.max_length:
            raise ValueError(
                f"The last length bucket must be max_length={self.identity.max_length}; got "
                f"buckets {self.program.buckets}."
            )
        if self.devices < 1:
            raise ValueError(f"devices must be at least 1; got {self.devices}.")


@dataclasses.dataclass(frozen=True)
class Content:
    """A computed shard, in RAM."""

    name: str
    source: Source
    offsets: np.ndarray  # int64 [n + 1], where each passage's tokens begin
    arrays: dict[str, np.ndarray]  # the codec's, `[tokens, *trailing]`


@dataclasses.dataclass(frozen=True)
class _Running:
    """A batch that the device encodes."""

    content: Content  # what it belongs to
    call: list[batches.Group]
    encoded: Any
    last: bool  # of its shard


class Job:
    """The computing half: everything that stays the same from shard to shard."""

    def __init__(self, recipe: Recipe, passages: Passages, watcher: Watcher, progress: Progress):
        self.recipe = recipe
        self.passages = passages
        self.watcher = watcher
        self.progress = progress
        identity = recipe.identity
        self._specs = codecs.get(identity.codec).array_specs(identity.emb_dim)

    def compute(self, shards: Iterable[tuple[str, np.ndarray]]) -> Iterator[Content]:
        """Encodes shards, given as name and rows, in order.

        Raises:
          ValueError: the encoder gave NaN or infinity, or arrays that are not the codec's.
          Preempted: asked to stop between two batches; the shard is dropped.
        """
        running: deque[_Running] = deque()
        for content in ReadAhead(self._read)(shards):
            program = self.recipe.program
            groups = batches.groups(content.source.lengths, program.rows, program.buckets)
            calls = list(batches.calls(groups, self.recipe.devices))
            for number, call in enumerate(calls, 1):
                if self.watcher.requested:
                    raise Preempted(
                        f"Stopped before shard {content.name} was complete; finished shards are "
                        "kept. Run the same command again to go on."
                    )
                encoded = self.recipe.encode(self._tokens(content.source, call))
                running.append(_Running(content, call, encoded, number == len(calls)))
                # One batch ahead: the device works on this one while the last is put in place.
                if len(running) > 1:
                    yield from self._place(running.popleft())
        while running:
            yield from self._place(running.popleft())

    def _read(self, item: tuple[str, np.ndarray]) -> Content:
        name, rows = item
        source = read_source(self.passages, rows, self.recipe.identity.max_length)
        offsets = np.concatenate([[0], np.cumsum(source.lengths, dtype=np.int64)])
        # Room only: nothing is in RAM before it is put there.
        arrays = {
            name: np.empty((offsets[-1], *trailing), dtype)
            for name, (trailing, dtype) in self._specs.items()
        }
        return Content(name, source, offsets, arrays)

    def _tokens(self, source: Source, call: list[batches.Group]) -> np.ndarray:
        """int32 `[devices * rows, P]`."""
        bucket = call[0].bucket
        tokens = np.zeros((self.recipe.devices, self.recipe.program.rows, bucket), np.int32)
        for device, group in enumerate(call):
            tokens[device, : len(group.positions)] = source.tokens[group.positions, :bucket]
        return tokens.reshape(-1, bucket)

    def _place(self, done: _Running) -> Iterator[Content]:
        """Puts a batch in place; gives its shard if that is complete now."""
        content, bucket, rows = done.content, done.call[0].bucket, self.recipe.program.rows
        host = {name: np.asarray(value) for name, value in done.encoded[0].items()}
        self._check_arrays(host, bucket)
        finite = np.asarray(done.encoded[1])
        tokens = 0
        for device, group in enumerate(done.call):
            for slot, position in enumerate(group.positions, device * rows):
                begin, end = content.offsets[position], content.offsets[position + 1]
                if not finite[slot, : end - begin].all():
                    raise ValueError(
                        "The memory encoder gave NaN or infinity for passage "
                        f"{int(content.source.ids[position])}. Check the checkpoint (did its "
                        "training diverge?) and the activation dtype."
                    )
                for name, value in host.items():
                    content.arrays[name][begin:end] = value[slot, : end - begin]
                tokens += int(end - begin)
        passages = sum(len(group.positions) for group in done.call)
        self.progress.encoded(passages, tokens, self.recipe.devices * rows * bucket)
        if done.last:
            yield content

    def _check_arrays(self, host: dict[str, np.ndarray], bucket: int) -> None:
        n = self.recipe.devices * self.recipe.program.rows
        wanted = {name: ((n, bucket, *t), np.dtype(d)) for name, (t, d) in self._specs.items()}
        got = {name: (value.shape, value.dtype) for name, value in host.items()}
        if wanted != got:
            raise ValueError(
                f"Codec {self.recipe.identity.codec!r} stores {wanted} for this batch, and the "
                f"encoder returned {got}. Build with the model's own codec, emb_dim and batch size."
            )
