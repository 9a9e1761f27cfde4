"""Mode `export`: a checkpoint's parameters as one bfloat16 file to ship, or as a T5 for others."""

from glimmer_jax.data.vocabulary import Vocabulary
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.weights import huggingface, parameters
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file


def export(
    model: GlimmerModel,
    checkpoint_path: str,
    output_path: str,
    vocabulary: Vocabulary = Vocabulary(),
) -> None:
    """Writes `NAME.safetensors` and its JSON, or of FiD the folder of a Hugging Face T5, float32.

    Args:
      model: the model wanted; a checkpoint of another cut is recut.
      checkpoint_path: any of the places of `weights.load`.
      output_path: a file `NAME.safetensors`, or a folder.
      vocabulary: of the checkpoint.

    Raises:
      ValueError: the checkpoint is missing, damaged, or does not fit the model.
    """
    checks.required(CHECKPOINT_PATH=checkpoint_path, OUTPUT_PATH=output_path)
    params = parameters.load(checkpoint_path, model, vocabulary.fingerprint)
    if output_path.endswith(".safetensors"):
        save_params_file(output_path, params, describe(model.config, vocabulary.fingerprint))
    else:
        huggingface.save(output_path, params, model.config)
    print(f"Wrote {output_path}.")
