"""Checks of settings, made before anything expensive."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from glimmer_jax import axes, partitioning
from glimmer_jax.axes import Lengths, check_lengths
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.models.answers import DecodeConfig
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.retrieval import corpus_check
from glimmer_jax.storage import folder, lease, local_copy
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights import params_file


def required(**values: Any) -> None:
    """Raises ValueError naming settings that are None or empty."""
    missing = [name for name, value in values.items() if value is None or value == ""]
    if missing:
        raise ValueError(
            f"This mode requires {', '.join(missing)}. Set it, for example --gin.{missing[0]}=…"
        )


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
        corpus_check.check(data_dir, passages)
    return passages


def existing_file(name: str, path: Any) -> Path:
    """The path of a file, or of a bucket's local copy; `name` is its macro."""
    path = local_copy.fetch_file(name, path)
    if not path.is_file():
        raise ValueError(f"{name}: there is no file {path}. Check the path.")
    return path


def replaceable(name: str, path: str, overwrite: bool) -> None:
    """Raises ValueError for an output file that exists, unless it may be replaced."""
    kvstore, key = folder.of_file(path)
    parent = Path(path).parent
    if not folder.in_bucket(path) and parent.exists() and not parent.is_dir():
        raise ValueError(f"{name}: {parent} is a file. Choose a folder.")
    if not overwrite and folder.exists(kvstore, key):
        raise ValueError(
            f"{name}: {path} exists. Set OVERWRITE=True to replace it, or write to another folder."
        )


def new_params_file(path: str, overwrite: bool) -> None:
    """Raises ValueError for a path that is no `NAME.safetensors`, or exists and may not be replaced."""
    described = params_file.check_name(path).with_suffix(".json")  # It completes the pair.
    replaceable("OUTPUT_PATH", str(described), overwrite)


@contextlib.contextmanager
def sole_writer(path: str | None, in_place: bool = False) -> Iterator[Callable[[], None]]:
    """Holds an output, from before the work on it: of two commands that write it, one is rejected.

    Only process 0 writes, so it alone holds the lock.

    Args:
      path: of a file or folder; None is no output.
      in_place: it is a folder whose files are written one by one, and not renamed into place.

    Yields:
      A function to call before writing; it raises ValueError if another process took the lock over.

    Raises:
      ValueError: another process is writing it.
    """
    if path is None or jax.process_index():
        yield lambda: None
        return
    with lease.output_lock(path, inside=in_place) as lock:
        yield lock.check


# Where and how results are written, not what they are.
_PLACES = ("MODEL_DIR", "EVAL_OUTPUT_DIR", "OVERWRITE")


def changed_settings(output_dir: str, config_text: str) -> list[str]:
    """Bindings in which an operative configuration differs from `config.gin` of `output_dir`.

    Args:
      output_dir: local or in a bucket; without the file nothing differs.
      config_text: the operative configuration now; empty without gin.

    Returns:
      Texts such as `LEARNING_RATE: 0.001 -> 0.0002`, sorted.
    """
    saved = folder.read_file(folder.open_folder(output_dir), "config.gin")
    if saved is None or not config_text:
        return []
    old, new = _bindings(saved.decode(errors="replace")), _bindings(config_text)
    return [
        f"{name}: {old.get(name, 'unset')} -> {new.get(name, 'unset')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _PLACES
    ]


def _bindings(config_text: str) -> dict[str, str]:
    """Name -> value of each binding; gin continues a long value on indented lines."""
    whole = re.sub(r"\\?\n[ \t]+", " ", config_text)
    lines = (line.partition(" = ") for line in whole.splitlines() if not line.startswith("#"))
    return {name: value.strip() for name, equals, value in lines if equals}


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
