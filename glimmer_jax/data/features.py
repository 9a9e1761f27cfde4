"""Converts seqio's task features to the batch contract of the model.

    task features                         model features
    inputs          int32 [<=Q]           question_tokens        int32 [Q], right-aligned
    targets         int32 [<=T], EOS      decoder_input_tokens   int32 [T], shifted right, 0 first
                                          decoder_target_tokens  int32 [T]
                                          decoder_loss_weights   float32 [T], 0 for padding
    passage_ids     int64 [<=K]           passage_ids            int64 [K], -1 where there is none
      or passages   int32 [<=K, <=P]      passage_tokens         int32 [K, P], 0 is padding
    gold_passages   int32 [<=K], optional gold_passages          int32 [K]

For example with lengths `{"inputs": 4, "targets": 3, "passages": (2, 5)}`:

    {"inputs": [7, 8], "targets": [9, 1], "passage_ids": [81]}
    {"question_tokens": [0, 0, 7, 8], "decoder_input_tokens": [0, 9, 1],
     "decoder_target_tokens": [9, 1, 0], "decoder_loss_weights": [1, 1, 0], "passage_ids": [81, -1]}

`TokensConverter` also looks up passages inside tf.data, for pipelines that cannot attach them on
the host (T5X's).
"""

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from glimmer_jax.axes import Lengths, check_lengths
from glimmer_jax.corpus.passages import Passages

_Spec = seqio.FeatureConverter.FeatureSpec

NO_PASSAGE = -1


class GlimmerFeatureConverter(seqio.FeatureConverter):
    """The converter of the module docstring, with lengths in the form of `check_lengths`.

    The element spec of a dataset determines which form its passages have. Packing is not supported:
    a question and its passages are one example.
    """

    TASK_FEATURES = {
        "inputs": _Spec(dtype=tf.int32),
        "targets": _Spec(dtype=tf.int32),
        "passages": _Spec(dtype=tf.int32, rank=2, sequence_dim=1),
    }
    MODEL_FEATURES = {
        "question_tokens": _Spec(dtype=tf.int32),
        "decoder_input_tokens": _Spec(dtype=tf.int32),
        "decoder_target_tokens": _Spec(dtype=tf.int32),
        "decoder_loss_weights": _Spec(dtype=tf.float32),
        "passage_tokens": _Spec(dtype=tf.int32, rank=2, sequence_dim=1),
    }
    PACKING_FEATURE_DTYPES: Mapping[str, Any] = {}

    def __init__(self, pack: bool = False, **kwargs: Any):
        if pack:
            raise ValueError(
                "GlimmerFeatureConverter cannot pack: a question and its passages are one example. "
                "Pass pack=False."
            )
        # seqio's check compares one length with one dimension, but passages have two, [K, P];
        # `_pad` trims.
        kwargs["apply_length_check"] = False
        super().__init__(pack=False, **kwargs)

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, Any]
    ) -> tf.data.Dataset:
        """Converts a dataset; features that the model does not read are dropped.

        Args:
          ds: task features.
          task_feature_lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.

        Raises:
          ValueError: the lengths have another form, or the dataset has no passages.
        """
        features = [name for name in ("passage_ids", "passages") if name in ds.element_spec]
        if len(features) != 1:
            raise ValueError(
                "Examples must have either `passage_ids` or `passages`; these have "
                f"{sorted(ds.element_spec)}."
            )
        lengths = {**task_feature_lengths}
        if "passages" not in lengths and "passage_ids" in lengths:
            # seqio.Evaluator passes the lengths of the task's features only; ids need no P.
            lengths["passages"] = (lengths["passage_ids"], 1)
        check_lengths(lengths)
        kept = ("inputs", "targets", *features)
        if "gold_passages" in ds.element_spec:
            kept += ("gold_passages",)
        one_form = _OneForm(features[0], "gold_passages" in kept, self._bos_id)
        ds = ds.map(lambda example: {name: example[name] for name in kept})
        return one_form(ds, {name: one_form.length(name, lengths) for name in kept})

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, Any]
    ) -> tf.data.Dataset:
        return self(ds, task_feature_lengths)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, Any]) -> dict[str, Any]:
        """Lengths of the model features in the form with passage tokens."""
        form = _OneForm("passages", "gold_passages" in task_feature_lengths, self._bos_id)
        return form.get_model_feature_lengths(task_feature_lengths)


