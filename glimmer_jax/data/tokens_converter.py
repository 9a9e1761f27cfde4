"""The whole batch contract inside tf.data, for pipelines that attach no passages themselves (T5X's)."""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from glimmer_jax.data.features import GlimmerFeatureConverter
from glimmer_jax.lengths import Lengths
from glimmer_jax.passages import Passages


class TokensConverter(GlimmerFeatureConverter):
    """`GlimmerFeatureConverter` whose `passage_ids` have become `passage_tokens`.

    With the passage of id 81 being the tokens 5, 6, 1, and lengths `Lengths(4, 3, 2, 5)`:

        {"inputs": [7, 8], "targets": [9, 1], "passage_ids": [81]}
        {"question_tokens": [0, 0, 7, 8], "passage_tokens": [[5, 6, 1, 0, 0], [0, 0, 0, 0, 0]],
         "decoder_input_tokens": [0, 9, 1], ...}
    """

    def __init__(self, lengths: Lengths, passages: Passages | None, **kwargs: Any):
        """Args:
        lengths: of every dataset, whatever a call says: seqio's Evaluator hands down the lengths of
          the features that it sees, and P is none of them.
        passages: where ids are looked up; None for tasks whose examples hold their passages.
        kwargs: of `seqio.FeatureConverter`.
        """
        super().__init__(**kwargs)
        self._lengths = lengths
        self._passages = passages

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, Any]
    ) -> tf.data.Dataset:
        """Converts.

        Raises:
          ValueError: the dataset has no passages, or ids and nothing to look them up in.
        """
        del task_feature_lengths
        question, target, count, length = self._lengths
        lengths = {"inputs": question, "targets": target, "passages": (count, length)}
        ds = super().__call__(ds, lengths)
        if "passage_ids" not in ds.element_spec:
            return ds
        passages = self._passages
        if passages is None:
            raise ValueError(
                "The examples name their passages by id: set PASSAGES_DIR to the folder they were "
                "retrieved from."
            )

        def look_up(ids: Any) -> Any:
            return passages.tokens(passages.rows(ids), length)

        def attach(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            # Said to be stateless, or iterators over it could not be saved with a checkpoint.
            tokens = tf.numpy_function(look_up, [example["passage_ids"]], tf.int32, stateful=False)
            others = {name: x for name, x in example.items() if name != "passage_ids"}
            return {**others, "passage_tokens": tf.ensure_shape(tokens, (count, length))}

        return ds.map(attach, num_parallel_calls=tf.data.AUTOTUNE)
