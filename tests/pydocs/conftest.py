import pytest

from glimmer_jax.pydocs import questions


@pytest.fixture(scope="session")
def pydocs_examples():
    """Every example of the built-in tasks, by (task, split); seconds to make."""
    return questions.all_tasks()
