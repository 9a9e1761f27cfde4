"""Mode `export`: a checkpoint's parameters as one file to ship, in the forms of others, or a program."""

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.serving.stablehlo import ProgramConfig, export_program
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights import huggingface, parameters, t5_names, t5x
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file

FORMATS = {"huggingface": huggingface.save, "t5x": t5x.save, "t5x_adapter": t5x.save_tree}


def export(
    model: GlimmerModel,
    checkpoint_path: str,
    output_path: str,
    output_format: str = "huggingface",
    vocabulary: Vocabulary = Vocabulary(),
    program: ProgramConfig | None = None,
) -> None:
    """Writes `NAME.safetensors` and its JSON, or a float32 folder; of FiD that is a T5 for others.

    With `program`, writes the folder of `serving.program` instead: what answers with JAX alone.

    Args:
      model: the model wanted; a checkpoint of another cut is recut.
      checkpoint_path: any of the places of `weights.load`.
      output_path: a file `NAME.safetensors`, or a folder, local or a bucket.
      output_format: of a folder: `huggingface` or `t5x` (docs/weights.md), or `t5x_adapter`, which
        T5X's trainer starts our models from (docs/t5x.md).
      vocabulary: of the checkpoint.
      program: lengths and platforms of the programs.

    Raises:
      ValueError: the checkpoint is missing, damaged, or does not fit the model, or the format is not
        known.
    """
    checks.required(CHECKPOINT_PATH=checkpoint_path, OUTPUT_PATH=output_path)
    if output_format not in FORMATS:
        raise ValueError(f"OUTPUT_FORMAT is one of {', '.join(FORMATS)}, got {output_format!r}.")
    if program is not None:
        for bucket in program.buckets:
            checks.lengths_for(model.config, bucket)
        checks.vocabulary_fits(model, vocabulary)
    params = parameters.load(checkpoint_path, model, vocabulary.fingerprint)
    described = describe(model.config, vocabulary.fingerprint)
    if program is not None:
        export_program(output_path, model, params, program, vocabulary.fingerprint)
        form = "programs that need JAX alone"
    elif output_path.endswith(".safetensors"):
        save_params_file(output_path, params, described)
        form = "a parameter file"
    else:
        FORMATS[output_format](output_path, params, model.config, described)
        form = f"{output_format}, {_names(output_format, model)}"
    print(f"Wrote {output_path}: {form}.")


def _names(output_format: str, model: GlimmerModel) -> str:
    if output_format == "t5x_adapter":
        return "our own tree"
    if t5_names.is_t5(model.config):
        return "a T5"
    return "the parts under the names of docs/weights.md"
