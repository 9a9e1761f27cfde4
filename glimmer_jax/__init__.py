"""GLIMMER, LUMEN and FiD in JAX: one retrieval-augmented reader with three cuts."""

__version__ = "0.1.0"
