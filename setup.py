"""Packages glimmer_jax with its gin files, tasks and launchers.

`gin/`, `tasks/` and `launch/` are top-level folders of the repository. A wheel contains them inside
the package (`glimmer_jax/_shipped`), because a top-level package named `gin` would shadow the gin
library. `glimmer_jax.shipped` finds them in both places.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
SHIPPED = ("gin", "tasks", "launch")

CORE = [
    "jax>=0.10",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "tensorstore>=0.1.80",
    "numpy>=2",
    "ml_dtypes>=0.5",
    "etils>=1.12",
    "sentencepiece>=0.2.1",
    "safetensors>=0.6",
    "msgpack>=1.0",
    "bm25s>=0.3",
    "PyStemmer>=3",
    "gin-config>=0.5",
    "flatbuffers>=24",  # jax.export needs it, but does not depend on it
]
# Only glimmer_jax.data and tasks/ import these. The default install has them because training and
# evaluation read their examples through seqio.
DATA = [
    "seqio>=0.0.20",
    "tensorflow>=2.20",
    "tensorflow-text>=2.20",
    "tensorflow-datasets>=4.9.9",
]
PLOTS = ["matplotlib>=3.9"]
TENSORBOARD = ["tensorboardX>=2.6.4"]
SERVE = ["starlette>=1.0", "uvicorn>=0.40", "prometheus-client>=0.21"]
EXTRAS = {
    # Figures of the experiments.
    "plots": PLOTS,
    # TensorBoard files beside metrics.jsonl.
    "tensorboard": TENSORBOARD,
    # Corpora: Parquet files, and conversion in many processes.
    "parquet": ["pyarrow>=18"],
    # Beam takes protobuf below 7, and sentencepiece 0.2.3 needs 7: `import seqio` would fail. seqio's own
    # cache script also needs google-crc32c.
    "beam": ["apache-beam>=2.60", "sentencepiece<0.2.3", "google-crc32c"],
    "parity": ["torch>=2.6", "transformers>=5"],
    # Schemas of Kubernetes and of the TPU API, for the tests of the launchers only.
    "cloud": ["kubernetes-validate>=1.33", "google-cloud-tpu>=1.24"],
    # Sweeps. Install with constraints.txt: pip alone takes very long to resolve the versions.
    "xm": ["xmanager>=0.8"],
    "tpu": ["jax[tpu]>=0.10"],
    # XLA's TPU compiler for machines without a TPU, in the version that jax requires.
    "preflight": ["jax[tpu]>=0.10"],
    "cuda12": ["jax[cuda12]>=0.10"],
    "cuda13": ["jax[cuda13]>=0.10"],
    # The HTTP server.
    "serve": SERVE,
    # Tests of the server's page, with an installed Chromium.
    "browser": ["playwright>=1.50"],
    "dev": [
        *PLOTS,
        *TENSORBOARD,
        *SERVE,
        "httpx2>=2.16",  # starlette's test client
        "hypothesis>=6.100",
        "mypy>=1.15",
        "pre-commit>=4",
        "pre-commit-hooks>=5",
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
    ],
}


def version() -> str:
    text = (ROOT / "glimmer_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def shipped_packages() -> dict[str, str]:
    """Package name in the wheel -> folder in the repository."""
    packages = {}
    for name in SHIPPED:
        for folder in [ROOT / name, *sorted((ROOT / name).rglob("*"))]:
            if folder.is_dir() and folder.name != "__pycache__":
                relative = folder.relative_to(ROOT).as_posix()
                packages["glimmer_jax._shipped." + relative.replace("/", ".")] = relative
    return packages


packages = shipped_packages()
setup(
    name="glimmer-jax",
    version=version(),
    description="GLIMMER, LUMEN and FiD in JAX: memory, reranking and reading in one model",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["glimmer_jax", "glimmer_jax.*"]), *packages],
    package_dir=packages,
    package_data={"": ["*.gin", "*.md", "*.model", "*.html"], "glimmer_jax": ["checkpoints/*"]},
    install_requires=CORE + DATA,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["glimmer = glimmer_jax.main:run"]},
)
