"""Mode `export`: a checkpoint's parameters as one bfloat16 file to ship."""

from glimmer_jax.data.vocabulary import Vocabulary
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.training import parameters
from glimmer_jax.training.params_file import save_params_file


def export(
    model: GlimmerModel,
    checkpoint_path: str,
    output_path: str,
    vocabulary: Vocabulary = Vocabulary(),
) -> None:
    """Writes `output_path` (`NAME.safetensors`) and its JSON.

    Args:
      model: the model wanted; a checkpoint of another cut is recut.
      checkpoint_path: a run's folder, a step's, or a `.safetensors` file.
      output_path: the file to write.
      vocabulary: of the checkpoint.

    Raises:
      ValueError: the checkpoint is missing, damaged, or does not fit the model.
    """
    checks.required(CHECKPOINT_PATH=checkpoint_path, OUTPUT_PATH=output_path)
    params = parameters.load(checkpoint_path, model, vocabulary.fingerprint)
    save_params_file(output_path, params, parameters.describe(model, vocabulary.fingerprint))
    print(f"Wrote {output_path}.")
