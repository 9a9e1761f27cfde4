import pytest

from glimmer_jax.pydocs import questions


@pytest.fixture(scope="session")
def pydocs_examples():
    """Examples of the built-in tasks, by (task, split). Takes seconds."""
    return questions.all_tasks()
