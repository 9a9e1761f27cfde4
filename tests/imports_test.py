"""What may import what: layers go down only, and the core runs without tensorflow, seqio or gin."""

import ast
import importlib
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import glimmer_jax

PACKAGE = pathlib.Path(glimmer_jax.__file__).parent
ROOT = PACKAGE.parent

# From the bottom up: a module imports modules of its own group and of groups above it in this list.
LAYERS = (
    ("axes",),
    ("partitioning",),
    ("runtime",),
    ("storage",),
    ("kilt",),
    ("vocabulary",),
    ("corpus",),
    ("metrics",),
    ("codecs",),
    ("losses", "decoding"),
    ("nn",),
    ("models",),
    ("memory",),
    ("weights",),
    ("training",),
    ("retrieval",),
    ("pydocs",),
    ("data",),
    ("serving",),
    ("server",),
    ("preflight",),
    ("shipped",),
    ("modes",),
    ("t5x_adapter",),
    ("value_types", "configuration"),
    ("main",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Data hangs on the ground alone: it knows files and batches, no model.
DATA_MAY_USE = {"axes", "storage", "kilt", "vocabulary", "corpus", "metrics", "data"}
CORE = (
    "axes",
    "partitioning",
    "codecs",
    "losses",
    "models",
    "memory",
    "weights",
    "training",
    "retrieval",
)

MODULES = [
    module.name
    for module in pkgutil.walk_packages(glimmer_jax.__path__, "glimmer_jax.")
    if "._shipped" not in module.name
]


def group(module):
    """`glimmer_jax.models.t5` -> `models`."""
    return module.split(".")[1] if "." in module else ""


def imports_at_top(path):
    """Modules that a file imports when it is imported; those inside functions come later."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def path_of(module):
    base = ROOT / module.replace(".", "/")
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    own = group(module)
    assert own in LEVEL, f"{own} has no place in LAYERS."
    for imported in imports_at_top(path_of(module)):
        if not imported.startswith("glimmer_jax."):
            continue
        other = group(imported)
        if other not in LEVEL:  # A name of glimmer_jax itself, such as __version__.
            continue
        assert LEVEL[other] <= LEVEL[own], f"{module} imports {imported}, which is above it."
        if own == "data":
            assert other in DATA_MAY_USE, f"{module} imports {imported}; data imports no model."


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_stay_in_their_places(module):
    heavy = {name.split(".")[0] for name in imports_at_top(path_of(module))}
    if group(module) != "data":
        assert not heavy & {"tensorflow", "seqio", "tensorflow_datasets", "clu", "torch"}
    if group(module) != "configuration":
        assert "gin" not in heavy


@pytest.mark.parametrize("module", [name for name in MODULES if group(name) != "data"])
def test_every_module_imports(module):
    importlib.import_module(module)


BLOCKED_RUN = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "seqio", "gin", "clu", "tensorflow_datasets"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())

import importlib, pkgutil
import glimmer_jax
for module in pkgutil.walk_packages(glimmer_jax.__path__, "glimmer_jax."):
    if module.name.split(".")[1] in CORE:
        importlib.import_module(module.name)

import jax, numpy as np
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import MeshConfig, make_mesh, put_batch
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.state import init_state, state_shardings
from glimmer_jax.training.step import jit_train_step, make_train_step
from tests.models import tiny

model = GlimmerModel(GlimmerConfig(tiny.T5, memory_layers=1, rerank_layers=1, num_kept=1))
rows = lambda *shape: np.ones(shape, np.int32)
batch = dict(
    question_tokens=rows(2, 2), passage_tokens=rows(2, 2, 3), decoder_input_tokens=rows(2, 2),
    decoder_target_tokens=rows(2, 2), decoder_loss_weights=np.ones((2, 2), np.float32),
)
shapes, names = model.abstract_variables()
optimizer = make_optimizer(OptimizerConfig(), names)
mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
fresh = lambda: model.get_initial_variables(
    jax.random.key(0), {name: x.shape for name, x in batch.items()}
)["params"]
state = init_state(fresh, optimizer, mesh)
step = jit_train_step(
    make_train_step(model, optimizer), state_shardings(optimizer, shapes, mesh), mesh
)
with jax.set_mesh(mesh):
    state, metrics = step(state, put_batch(batch, mesh))
assert int(state.step) == 1 and np.isfinite(metrics["loss"])
print("trained")
"""


def test_core_trains_without_tensorflow_seqio_gin_and_clu():
    code = BLOCKED_RUN.replace("CORE", repr(CORE))
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "trained", run.stderr
