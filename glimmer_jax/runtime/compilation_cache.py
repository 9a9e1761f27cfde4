"""The folder that keeps compiled programs between processes."""

from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX's; "" disables the cache
FOLDER = str(Path.home() / ".cache" / "glimmer_jax" / "xla")
