"""Checks of settings, made before anything expensive."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from glimmer_jax import axes, partitioning
from glimmer_jax.axes import Lengths, check_lengths
from glimmer_jax.corpus import retrieved_notes
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.models.answers import DecodeConfig
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.storage import local_copy
from glimmer_jax.vocabulary import Vocabulary


def required(**values: Any) -> None:
    """Raises ValueError naming settings that are None or empty."""
    missing = [name for name, value in values.items() if value is None or value == ""]
    if missing:
        raise ValueError(
            f"This mode requires {', '.join(missing)}. Set it, for example --gin.{missing[0]}=…"
        )


def seed(value: int) -> None:
    """Raises ValueError for a seed that jax would cut, or numpy reject."""
    if not 0 <= value < 2**32:
        raise ValueError(f"RANDOM_SEED must be from 0 to {2**32 - 1}, got {value}.")


def open_passages(
    passages_dir: str | None, data_dir: str | None, vocabulary: Vocabulary
) -> Passages | None:
    """The corpus, if one is given, after comparing the retrieved files with it.

    Raises:
      ValueError: the folder is missing or has another vocabulary, or the files in `data_dir` were
        retrieved from another corpus.
    """
    if passages_dir is None:
        return None
    passages = Passages.open(passages_dir, vocabulary.fingerprint)
    if data_dir is not None:
        retrieved_notes.check(data_dir, passages)
    return passages


def existing_file(name: str, path: Any) -> Path:
    """The path of a file, or of a bucket's local copy; `name` is its macro."""
    path = local_copy.fetch_file(name, path)
    if not path.is_file():
        raise ValueError(f"{name}: there is no file {path}. Check the path.")
    return path


def batch_size(name: str, size: int, mesh: Mesh, num_microbatches: int = 1) -> None:
    """Raises ValueError if rows do not divide over devices and microbatches."""
    ways = partitioning.parts(mesh.shape, axes.BATCH)
    parts = ways * num_microbatches
    if size < 1 or size % parts:
        remedy = ""
        if size >= 1 and ways > size and ways % size == 0:
            remedy = f" For fewer questions than devices set MESH_PASSAGES, here {ways // size}."
        raise ValueError(
            f"{name}={size} must be a multiple of {parts}: slice x data x fsdp x microbatches = "
            f"{mesh.shape['slice']} x {mesh.shape['data']} x {mesh.shape['fsdp']} x "
            f"{num_microbatches}.{remedy}"
        )


def passages_divide(lengths: Lengths, mesh: Mesh) -> None:
    """Raises ValueError if a question's passages do not divide over their mesh axis."""
    parts = partitioning.parts(mesh.shape, axes.PASSAGES)
    if lengths.passages % parts:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS gives K={lengths.passages} passages, not a multiple of "
            f"MESH_PASSAGES={parts}. Change one of them."
        )


def one_answer_rule(candidates: Any, decode: DecodeConfig) -> None:
    """Raises ValueError for settings of a search where answers are chosen from candidates."""
    if candidates is not None and (decode.beams > 1 or decode.temperature):
        raise ValueError(
            "CANDIDATES are chosen from by log-likelihood, without a search: leave out BEAM_SIZE and "
            "SAMPLING_TEMPERATURE, or CANDIDATES."
        )


def lengths_for(config: GlimmerConfig, lengths: Any) -> Lengths:
    """The lengths, if they fit the model."""
    checked = check_lengths(lengths)
    if unknown := sorted(lengths.keys() - {"inputs", "targets", "passages"}):
        raise ValueError(
            f"TASK_FEATURE_LENGTHS has {', '.join(map(repr, unknown))}, which nothing reads. Its keys "
            "are 'inputs', 'targets' and 'passages'."
        )
    if config.num_kept is not None and config.num_kept > checked.passages:
        raise ValueError(
            f"NUM_KEPT: the model keeps {config.num_kept} passages, but TASK_FEATURE_LENGTHS has "
            f"K={checked.passages}. Lower NUM_KEPT or raise K."
        )
    return checked
