"""Encoding: the passages of a shard to the arrays of a shard, in RAM.

Three things decide the bytes of a shard, and neither the number of devices or processes nor earlier
shards are among them:

- which passages share a batch: `groups` sorts the passages of the shard by length;
- the program of one device: `encode_step` runs it on every device of the mesh, parameters replicated and
  rows distributed, so the model is not partitioned and sums have one order on every mesh;
- the parameters.

`ShardEncoder` keeps the devices busy: they encode one batch while the host stores the previous one, also
across the border of two shards, and a thread reads the passages of the next shard.
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
from glimmer_jax.memory.manifest import EncodeProgram, Identity
from glimmer_jax.memory.source import Passages, Source, read_source
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.runtime.prefetch import ReadAhead
from glimmer_jax.runtime.progress import Progress

# Parameters and int32 tokens `[n, P]` -> states `[n, P, D]`; such as `GlimmerModel.memory_states`.
StatesFunction = Callable[[Any, jax.Array], jax.Array]
# int32 tokens `[n, P]` -> states `[n, P, D]`.
States = Callable[[np.ndarray], Any]
# int32 tokens `[n, P]` -> the codec's arrays `[n, P, *trailing]`, and bool `[n, P]`: whether all
# channels of a token were finite before they were encoded (an integer codec would hide it).
Encode = Callable[[np.ndarray], tuple[Mapping[str, Any], Any]]


@dataclasses.dataclass(frozen=True)
class Group:
    """The batch of one device."""

    positions: np.ndarray  # int64 [<= rows], positions of the passages in their shard
    bucket: int  # tokens the batch is padded to


def default_buckets(max_length: int, step: int = 32) -> tuple[int, ...]:
    """Multiples of `step` below `max_length`, and `max_length` itself."""
    return (*range(step, max_length, step), max_length)


def groups(lengths: np.ndarray, rows: int, buckets: Sequence[int]) -> list[Group]:
    """Groups of `rows` passages of similar length, shortest first; only the last may be smaller.

    Args:
      lengths: int `[n]`, tokens of each passage of the shard, at most buckets[-1].
      rows: passages in the batch of one device.
      buckets: increasing lengths; a group gets the smallest that holds its longest passage.
    """
    order = np.argsort(lengths, kind="stable")
    result = []
    for start in range(0, len(order), rows):
        positions = order[start : start + rows]
        longest = int(lengths[positions[-1]])
        result.append(Group(positions, int(buckets[int(np.searchsorted(buckets, longest))])))
    return result


def calls(all_groups: Sequence[Group], devices: int) -> Iterator[list[Group]]:
    """Groups of the same bucket, one per device; fewer at the end of a bucket."""
    pending: list[Group] = []
    for group in all_groups:
        if pending and (len(pending) == devices or pending[0].bucket != group.bucket):
            yield pending
            pending = []
        pending.append(group)
    if pending:
        yield pending


def padded(tokens: np.ndarray, rows: int) -> np.ndarray:
    """Tokens `[n, P]` of a group as int32 `[rows, P]`, filled up with empty passages."""
    batch = np.zeros((rows, tokens.shape[1]), np.int32)
    batch[: len(tokens)] = tokens
    return batch


def bind_encoder(memory_states: StatesFunction, params: Any, mesh: Mesh, codec: str) -> Encode:
    """`memory_states` followed by the codec, rows distributed over all devices of `mesh`."""
    return _bind(encode_step(memory_states, mesh, codec), params, mesh)


def encode_step(memory_states: StatesFunction, mesh: Mesh, codec: str) -> Any:
    """`(params, tokens [n, P]) -> (codec's arrays, finite)`, jitted, rows distributed over `mesh`."""

    def encode(params, tokens):
        states = memory_states(params, tokens)
        return encode_states(codec, states, params.get("memory_codebooks"))

    return _distribute(encode, mesh)


def bind_states(memory_states: StatesFunction, params: Any, mesh: Mesh) -> States:
    """`memory_states` without a codec, rows distributed over all devices of `mesh`."""
    return _bind(_distribute(memory_states, mesh), params, mesh)


def encode_states(
    codec: str, states: jax.Array, codebooks: codecs.Arrays | None = None
) -> tuple[dict[str, jax.Array], jax.Array]:
    """States `[n, P, D]` -> the codec's arrays, and which tokens are finite in both."""
    arrays = codecs.get(codec).encode(states, codebooks)
    finite = jnp.isfinite(states).all(-1)
    for array in arrays.values():
        if jnp.issubdtype(array.dtype, jnp.floating):
            finite &= jnp.isfinite(array).reshape(*finite.shape, -1).all(-1)
    return arrays, finite


def _distribute(function: Callable[[Any, jax.Array], Any], mesh: Mesh) -> Any:
    rows = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=rows,
        # The model's scans start from values that are replicated, which the check would reject.
        check_vma=False,
    )
    # Parameters are an argument: as a constant they would be compiled into the program of each bucket.
    return jax.jit(mapped)


def _bind(jitted: Callable[[Any, jax.Array], Any], params: Any, mesh: Mesh) -> Callable:
    placement = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def run(tokens: np.ndarray):
        return jitted(params, jax.device_put(tokens, placement))

    return run


