"""The text of questions and passages as the encoder reads it, fixed for all tasks.

Passages never carry task text: one memory serves all tasks. A passage is followed by the end token, a
question is not, because the passage follows it (GLIMMER, arXiv 2306.10231).
"""

from typing import Any


def question_text(task_input: Any) -> Any:
    """`question: …`, of a string or of a tensor of strings."""
    return "question: " + task_input


def passage_text(title: str, text: str) -> str:
    """`title: … context: …`."""
    return f"title: {title} context: {text}"