class _OneForm(seqio.FeatureConverter):
    """The converter of one passage form; seqio checks its inputs and outputs."""

    TASK_FEATURES: Mapping[str, Any] = {}
    MODEL_FEATURES: Mapping[str, Any] = {}
    PACKING_FEATURE_DTYPES: Mapping[str, Any] = {}

    def __init__(self, form: str, has_gold: bool, bos_id: int):
        super().__init__(pack=False, apply_length_check=False, bos_id=bos_id)
        task = dict(GlimmerFeatureConverter.TASK_FEATURES)
        model = dict(GlimmerFeatureConverter.MODEL_FEATURES)
        if form == "passage_ids":
            del task["passages"], model["passage_tokens"]
            task["passage_ids"] = model["passage_ids"] = _Spec(dtype=tf.int64)
        if has_gold:
            task["gold_passages"] = model["gold_passages"] = _Spec(dtype=tf.int32)
        self.TASK_FEATURES, self.MODEL_FEATURES = task, model

    @staticmethod
    def length(name: str, lengths: Mapping[str, Any]) -> Any:
        if name in ("passage_ids", "gold_passages"):
            return lengths["passages"][0]
        return lengths[name]

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, Any]
    ) -> tf.data.Dataset:
        lengths = task_feature_lengths

        def convert(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            targets = _pad(example["targets"], [lengths["targets"]])
            question = example["inputs"][: lengths["inputs"]]
            converted = {
                "question_tokens": _pad(question, [lengths["inputs"]], left=True),
                "decoder_input_tokens": seqio.utils.make_autoregressive_inputs(
                    targets, bos_id=self._bos_id
                ),
                "decoder_target_tokens": targets,
                "decoder_loss_weights": tf.cast(targets != 0, tf.float32),
            }
            if "passages" in lengths:
                converted["passage_tokens"] = _pad(example["passages"], lengths["passages"])
            else:
                ids = example["passage_ids"]
                converted["passage_ids"] = _pad(ids, [lengths["passage_ids"]], value=NO_PASSAGE)
            if "gold_passages" in lengths:
                gold = example["gold_passages"]
                converted["gold_passages"] = _pad(gold, [lengths["gold_passages"]])
            return converted

        return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, Any]) -> dict[str, Any]:
        lengths = {
            "question_tokens": task_feature_lengths["inputs"],
            "decoder_input_tokens": task_feature_lengths["targets"],
            "decoder_target_tokens": task_feature_lengths["targets"],
            "decoder_loss_weights": task_feature_lengths["targets"],
        }
        for task, model in (
            ("passages", "passage_tokens"),
            ("passage_ids", "passage_ids"),
            ("gold_passages", "gold_passages"),
        ):
            if task in task_feature_lengths:
                lengths[model] = task_feature_lengths[task]
        return lengths


def _pad(x: tf.Tensor, lengths: Any, value: int = 0, left: bool = False) -> tf.Tensor:
    """Trims or pads every dimension to its length."""
    x = x[tuple(slice(0, length) for length in lengths)]
    missing = [length - tf.shape(x)[axis] for axis, length in enumerate(lengths)]
    paddings = [[n, 0] if left else [0, n] for n in missing]
    padded = tf.pad(x, paddings, constant_values=tf.constant(value, x.dtype))
    return tf.ensure_shape(padded, lengths)


class TokensConverter(GlimmerFeatureConverter):
    """`GlimmerFeatureConverter` that replaces `passage_ids` with `passage_tokens`.

    For example, if passage 81 has the tokens 5, 6, 1, and lengths are `Lengths(4, 3, 2, 5)`:

        {"inputs": [7, 8], "targets": [9, 1], "passage_ids": [81]}
        {"question_tokens": [0, 0, 7, 8], "passage_tokens": [[5, 6, 1, 0, 0], [0, 0, 0, 0, 0]],
         "decoder_input_tokens": [0, 9, 1], ...}
    """

    def __init__(self, lengths: Lengths, passages: Passages | None, **kwargs: Any):
        """Fixes the lengths.

        Args:
          lengths: of every dataset. The lengths passed to a call are ignored, because seqio's
            Evaluator passes those of the task's features only, which do not include P.
          passages: the folder in which ids are looked up; None for tasks whose examples hold their
            passages.
          kwargs: of `seqio.FeatureConverter`.
        """
        super().__init__(**kwargs)
        self._lengths = lengths
        self._passages = passages

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, Any]
    ) -> tf.data.Dataset:
        """Converts a dataset.

        Raises:
          ValueError: the dataset has no passages, or has passage ids but there is no passages
            folder.
        """
        del task_feature_lengths
        lengths = self._lengths
        ds = super().__call__(ds, lengths.as_features())
        if "passage_ids" not in ds.element_spec:
            return ds
        passages = self._passages
        if passages is None:
            raise ValueError(
                "PASSAGES_DIR is not set, but the examples name their passages by id. Set it to the "
                "folder that they were retrieved from."
            )

        shape = (lengths.passages, lengths.passage)

        def look_up(ids: Any) -> Any:
            return passages.tokens(passages.rows(ids), lengths.passage)

        def attach(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            # Stateless, because iterators over stateful functions cannot be checkpointed.
            tokens = tf.numpy_function(look_up, [example["passage_ids"]], tf.int32, stateful=False)
            others = {name: x for name, x in example.items() if name != "passage_ids"}
            return {**others, "passage_tokens": tf.ensure_shape(tokens, shape)}

        return ds.map(attach, num_parallel_calls=tf.data.AUTOTUNE)
