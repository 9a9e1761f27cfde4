"""Adafactor against optax and against the layers one by one; freezing; state names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.training.adafactor import adafactor, adafactor_names, factor
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer, merge
from glimmer_jax.training.schedule import make_schedule
from glimmer_jax.training.state import abstract_state, state_shardings
from tests.training.toy_model import L, ToyModel, batch_at

SMALL = dict(min_dim_size_to_factor=1)


def run(transformation, params, grads_of_steps):
    state, update = transformation.init(params), jax.jit(transformation.update)
    for grads in grads_of_steps:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def random_like(params, seed):
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves])


@pytest.mark.parametrize("min_size", [1, 128])
def test_adafactor_equals_optax_on_plain_matrices(min_size):
    names = {"kernel": ("embed", "mlp"), "embedding": ("vocab", "embed"), "scale": ("embed",)}
    params = {"kernel": jnp.ones((8, 12)), "embedding": jnp.ones((20, 8)), "scale": jnp.ones(8)}
    params = jax.tree.map(lambda a, b: a + 0.1 * b, params, random_like(params, 0))
    grads = [random_like(params, seed) for seed in (1, 2, 3)]
    ours, _ = run(
        adafactor(make_schedule("constant", 0.1, 0, 0), names, min_dim_size_to_factor=min_size),
        params,
        grads,
    )
    reference, _ = run(
        optax.adafactor(0.1, min_dim_size_to_factor=min_size, multiply_by_parameter_scale=True),
        params,
        grads,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), ours, reference
    )


def test_adafactor_equals_a_float64_reference_with_head_dimensions():
    # [layers, embed, heads, kv]: rows are embed, columns are heads and kv together.
    rng = np.random.default_rng(0)
    param = rng.normal(size=(2, 6, 3, 4))
    grads = rng.normal(size=(3, *param.shape))
    names = {"kernel": ("layers", "embed", "heads", "kv")}
    transformation = adafactor(lambda step: 0.01 * (step + 1), names, **SMALL)
    ours, state = run(
        transformation,
        {"kernel": jnp.asarray(param, jnp.float32)},
        [{"kernel": jnp.asarray(g, jnp.float32)} for g in grads],
    )
    assert state.moments["kernel"]["row"].shape == (2, 6)
    assert state.moments["kernel"]["column"].shape == (2, 3, 4)
    for layer in range(2):
        p, row, column = param[layer].reshape(6, 12), 0.0, 0.0
        for t, grad in enumerate(grads[:, layer].reshape(3, 6, 12)):
            decay = 1 - (t + 1) ** -0.8
            row = decay * row + (1 - decay) * (grad**2 + 1e-30).mean(1)
            column = decay * column + (1 - decay) * (grad**2 + 1e-30).mean(0)
            update = grad / np.sqrt(np.outer(row, column) / row.mean())
            update /= max(1.0, np.sqrt((update**2).mean()))
            p = p - 0.01 * (t + 1) * max(1e-3, np.sqrt((p**2).mean())) * update
        np.testing.assert_allclose(ours["kernel"][layer].reshape(6, 12), p, rtol=1e-5, atol=1e-6)


def test_scanned_layers_train_as_unrolled_ones():
    results = []
    for scan_layers in (True, False):
        model = ToyModel(scan_layers)
        optimizer = make_optimizer(OptimizerConfig(**SMALL), model.param_names())
        params = model.init()
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        grad = jax.jit(jax.grad(model.loss_fn, has_aux=True))
        for step in range(3):
            params, state = update(grad(params, batch_at(step), None)[0], state, params)
        results.append(params)
    scanned, looped = results
    looped["stack"] = {
        "layers": jax.tree.map(
            lambda *x: jnp.stack(x), *(looped["stack"][f"layers_{i}"] for i in range(L))
        )
    }
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), scanned, looped
    )


def test_momentum_averages_updates():
    names, params = {"scale": ("embed",)}, {"scale": jnp.ones(4)}
    rate = make_schedule("constant", 0.1, 0, 0)
    grads = [{"scale": jnp.full(4, 2.0)}]
    plain, _ = run(adafactor(rate, names), params, grads)
    slow, state = run(adafactor(rate, names, momentum=0.9), params, grads)
    np.testing.assert_allclose(1 - slow["scale"], 0.1 * (1 - plain["scale"]), rtol=1e-5)
    assert set(state.moments["scale"]) == {"full", "momentum"}


def test_dimension_names_decide_the_factors():
    assert factor(("embed", "mlp"), (256, 512), 128).rows == (0,)
    assert factor(("layers", "mlp", "embed"), (2, 512, 256), 128).columns == (1,)
    assert not factor(("embed", "mlp"), (64, 512), 128).factored
    assert not factor(("heads", "relpos_buckets"), (512, 512), 1).factored
    assert factor(("layers", "embed"), (4, 8), 1).reduced == (1,)


def test_a_name_without_a_rule_is_rejected():
    with pytest.raises(ValueError, match="cannot factor.*names.*FACTOR_RULES"):
        factor(("embed", "width"), (4, 4), 1)


def test_rows_and_columns_beside_an_unfactored_dimension_are_rejected():
    with pytest.raises(ValueError, match="neither"):
        factor(("embed", "mlp", "relpos_buckets"), (4, 4, 4), 1)


def test_adafactor_without_parameters_is_rejected():
    transformation = adafactor(lambda step: 0.1, {"scale": ("embed",)})
    params = {"scale": jnp.ones(4)}
    with pytest.raises(ValueError, match="params"):
        transformation.update(params, transformation.init(params))


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_frozen_parameters_get_no_update_and_no_state(name):
    model = ToyModel()
    names = model.param_names()
    frozen = jax.tree.map(lambda _: False, names, is_leaf=lambda x: isinstance(x, tuple))
    frozen["embedder"]["embedding"] = True
    optimizer = make_optimizer(OptimizerConfig(name=name), names, frozen)
    params = model.init()
    state = optimizer.init(params)
    assert params["embedder"]["embedding"].shape not in {x.shape for x in jax.tree.leaves(state)}
    trained, kept = optimizer.split(params)
    assert list(kept) == ["embedder"] and "embedder" not in trained
    grads = jax.tree.map(jnp.ones_like, trained)
    new, _ = jax.jit(optimizer.update)(grads, state, params)
    np.testing.assert_array_equal(new["embedder"]["embedding"], params["embedder"]["embedding"])
    assert not np.array_equal(new["output"]["kernel"], params["output"]["kernel"])
    assert jax.tree.structure(merge(trained, kept)) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "config", [SMALL, dict(SMALL, momentum=0.9, max_grad_norm=1.0), {"name": "adamw"}]
)
def test_the_state_is_sharded_as_its_parameters(config):
    model = ToyModel()
    optimizer = make_optimizer(OptimizerConfig(**config), model.param_names())
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    shapes = jax.eval_shape(model.init)
    shardings = state_shardings(optimizer, shapes, mesh)
    abstract = abstract_state(optimizer, shapes, mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(shardings)
    for leaf in jax.tree.leaves(abstract):
        assert leaf.ndim == 0 or not leaf.sharding.is_fully_replicated
        leaf.sharding.shard_shape(leaf.shape)  # raises if the sharding does not fit


def test_factored_moments_keep_the_surviving_names():
    names = {"kernel": ("layers", "embed", "heads", "kv")}
    shapes = {"kernel": jax.ShapeDtypeStruct((2, 8, 4, 4), jnp.float32)}
    moments = adafactor_names(names, shapes, **SMALL).moments["kernel"]
    assert moments == {"row": ("layers", "embed"), "column": ("layers", "heads", "kv")}


def test_schedules():
    def rates(*args):
        return [float(make_schedule(*args)(jnp.int32(step))) for step in (0, 1, 3, 6, 8, 100)]

    np.testing.assert_allclose(rates("constant", 2.0, 4, 0), [0.5, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(rates("constant", 2.0, 0, 0), [2] * 6)
    np.testing.assert_allclose(rates("linear", 2.0, 4, 8), [0.5, 1, 2, 1, 0, 0])
    np.testing.assert_allclose(rates("rsqrt", 2.0, 4, 0), [1, 1, 1, 2 / 6**0.5, 2 / 8**0.5, 0.2])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "sgd"}, "must be 'adafactor' or 'adamw'"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"warmup_steps": -1}, "warmup_steps.*-1"),
        ({"weight_decay": 0.1}, "weight_decay.*adamw"),
        ({"schedule": "cosine"}, "must be one of constant"),
        ({"schedule": "rsqrt"}, "give warmup_steps >= 1"),
        ({"schedule": "linear", "warmup_steps": 5}, "above warmup_steps"),
    ],
)
def test_invalid_settings_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**change)


def test_freezing_everything_or_another_tree_is_rejected():
    names = {"a": ("embed",), "b": ("embed",)}
    with pytest.raises(ValueError, match="parameter .*frozen"):
        make_optimizer(OptimizerConfig(), names, {"a": True, "b": True})
    with pytest.raises(ValueError, match=r"bool .*parameter.*'b'"):
        make_optimizer(OptimizerConfig(), names, {"a": True})
