"""What must agree between shards, and between a memory and the model that reads it."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Identity:
    """What must agree for shards to belong to one store."""

    encoder_fingerprint: str
    vocabulary_fingerprint: str
    codec: str
    emb_dim: int
    max_length: int  # tokens; longer passages were cut to it


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device ran: two builds agree to the last bit only if this is equal."""

    rows: int  # passages in one device's batch
    buckets: tuple[int, ...]  # lengths, in tokens, that a batch may be padded to
    dtype: str  # of activations while encoding
    matmul_dtype: str | None  # of the operands of projections, where it is not `dtype`
    backend: str  # cpu, gpu or tpu; gpu+cudnn with its attention
    jax_version: str

    def __post_init__(self):
        object.__setattr__(self, "buckets", tuple(self.buckets))
        if self.rows < 1:
            raise ValueError(f"A batch needs at least one row a device, got {self.rows}.")
        increasing = all(a < b for a, b in zip(self.buckets, self.buckets[1:], strict=False))
        if not self.buckets or self.buckets[0] < 1 or not increasing:
            raise ValueError(f"Length buckets must be increasing and positive: {self.buckets}.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How passages were cut into shards and chunks; shards of one store may differ in it."""

    shard_passages: int  # passages in each shard of a build but the last
    chunk_tokens: int  # tokens in the smallest unit that is read and checksummed

    def __post_init__(self):
        if min(self.shard_passages, self.chunk_tokens) < 1:
            raise ValueError(
                "shard_passages and chunk_tokens must be at least 1; got "
                f"{self.shard_passages}, {self.chunk_tokens}."
            )


def describe(settings: Program | Layout) -> str:
    """One line for messages."""
    fields = dataclasses.asdict(settings).items()
    return ", ".join(f"{name}={value}" for name, value in fields)


def check_identity(where: str, stored: Identity, wanted: Identity) -> None:
    """Raises ValueError naming every difference."""
    differences = [
        f"{field.name} {getattr(stored, field.name)} (now {getattr(wanted, field.name)})"
        for field in dataclasses.fields(Identity)
        if getattr(stored, field.name) != getattr(wanted, field.name)
    ]
    if differences:
        raise ValueError(
            f"{where} belongs to another build: {', '.join(differences)}. Go on with the same "
            "checkpoint, vocabulary and settings, or build into another folder."
        )


def check_fingerprint(kind: str, stored: str, wanted: str | None, where: Any) -> None:
    """Refuses a store whose encoder or vocabulary is not the one at hand."""
    if wanted is not None and stored != wanted:
        raise ValueError(
            f"The memory store {where} was built with the {kind} {stored}, and this model's {kind} "
            f"is {wanted}. Build the memory again with this model, or use the model that built it."
        )


def check_passages(stored: Sequence[str], wanted: str, where: Any) -> None:
    """Refuses a store made from other passages than those at hand, though ids may agree."""
    if wanted not in stored:
        raise ValueError(
            f"The memory store {where} was built from the passages {', '.join(stored)}, and the "
            f"passages folder at hand has {wanted}: the same id may be another text. Use the "
            "passages folder that the memory was built from, or build the memory of this one."
        )
