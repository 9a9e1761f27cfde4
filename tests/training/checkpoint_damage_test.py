"""Seeded damage to the checkpoints of a run: a reader or a resumed run is right, or reports it."""

import shutil

import jax
import numpy as np
import pytest

from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.training.checkpoint import Checkpoints
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.state import TrainState, abstract_state, init_state
from glimmer_jax.weights.load import load
from tests import damage
from tests.training.toy_model import ToyModel

MODEL = ToyModel()
OPTIMIZER = make_optimizer(OptimizerConfig(), MODEL.param_names())
RUN = dict(keep_latest=2, best_metric="em", metadata={"seed": 0})
SCORES = {1: 0.9, 2: 0.3, 3: 0.5}


def state_of(step, mesh):
    """A state whose numbers identify its step."""
    state = init_state(MODEL.init, OPTIMIZER, mesh)
    params = jax.tree.map(lambda x: jax.numpy.full_like(x, step), state.params)
    return TrainState(jax.numpy.int32(step), params, state.opt_state)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def run(tmp_path_factory, mesh):
    """(a run with steps 1 to 3, the run when it had step 1 only)."""
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder / "now", **RUN) as checkpoints:
        for step, score in SCORES.items():
            checkpoints.save(state_of(step, mesh), {"em": score})
            checkpoints.wait()
            if step == 1:
                shutil.copytree(folder / "now", folder / "older")
    return folder / "now", folder / "older"


def value_of(params):
    values = {float(np.unique(np.asarray(leaf)).item()) for leaf in jax.tree.leaves(params)}
    (value,) = values
    return value


@pytest.mark.parametrize(
    ("seed", "count"),
    [(0, 28), *(pytest.param(seed, 50, marks=pytest.mark.slow) for seed in range(1, 6))],
)
def test_a_damaged_run_is_read_correctly_or_rejected(run, seed, count):
    now, older = run
    for attack in damage.attacks(now, seed=seed, count=count, older=older):
        message = ""
        try:
            loaded = load(now)
        except ValueError as error:
            message = str(error)
        if message:
            assert str(now) in message, attack
            continue
        # The best of the steps whose metadata is intact, and exactly as it was saved.
        step = int(loaded.what.split()[1])
        assert value_of(loaded.params) == step in SCORES, attack


@pytest.mark.parametrize(
    ("seed", "count"),
    [(10, 14), *(pytest.param(seed, 50, marks=pytest.mark.slow) for seed in range(11, 16))],
)
def test_a_damaged_run_resumes_from_its_newest_intact_step(run, mesh, tmp_path, seed, count):
    now, older = run
    target = abstract_state(OPTIMIZER, jax.eval_shape(MODEL.init), mesh)
    for number, attack in enumerate(damage.attacks(now, seed=seed, count=count, older=older)):
        copy = shutil.copytree(now, tmp_path / str(number))
        with Checkpoints(copy, **RUN) as checkpoints:
            steps = checkpoints.steps()
            restored = checkpoints.restore(target)
            best = checkpoints.best_step()
        assert int(restored.step) == value_of(restored.params) == max(steps), attack
        assert best == max(steps, key=SCORES.get), attack
        # One attack damages one step, unless it swaps two.
        assert len(steps) >= 2 or "swap_" in attack, attack
        kept = [path for path in copy.glob("**/params") if path.is_dir()]
        assert len(kept) >= 2, attack
        shutil.rmtree(copy)
