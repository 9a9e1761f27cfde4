"""What modes check before anything expensive."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from glimmer_jax import axes, partitioning
from glimmer_jax.axes import Lengths, check_lengths
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.storage import local_copy
from glimmer_jax.vocabulary import Vocabulary


def required(**values: Any) -> None:
    """Raises ValueError naming settings that are None or empty."""
    missing = [name for name, value in values.items() if value in (None, "")]
    if missing:
        raise ValueError(f"This mode needs {', '.join(missing)}; set it, e.g. --gin.{missing[0]}=…")


def existing_file(name: str, path: Any) -> Path:
    """The path, if it is a file, or that of a bucket's copy; `name` is the macro that a user sets."""
    path = local_copy.fetch_file(name, path)
    if not path.is_file():
        raise ValueError(f"{name}: there is no file {path}. Check the path.")
    return path


def batch_size(name: str, size: int, mesh: Mesh, num_microbatches: int = 1) -> None:
    """Raises ValueError where rows do not divide over devices and microbatches."""
    ways = partitioning.parts(mesh.shape, axes.BATCH)
    parts = ways * num_microbatches
    if size < 1 or size % parts:
        way_out = ""
        if size >= 1 and ways > size and ways % size == 0:
            way_out = f" For fewer questions than devices set MESH_PASSAGES, here {ways // size}."
        raise ValueError(
            f"{name}={size} must be a multiple of {parts}: slice x data x fsdp x microbatches = "
            f"{mesh.shape['slice']} x {mesh.shape['data']} x {mesh.shape['fsdp']} x "
            f"{num_microbatches}.{way_out}"
        )


def passages_divide(lengths: Lengths, mesh: Mesh) -> None:
    """Raises ValueError where a question's passages do not divide over the mesh axis for them."""
    parts = partitioning.parts(mesh.shape, axes.PASSAGES)
    if lengths.passages % parts:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS gives K={lengths.passages} passages, not a multiple of "
            f"MESH_PASSAGES={parts}. Change one of them."
        )


def lengths_for(config: GlimmerConfig, lengths: Any) -> Lengths:
    """The lengths, if they fit the model."""
    found = check_lengths(lengths)
    if config.num_kept is not None and config.num_kept > found.passages:
        raise ValueError(
            f"The model keeps {config.num_kept} passages (NUM_KEPT), and TASK_FEATURE_LENGTHS gives "
            f"it K={found.passages}. Lower NUM_KEPT or raise K."
        )
    return found


def vocabulary_fits(model: GlimmerModel, vocabulary: Vocabulary) -> None:
    """Raises ValueError where ids would lie outside the embedding, or mean something else."""
    rows = model.config.t5.vocab_size
    if vocabulary.vocab_size > rows:
        raise ValueError(
            f"The vocabulary {vocabulary.path} has {vocabulary.vocab_size} ids, and the model's "
            f"embedding {rows} rows. Raise VOCAB_SIZE or give the model's vocabulary."
        )
    if vocabulary.eos_id != model.eos_id:
        raise ValueError(
            f"The end token of the vocabulary {vocabulary.path} is {vocabulary.eos_id}, and answers "
            f"of this model end with {model.eos_id}. Give a vocabulary made as T5's: padding 0, end 1."
        )
