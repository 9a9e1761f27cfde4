"""Seconds of a training step: PyTorch's T5 used as FiD, and our FiD, LUMEN and GLIMMER, in one run.

    python -m benchmarks.train_step --json train_step.json

T5-base, one question of 32 tokens with 10 passages of 224 tokens and an answer of 16, Adafactor,
dropout 0.1, two threads, random weights. Systems read passages as tokens, but for `glimmer_memory`,
which reads stored memory; its and LUMEN's memory encoders are frozen. PyTorch's bfloat16 is automatic
mixed precision, with eager or sdpa attention: the faster counts. On a GPU only bfloat16 is measured.
Every system and dtype runs in its own process; `timing` interleaves them.
"""

from collections.abc import Sequence

from benchmarks.setting import TRAINING_SYSTEMS, Setting, from_flags, parser
from benchmarks.timing import measure_all


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all systems, writes the rows as JSON, and prints the tables."""
    default = Setting(passages=(10,), training=True)
    description = (__doc__ or "").split("\n")[0]
    flags = parser("train_step", description, TRAINING_SYSTEMS, default).parse_args(arguments)
    setting = from_flags(flags, training=True)
    measure_all(flags.systems, flags.dtypes, setting, flags.runs, flags.json)


if __name__ == "__main__":
    main()
