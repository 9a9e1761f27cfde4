"""GLIMMER, LUMEN and FiD in JAX: one retrieval-augmented reader with three cuts.

The public names below are imported at first use, so that `import glimmer_jax` imports neither JAX
nor Flax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glimmer_jax.memory.store import MemoryStore
    from glimmer_jax.models.glimmer import GlimmerConfig
    from glimmer_jax.models.model import GlimmerModel
    from glimmer_jax.models.t5 import T5Config
    from glimmer_jax.serving.predictor import Predictor

__version__ = "0.1.0"

__all__ = ["GlimmerConfig", "GlimmerModel", "MemoryStore", "Predictor", "T5Config"]

_MODULES = {
    "GlimmerConfig": "glimmer_jax.models.glimmer",
    "GlimmerModel": "glimmer_jax.models.model",
    "MemoryStore": "glimmer_jax.memory.store",
    "Predictor": "glimmer_jax.serving.predictor",
    "T5Config": "glimmer_jax.models.t5",
}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
