"""Mode `export`: a checkpoint as a parameter file, as a Hugging Face or T5X folder, or as a program."""

from pathlib import Path

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.modes.checkpoint import CheckpointConfig
from glimmer_jax.serving.stablehlo import ProgramConfig, export_program
from glimmer_jax.storage import folder
from glimmer_jax.weights import huggingface, parameters, t5_names, t5x
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file

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
    with checks.sole_writer(output_path):
        if program is None:
            _check_free(output_path, overwrite)
        trained = checkpoint.read()
        model, vocabulary = trained.model, trained.vocabulary
        for bucket in () if program is None else program.buckets:
            checks.lengths_for(model.config, bucket)
        params = parameters.load(checkpoint.checkpoint_path, model, vocabulary.fingerprint)
        lengths = trained.record.task_feature_lengths
        config, described = model.config, describe(model.config, vocabulary.fingerprint, lengths)
        if program is not None:
            params = parameters.read(params)
            export_program(output_path, model, params, program, vocabulary.fingerprint)
            content = "programs that need JAX alone"
        elif output_path.endswith(".safetensors"):
            save_params_file(output_path, params, described, trained.own_vocabulary())
            content = "a parameter file"
        elif output_format == "huggingface":
            sentencepiece_model = Path(vocabulary.path).read_bytes()
            huggingface.save(output_path, params, config, described, sentencepiece_model)
            content = f"{output_format}, {_names_of(model)}"
        elif output_format == "t5x":
            t5x.save(output_path, params, described)
            content = f"{output_format}, {_names_of(model)}"
        else:
            t5x.save_tree(output_path, params)
            content = f"{output_format}, the parameter tree of glimmer_jax"
    print(f"Wrote {output_path}: {content}.")


def _check_free(path: str, overwrite: bool) -> None:
    """Raises ValueError where the output would replace something, or mix with it."""
    if path.endswith(".safetensors"):
        checks.new_params_file(path, overwrite)
        return
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
