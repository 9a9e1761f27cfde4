"""Mode `export`: a checkpoint as a parameter file, as a Hugging Face or T5X folder, or as a program."""

from pathlib import Path

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.modes.checkpoint import CheckpointConfig
from glimmer_jax.serving.stablehlo import ProgramConfig, export_program
from glimmer_jax.weights import huggingface, parameters, t5_names, t5x
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file

FORMATS = ("huggingface", "t5x", "t5x_adapter")


def export(
    checkpoint: CheckpointConfig,
    output_path: str,
    output_format: str = "huggingface",
    program: ProgramConfig | None = None,
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

    Raises:
      ValueError: the checkpoint is missing, damaged or not finite, does not fit the model or the
        vocabulary, or the format is unknown.
    """
    checks.required(CHECKPOINT_PATH=checkpoint.checkpoint_path, OUTPUT_PATH=output_path)
    if output_format not in FORMATS:
        raise ValueError(
            f"OUTPUT_FORMAT must be one of {', '.join(FORMATS)}, got {output_format!r}."
        )
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
        t5x.save(output_path, params, config, described)
        content = f"{output_format}, {_names_of(model)}"
    else:
        t5x.save_tree(output_path, params)
        content = f"{output_format}, the parameter tree of glimmer_jax"
    print(f"Wrote {output_path}: {content}.")


def _names_of(model: GlimmerModel) -> str:
    if t5_names.is_t5(model.config):
        return "a T5"
    return "the parts under the names of docs/weights.md"