@dataclasses.dataclass(frozen=True)
class MemoryEncoder:
    """How passages become memory: the encode step, and what the store records about it."""

    encode: Encode
    identity: Identity
    program: EncodeProgram
    devices: int = 1  # `encode` distributes its rows over them, `program.rows` each
    codebooks: codecs.Arrays | None = None  # of the codec, if it has any
    # Whether `encode` returns one vector per passage, `[n, 1, D]`, in place of one state per token.
    pooled: bool = False

    def __post_init__(self):
        if self.program.buckets[-1] != self.identity.max_length:
            raise ValueError(
                f"The last length bucket must be max_length={self.identity.max_length}; got "
                f"buckets {self.program.buckets}."
            )
        if self.devices < 1:
            raise ValueError(f"devices must be at least 1; got {self.devices}.")

    @property
    def array_specs(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Trailing shape and dtype of each stored array."""
        return codecs.get(self.identity.codec).array_specs(self.identity.emb_dim)

    def stored(self, lengths: Any) -> Any:
        """Tokens that are stored of passages, or in a batch, of `lengths` tokens."""
        return np.ones_like(lengths) if self.pooled else lengths


@dataclasses.dataclass(frozen=True)
class ShardContent:
    """An encoded shard, in RAM."""

    name: str
    source: Source
    offsets: np.ndarray  # int64 [n + 1], first token of each passage
    arrays: dict[str, np.ndarray]  # the codec's, `[tokens, *trailing]`


@dataclasses.dataclass(frozen=True)
class _RunningCall:
    """Batches that the devices encode."""

    content: ShardContent  # the shard they belong to
    groups: list[Group]
    encoded: Any
    last: bool  # of its shard


class ShardEncoder:
    """Encodes the shards of one corpus with one encoder."""

    def __init__(self, encoder: MemoryEncoder, passages: Passages, progress: Progress):
        self.encoder = encoder
        self.passages = passages
        self.progress = progress

    def compute(self, shards: Iterable[tuple[str, np.ndarray]]) -> Iterator[ShardContent]:
        """Encodes shards, given as name and rows, in order.

        Raises:
          ValueError: the encoder returned NaN or infinity, or arrays that are not the codec's.
          StopRequested: a stop was requested between two batches; the current shard is dropped.
        """
        running: deque[_RunningCall] = deque()
        for content in ReadAhead(self._read)(shards):
            program = self.encoder.program
            batches = groups(content.source.lengths, program.rows, program.buckets)
            planned = list(calls(batches, self.encoder.devices))
            for number, call in enumerate(planned, 1):
                STOP.poll(
                    f"Stopped before shard {content.name} was complete; finished shards are kept. "
                    "Rerun the same command to resume."
                )
                encoded = self.encoder.encode(self._tokens(content.source, call))
                running.append(_RunningCall(content, call, encoded, number == len(planned)))
                # One call ahead: the devices work on it while the previous one is stored.
                if len(running) > 1:
                    yield from self._store(running.popleft())
        while running:
            yield from self._store(running.popleft())

    def _read(self, item: tuple[str, np.ndarray]) -> ShardContent:
        name, rows = item
        source = read_source(self.passages, rows, self.encoder.identity.max_length)
        lengths = self.encoder.stored(source.lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        arrays = {
            name: np.empty((offsets[-1], *trailing), dtype)
            for name, (trailing, dtype) in self.encoder.array_specs.items()
        }
        return ShardContent(name, source, offsets, arrays)

    def _tokens(self, source: Source, call: list[Group]) -> np.ndarray:
        """int32 `[devices * rows, P]`."""
        bucket = call[0].bucket
        tokens = np.zeros((self.encoder.devices, self.encoder.program.rows, bucket), np.int32)
        for device, group in enumerate(call):
            tokens[device, : len(group.positions)] = source.tokens[group.positions, :bucket]
        return tokens.reshape(-1, bucket)

    def _store(self, done: _RunningCall) -> Iterator[ShardContent]:
        """Copies encoded batches into the arrays of their shard; yields the shard if complete."""
        content, bucket, rows = done.content, done.groups[0].bucket, self.encoder.program.rows
        host = {name: np.asarray(value) for name, value in done.encoded[0].items()}
        self._check_arrays(host, bucket)
        finite = np.asarray(done.encoded[1])
        tokens = 0
        for device, group in enumerate(done.groups):
            tokens += int(content.source.lengths[group.positions].sum())
            for slot, position in enumerate(group.positions, device * rows):
                begin, end = content.offsets[position], content.offsets[position + 1]
                if not finite[slot, : end - begin].all():
                    raise ValueError(
                        "The encoder gave NaN or infinity for passage "
                        f"{int(content.source.ids[position])}. Check the checkpoint (did its "
                        "training diverge?) and the activation dtype."
                    )
                for name, value in host.items():
                    content.arrays[name][begin:end] = value[slot, : end - begin]
        passages = sum(len(group.positions) for group in done.groups)
        computed = self.encoder.devices * rows * bucket
        self.progress.advance(passages, tokens=tokens, computed=computed)
        if done.last:
            yield content

    def _check_arrays(self, host: dict[str, np.ndarray], bucket: int) -> None:
        n, stored = (
            self.encoder.devices * self.encoder.program.rows,
            int(self.encoder.stored(bucket)),
        )
        expected = {
            name: ((n, stored, *trailing), np.dtype(dtype))
            for name, (trailing, dtype) in self.encoder.array_specs.items()
        }
        got = {name: (value.shape, value.dtype) for name, value in host.items()}
        if expected != got:
            raise ValueError(
                f"Codec {self.encoder.identity.codec!r} stores {expected} for this batch, but the "
                f"encoder returned {got}. Build with the model's own codec, emb_dim and batch size."
            )
