"""Latency of a question: PyTorch's T5 used as FiD, and our FiD, LUMEN and GLIMMER, in one run.

    python -m benchmarks.question_latency --json latency.json

T5-base, one question of 32 tokens with 10, 20 and 40 passages of 224 tokens, 16 answer tokens, greedy,
two threads, random weights. On a GPU only bfloat16 is measured. Every system and dtype runs in its
own process; `timing` interleaves them.
"""

from collections.abc import Sequence

from benchmarks.setting import SYSTEMS, Setting, from_flags, parser
from benchmarks.timing import measure_all


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all systems, writes the rows as JSON, and prints the tables."""
    description = (__doc__ or "").split("\n")[0]
    flags = parser("question_latency", description, SYSTEMS, Setting()).parse_args(arguments)
    measure_all(flags.systems, flags.dtypes, from_flags(flags), flags.runs, flags.json)


if __name__ == "__main__":
    main()
