"""`from glimmer_jax import NAME`: every public name, resolved at its first use."""

import subprocess
import sys

import pytest

import glimmer_jax


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_the_package_imports_no_heavy_library():
    code = "import sys, glimmer_jax; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = run(code).stdout
    assert "glimmer_jax" in loaded
    for library in ("jax", "flax", "numpy", "gin", "tensorflow"):
        assert f"'{library}'" not in loaded


@pytest.mark.parametrize("name", glimmer_jax.__all__)
def test_public_names_resolve_to_their_classes(name):
    assert getattr(glimmer_jax, name).__name__ == name
    assert name in dir(glimmer_jax)


def test_unknown_names_raise_attribute_errors():
    with pytest.raises(AttributeError, match="glimmer_jax.*Reader"):
        glimmer_jax.Reader  # noqa: B018 (the access is the test)
