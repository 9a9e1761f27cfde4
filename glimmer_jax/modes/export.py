"""Mode `export`: a checkpoint as a parameter file, as a Hugging Face or T5X folder, or as a program."""

import os
from pathlib import Path
from typing import Any

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks, outputs
from glimmer_jax.modes.checkpoint import CheckpointConfig, Trained
from glimmer_jax.serving.stablehlo import (
    PROGRAMS,
    ProgramConfig,
    check_new_folder,
    export_program,
)
from glimmer_jax.storage import folder
from glimmer_jax.weights import huggingface, parameters, t5_names, t5x
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file

_FILE = ".safetensors"
FORMATS = ("huggingface", "t5x", "t5x_adapter")
# File or folder -> what a folder with it holds.
_OTHERS = {
    "checkpoints/": "a run",
    "manifest.json": "passages or a memory",
    "config.json": "a model of Hugging Face",
    "checkpoint": "a checkpoint of T5X",
}


def export(
    checkpoint: CheckpointConfig,
    output_path: str,
    output_format: str = "huggingface",
    program: ProgramConfig | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `NAME.safetensors` with its JSON, a float32 folder, or compiled programs.

    Args:
      checkpoint: any path that `weights.load` reads; with a model of another cut it is recut. The
        files get a copy of its vocabulary.
      output_path: a file `NAME.safetensors`, or a folder, local or in a bucket.
      output_format: of a folder: `huggingface` or `t5x` (docs/weights.md), or `t5x_adapter`, from which
        T5X's trainer starts our models (docs/t5x.md).
      program: lengths and platforms; writes the folder of `serving.stablehlo`, which answers questions
        with JAX alone.
      overwrite: replace an existing parameter file.

    Raises:
      ValueError: the checkpoint is missing, damaged or not finite, does not fit the model or the
        vocabulary, the format is unknown, or something else is at `output_path`.
    """
    checks.required(CHECKPOINT_PATH=checkpoint.checkpoint_path, OUTPUT_PATH=output_path)
    if output_format not in FORMATS:
        raise ValueError(
            f"OUTPUT_FORMAT must be one of {', '.join(FORMATS)}, got {output_format!r}."
        )
    place = _place(output_path, output_format, program, overwrite)
    place.check_early()
    trained = checkpoint.read()
    for bucket in () if program is None else program.buckets:
        checks.lengths_for(trained.model.config, bucket)
    with outputs.sole_writer(place) as held:
        if held.complete:
            return
        fingerprint = trained.vocabulary.fingerprint
        params = parameters.load(checkpoint.checkpoint_path, trained.model, fingerprint)
        held.check_lock()
        content = _write(output_path, params, trained, output_format, program)
    print(f"Wrote {output_path}: {content}.")


def _write(
    path: str, params: Any, trained: Trained, output_format: str, program: ProgramConfig | None
) -> str:
    """Writes the output and describes it."""
    model, vocabulary = trained.model, trained.vocabulary
    lengths = trained.record.task_feature_lengths
    described = describe(model.config, vocabulary.fingerprint, lengths)
    if program is not None:
        export_program(path, model, parameters.read(params), program, vocabulary.fingerprint)
        return "programs that need JAX alone"
    if path.endswith(_FILE):
        save_params_file(path, params, described, trained.own_vocabulary())
        return "a parameter file"
    if output_format == "t5x_adapter":
        t5x.save_tree(path, params)
        return f"{output_format}, the parameter tree of glimmer_jax"
    if output_format == "t5x":
        t5x.save(path, params, described)
    else:
        sentencepiece_model = Path(vocabulary.path).read_bytes()
        huggingface.save(path, params, model.config, described, sentencepiece_model)
    return f"{output_format}, {_names_of(model)}"


def _place(
    path: str, output_format: str, program: ProgramConfig | None, overwrite: bool
) -> outputs.Place:
    """The output. Its check raises ValueError where it would replace something, or mix with it."""
    if program is not None:
        last = os.path.join(folder.local(PROGRAMS, path), "manifest.json")
        return outputs.Place(path, last, lambda: check_new_folder(path))
    if path.endswith(_FILE):
        return outputs.params_file_place(path, overwrite)
    last = "config.json" if output_format == "huggingface" else "checkpoint"
    return outputs.Place(path, os.path.join(path, last), lambda: _check_free(path), in_place=True)


def _check_free(path: str) -> None:
    files = folder.list_files(folder.open_folder(path), "")
    for name, content in _OTHERS.items():
        if any(file.startswith(name) if name.endswith("/") else file == name for file in files):
            raise ValueError(
                f"OUTPUT_PATH: {path} holds {content} already ({name}). Remove it, or choose another "
                "folder."
            )


def _names_of(model: GlimmerModel) -> str:
    if t5_names.is_t5(model.config):
        return "a T5"
    return "the parts under the names of docs/weights.md"
