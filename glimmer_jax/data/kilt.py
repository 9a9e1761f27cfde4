"""KILT task files under the data wing's roof; the code is `glimmer_jax.kilt`, for retrieval too."""

from glimmer_jax.kilt import Policy, answers, check_example, is_gold, provenance, read_examples

__all__ = ["Policy", "answers", "check_example", "is_gold", "provenance", "read_examples"]
