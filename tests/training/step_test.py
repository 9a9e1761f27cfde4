"""The step: microbatches, meshes, dropout keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax.partitioning import MeshConfig, make_mesh, put_batch
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.state import init_state, state_from_params, state_shardings
from glimmer_jax.training.step import accumulate, jit_train_step, make_train_step
from tests.training.toy_model import ToyModel, batch_at

CONFIG = OptimizerConfig(learning_rate=0.03, min_dim_size_to_factor=1)
ONE = MeshConfig(data=1)


def three_steps(mesh_config, num_devices, num_microbatches=1, dropout_rate=0.0):
    """(losses, final parameters as numpy) of three steps on a mesh."""
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    model = ToyModel(dropout_rate=dropout_rate)
    optimizer = make_optimizer(CONFIG, model.param_names())
    state = init_state(model.init, optimizer, mesh)
    step = jit_train_step(
        make_train_step(model, optimizer, num_microbatches),
        state_shardings(optimizer, state.params, mesh),
        mesh,
    )
    losses = []
    with jax.set_mesh(mesh):
        for i in range(3):
            state, metrics = step(state, put_batch(batch_at(i), mesh, num_microbatches))
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def undivided():
    return three_steps(ONE, 1)


@pytest.mark.parametrize(
    "mesh_config, num_microbatches",
    [(MeshConfig(data=8), 1), (MeshConfig(data=1, fsdp=2, model=4), 2)],
    ids=["8x1", "2x4 in two microbatches"],
)
def test_sharded_training_equals_unsharded(undivided, mesh_config, num_microbatches):
    losses, params = three_steps(mesh_config, 8, num_microbatches)
    np.testing.assert_allclose(losses, undivided[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, undivided[1]
    )


@pytest.mark.parametrize("num_microbatches", [2, 8])
def test_accumulated_gradient_equals_the_undivided_one(num_microbatches):
    model = ToyModel()
    params = model.init()
    batch = {k: jnp.asarray(v) for k, v in batch_at(0).items() if k != "passage_ids"}
    normalizers = model.loss_normalizers(batch)

    def fn(part, key):
        return jax.value_and_grad(model.loss_fn, has_aux=True)(params, part, key, normalizers)

    key = jax.random.key(0)
    (loss, sums), grads = jax.jit(lambda: accumulate(fn, batch, key, 1))()
    (loss_n, sums_n), grads_n = jax.jit(lambda: accumulate(fn, batch, key, num_microbatches))()
    np.testing.assert_allclose(loss_n, loss, rtol=1e-6)
    np.testing.assert_allclose(sums_n["token_loss"], sums["token_loss"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads_n, grads
    )


def test_dropout_is_the_same_on_every_mesh(undivided):
    losses, _ = three_steps(ONE, 1, dropout_rate=0.3)
    other_mesh, _ = three_steps(MeshConfig(data=8), 8, dropout_rate=0.3)
    np.testing.assert_allclose(other_mesh, losses, rtol=1e-5)
    assert abs(undivided[0][0] - losses[0]) > 1e-3


def test_metrics_of_a_step():
    model = ToyModel()
    optimizer = make_optimizer(CONFIG, model.param_names())
    params = model.init()
    state = state_from_params(params, optimizer, make_mesh(ONE, jax.devices()[:1]))
    batch = {k: v for k, v in batch_at(0).items() if k != "passage_ids"}
    new, metrics = jax.jit(make_train_step(model, optimizer))(state, batch)
    loss, sums = model.loss_fn(params, batch, None)
    assert new.step == 1 and new.step.dtype == jnp.int32
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["sums"]["token_loss"], sums["token_loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], 0.03, rtol=1e-6)
    assert metrics["grad_norm"] > 0


def test_given_parameters_survive_training():
    model = ToyModel()
    optimizer = make_optimizer(CONFIG, model.param_names())
    mesh = make_mesh(ONE, jax.devices()[:1])
    params = model.init()
    state = state_from_params(params, optimizer, mesh)
    step = jit_train_step(
        make_train_step(model, optimizer), state_shardings(optimizer, params, mesh), mesh
    )
    with jax.set_mesh(mesh):
        new, _ = step(state, put_batch(batch_at(0), mesh))
    assert state.params["output"]["kernel"].is_deleted()
    assert not np.array_equal(params["output"]["kernel"], new.params["output"]["kernel"])


def test_parameters_of_another_model_are_rejected():
    optimizer = make_optimizer(CONFIG, ToyModel().param_names())
    params = ToyModel(scan_layers=False).init()
    with pytest.raises(ValueError, match="only one.*stack/layers/norm/scale"):
        state_from_params(params, optimizer, make_mesh(MeshConfig(data=8)))


def test_a_mesh_that_does_not_divide_the_parameters_is_rejected():
    model = ToyModel()
    optimizer = make_optimizer(CONFIG, model.param_names())
    mesh = make_mesh(MeshConfig(data=1, fsdp=3), jax.devices()[:3])
    with pytest.raises(ValueError, match="evenly"):
        init_state(model.init, optimizer, mesh)
