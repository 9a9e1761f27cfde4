import pytest

from glimmer_jax.data import pydocs_tasks


@pytest.fixture(scope="session")
def pydocs_examples():
    """Every example of the built-in tasks, by (task, split); seconds to make."""
    return pydocs_tasks.all_tasks()
