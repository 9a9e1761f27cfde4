"""The computing half of the build: one shard's passages to one shard's arrays, in RAM.

The device encodes one batch while the host puts the last one in place, so neither waits.
"""

import dataclasses
from collections import deque
from typing import Any

import numpy as np

from glimmer_jax import codecs
from glimmer_jax.memory import batches
from glimmer_jax.memory.encoder import Encode
from glimmer_jax.memory.identity import Identity, Program
from glimmer_jax.memory.progress import Progress
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

    source: Source
    offsets: np.ndarray  # int64 [n + 1], where each passage's tokens begin
    arrays: dict[str, np.ndarray]  # the codec's, `[tokens, *trailing]`


class Job:
    """The computing half: everything that stays the same from shard to shard."""

    def __init__(self, recipe: Recipe, passages: Passages, watcher: Watcher, progress: Progress):
        self.recipe = recipe
        self.passages = passages
        self.watcher = watcher
        self.progress = progress
        identity = recipe.identity
        self._specs = codecs.get(identity.codec).array_specs(identity.emb_dim)

    def compute(self, name: str, rows: np.ndarray) -> Content:
        """Encodes the passages `rows` as shard `name`.

        Raises:
          ValueError: the encoder gave NaN or infinity, or arrays that are not the codec's.
          Preempted: asked to stop between two batches; the shard is dropped.
        """
        recipe, program = self.recipe, self.recipe.program
        source = read_source(self.passages, rows, recipe.identity.max_length)
        offsets = np.concatenate([[0], np.cumsum(source.lengths, dtype=np.int64)])
        arrays = {
            name: np.empty((offsets[-1], *trailing), dtype)
            for name, (trailing, dtype) in self._specs.items()
        }
        content = Content(source, offsets, arrays)
        running: deque[tuple[list[batches.Group], Any]] = deque()
        groups = batches.groups(source.lengths, program.rows, program.buckets)
        for call in batches.calls(groups, recipe.devices):
            if self.watcher.requested:
                raise Preempted(
                    f"Stopped before shard {name} was complete; finished shards are kept. Run the "
                    "same command again to go on."
                )
            tokens = np.zeros((recipe.devices, program.rows, call[0].bucket), np.int32)
            for device, group in enumerate(call):
                taken = source.tokens[group.positions, : group.bucket]
                tokens[device, : len(group.positions)] = taken
            running.append((call, recipe.encode(tokens.reshape(-1, call[0].bucket))))
            # One batch ahead: the device works on this one while the last is put in place.
            if len(running) > 1:
                self._place(*running.popleft(), content)
        while running:
            self._place(*running.popleft(), content)
        return content

    def _place(self, call: list[batches.Group], encoded: Any, content: Content) -> None:
        bucket, rows = call[0].bucket, self.recipe.program.rows
        host = {name: np.asarray(value) for name, value in encoded[0].items()}
        self._check_arrays(host, bucket)
        finite = np.asarray(encoded[1])
        tokens = 0
        for device, group in enumerate(call):
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
        computed = self.recipe.devices * rows * bucket
        self.progress.encoded(sum(len(group.positions) for group in call), tokens, computed)

    def _check_arrays(self, host: dict[str, np.ndarray], bucket: int) -> None:
        n = self.recipe.devices * self.recipe.program.rows
        wanted = {name: ((n, bucket, *t), np.dtype(d)) for name, (t, d) in self._specs.items()}
        got = {name: (value.shape, value.dtype) for name, value in host.items()}
        if wanted != got:
            raise ValueError(
                f"Codec {self.recipe.identity.codec!r} stores {wanted} for this batch, and the "
                f"encoder returned {got}. Build with the model's own codec, emb_dim and batch size."
            )
