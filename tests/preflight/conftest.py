"""Programs for absent slices can be written to a compilation cache, but not read back."""

import jax
import pytest


@pytest.fixture(autouse=True)
def without_compilation_cache():
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)
