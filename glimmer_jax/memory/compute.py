"""The computing half of the build: one shard's passages to one shard's arrays, in RAM.

The device encodes one batch while the host puts the last one in place, so neither waits.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from glimmer_jax import codecs
from glimmer_jax.memory import batches, resume
from glimmer_jax.memory.manifest import Identity, Program
from glimmer_jax.memory.progress import Progress
from glimmer_jax.preemption import Preempted, Watcher

Encode = Callable[[np.ndarray], Mapping[str, Any]]


class Passages(Protocol):
    """What the build reads; see `glimmer_jax.passages`."""

    ids: np.ndarray  # int64 [n]

    def __len__(self) -> int: ...
    def lengths(self, rows: np.ndarray) -> np.ndarray: ...
    def tokens(self, rows: np.ndarray, length: int) -> np.ndarray: ...
    def text(self, row: int) -> Mapping[str, Any]: ...


def bind_encoder(
    encode_memory: Callable[[Any, jax.Array], Any], params: Any, mesh: jax.sharding.Mesh
) -> Encode:
    """`encode_memory(params, tokens)` as the build wants it, batches spread over all of `mesh`."""
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    # Parameters are an argument: as a constant they would be compiled in for every bucket.
    jitted = jax.jit(encode_memory, out_shardings=rows)

    def encode(tokens: np.ndarray):
        with jax.set_mesh(mesh):
            return jitted(params, jax.device_put(tokens, rows))

    return encode


@dataclasses.dataclass(frozen=True)
class Content:
    """A computed shard, in RAM."""

    rows: np.ndarray
    offsets: np.ndarray
    truncated: int
    source_sha256: str
    titles: list[str]
    arrays: dict[str, np.ndarray]


class Job:
    """The computing half: everything that stays the same from shard to shard."""

    def __init__(
        self,
        encode: Encode,
        passages: Passages,
        identity: Identity,
        program: Program,
        devices: int,
        watcher: Watcher,
        progress: Progress,
    ):
        self.encode = encode
        self.passages = passages
        self.identity = identity
        self.program = program
        self.devices = devices
        self.watcher = watcher
        self.progress = progress
        self.specs = codecs.get(identity.codec).array_specs(identity.emb_dim)

    def compute(self, todo: resume.Range) -> Content:
        """Encodes one shard.

        Raises:
          ValueError: the encoder gave NaN or infinity, or arrays that are not the codec's.
          Preempted: asked to stop between two batches; the shard is dropped.
        """
        rows = np.arange(todo.first_row, todo.first_row + todo.passages)
        source = resume.read_source(self.passages, rows, self.identity.max_length)
        offsets = np.concatenate([[0], np.cumsum(source.lengths, dtype=np.int64)])
        arrays = {
            name: np.empty((offsets[-1], *trailing), dtype)
            for name, (trailing, dtype) in self.specs.items()
        }
        groups = batches.groups(source.lengths, self.program.rows, self.program.buckets)
        running: deque[tuple[list[batches.Group], Mapping[str, Any], jax.Array]] = deque()
        for call in batches.calls(groups, self.devices):
            if self.watcher.requested:
                raise Preempted(
                    f"Stopped before shard {todo.name} was complete; finished shards are kept. Run "
                    "the same build_memory command again to go on."
                )
            tokens = np.zeros((self.devices, self.program.rows, call[0].bucket), np.int32)
            for device, group in enumerate(call):
                taken = source.tokens[group.positions, : group.bucket]
                tokens[device, : len(group.positions)] = taken
            encoded = self.encode(tokens.reshape(-1, call[0].bucket))
            running.append((call, encoded, _finite(dict(encoded))))
            # One batch ahead: the device works on this one while the last is put in place.
            if len(running) > 1:
                self._place(running.popleft(), rows, offsets, arrays)
        while running:
            self._place(running.popleft(), rows, offsets, arrays)
        return Content(rows, offsets, source.truncated, source.sha256, source.titles, arrays)

    def _place(self, running, rows, offsets, arrays) -> None:
        call, encoded, finite = running
        bucket = call[0].bucket
        finite = np.asarray(finite).reshape(self.devices, self.program.rows, bucket)
        host = {name: np.asarray(value) for name, value in encoded.items()}
        self._check_arrays(host, bucket)
        tokens = 0
        for device, group in enumerate(call):
            for slot, position in enumerate(group.positions):
                begin, end = offsets[position], offsets[position + 1]
                if not finite[device, slot, : end - begin].all():
                    raise ValueError(
                        "The memory encoder gave NaN or infinity for passage "
                        f"{int(self.passages.ids[rows[position]])}. Check the checkpoint (did its "
                        "training diverge?) and the activation dtype."
                    )
                at = device * self.program.rows + slot
                for name, value in host.items():
                    arrays[name][begin:end] = value[at, : end - begin]
                tokens += int(end - begin)
        computed = self.devices * self.program.rows * bucket
        self.progress.encoded(sum(len(group.positions) for group in call), tokens, computed)

    def _check_arrays(self, host: Mapping[str, np.ndarray], bucket: int) -> None:
        n = self.devices * self.program.rows
        wanted = {name: ((n, bucket, *t), np.dtype(d)) for name, (t, d) in self.specs.items()}
        got = {name: (value.shape, value.dtype) for name, value in host.items()}
        if wanted != got:
            raise ValueError(
                f"Codec {self.identity.codec!r} stores {wanted} for this batch, and the encoder "
                f"returned {got}. Build with the model's own codec, emb_dim and batch size."
            )


@jax.jit
def _finite(arrays: Mapping[str, jax.Array]) -> jax.Array:
    """bool `[n, P]`: all floats of a token are finite; on the device, so little is fetched."""
    flags = [
        jnp.isfinite(x).reshape(*x.shape[:2], -1).all(-1)
        for x in arrays.values()
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    some = next(iter(arrays.values()))
    result = jnp.ones(some.shape[:2], bool)
    for flag in flags:
        result = result & flag
    return result
