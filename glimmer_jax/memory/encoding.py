"""The computing half of the build: one shard's passages to one shard's arrays, in RAM.

The device encodes one batch while the host puts the last one in place, over the end of a shard too,
and a thread reads the next shard's passages; so nobody waits.

Which passages are encoded together, and at which length.

The composition of a batch depends on the passages of its shard alone: not on the number of devices
or processes, nor on what was built before. Together with a fixed program that makes every build
of a shard give the same bytes.

The encode step: every device runs the one-device program on rows of its own.

Passages are independent, so nothing needs to be split inside one: parameters are whole on every
device while it encodes, and rows are dealt out. So the bits do not depend on the mesh, also where
the model, left alone, would spread heads and feed-forward over devices and add up in another order.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glimmer_jax import codecs
from glimmer_jax.memory.manifest import Identity, Program
from glimmer_jax.memory.shard import Passages, Source, read_source
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.runtime.prefetch import ReadAhead
from glimmer_jax.runtime.progress import Progress


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


# Parameters and int32 tokens `[n, P]` -> states `[n, P, D]`; such as `GlimmerModel.memory_states`.
StatesFunction = Callable[[Any, jax.Array], jax.Array]
# int32 tokens `[n, P]` -> states `[n, P, D]`.
States = Callable[[np.ndarray], Any]
# int32 tokens `[n, P]` -> the codec's arrays `[n, P, *trailing]`, and bool `[n, P]`: whether all
# channels of a token were finite before they were encoded (an integer codec would hide it).
Encode = Callable[[np.ndarray], tuple[Mapping[str, Any], Any]]


def bind_encoder(memory_states: StatesFunction, params: Any, mesh: Mesh, codec: str) -> Encode:
    """`memory_states` and the codec as the build wants them, rows spread over all of `mesh`."""
    return _bind(encode_step(memory_states, mesh, codec), params, mesh)


def encode_step(memory_states: StatesFunction, mesh: Mesh, codec: str) -> Any:
    """`(params, tokens [n, P]) -> (codec's arrays, finite)`, jitted, rows spread over `mesh`."""

    def encode(params, tokens):
        states = memory_states(params, tokens)
        return encode_states(codec, states, params.get("memory_codebooks"))

    return _spread(encode, mesh)


def bind_states(memory_states: StatesFunction, params: Any, mesh: Mesh) -> States:
    """`memory_states` alone, for measuring what a codec loses."""
    return _bind(_spread(memory_states, mesh), params, mesh)


def encode_states(
    codec: str, states: jax.Array, codebooks: codecs.Arrays | None = None
) -> tuple[dict[str, jax.Array], jax.Array]:
    """States `[n, P, D]` -> the codec's arrays and which tokens are finite, before and after."""
    arrays = codecs.get(codec).encode(states, codebooks)
    finite = jnp.isfinite(states).all(-1)
    for array in arrays.values():
        if jnp.issubdtype(array.dtype, jnp.floating):
            finite &= jnp.isfinite(array).reshape(*finite.shape, -1).all(-1)
    return arrays, finite


def _spread(function: Callable[[Any, jax.Array], Any], mesh: Mesh) -> Any:
    rows = PartitionSpec(mesh.axis_names)
    spread = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=rows,
        # The model is not written for it: its scans start from values that are the same everywhere.
        check_vma=False,
    )
    # Parameters are an argument: as a constant they would be compiled in for every bucket.
    return jax.jit(spread)


def _bind(jitted: Callable[[Any, jax.Array], Any], params: Any, mesh: Mesh) -> Callable:
    placement = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def run(tokens: np.ndarray):
        return jitted(params, jax.device_put(tokens, placement))

    return run


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
    call: list[Group]
    encoded: Any
    last: bool  # of its shard


class Job:
    """The computing half: everything that stays the same from shard to shard."""

    def __init__(self, recipe: Recipe, passages: Passages, progress: Progress):
        self.recipe = recipe
        self.passages = passages
        self.progress = progress
        identity = recipe.identity
        self._specs = codecs.get(identity.codec).array_specs(identity.emb_dim)

    def compute(self, shards: Iterable[tuple[str, np.ndarray]]) -> Iterator[Content]:
        """Encodes shards, given as name and rows, in order.

        Raises:
          ValueError: the encoder gave NaN or infinity, or arrays that are not the codec's.
          StopRequested: asked to stop between two batches; the shard is dropped.
        """
        running: deque[_Running] = deque()
        for content in ReadAhead(self._read)(shards):
            program = self.recipe.program
            batches = groups(content.source.lengths, program.rows, program.buckets)
            planned = list(calls(batches, self.recipe.devices))
            for number, call in enumerate(planned, 1):
                STOP.poll(
                    f"Stopped before shard {content.name} was complete; finished shards are kept. "
                    "Run the same command again to resume."
                )
                encoded = self.recipe.encode(self._tokens(content.source, call))
                running.append(_Running(content, call, encoded, number == len(planned)))
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

    def _tokens(self, source: Source, call: list[Group]) -> np.ndarray:
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
        computed = self.recipe.devices * rows * bucket
        self.progress.advance(passages, tokens=tokens, computed=computed)
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
