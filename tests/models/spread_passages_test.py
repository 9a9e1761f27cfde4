"""The passages of a question spread over devices: equal results, and who talks to whom when."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from glimmer_jax import axes, partitioning
from glimmer_jax.models.glimmer import Glimmer
from glimmer_jax.models.selection import Live, select
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.preflight import hlo
from tests.models import tiny

ROWS, K = 2, 8
MESH = MeshConfig(data=2, passages=4)
# m = 3 does not divide over four devices, m = 4 does.
UNEVEN = dataclasses.replace(tiny.GLIMMER, num_kept=3)
EVEN = dataclasses.replace(tiny.GLIMMER, num_kept=4)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MESH)


def on(mesh, config):
    """Parameters and a batch on the mesh, as training and question time put them."""
    params, batch = tiny.params(config), tiny.batch(rows=ROWS, passages=K)
    names = tiny.abstract(config)[1]
    placed = jax.device_put(params, partitioning.shardings(names, mesh))
    return placed, jax.device_put(batch, partitioning.batch_shardings(batch, mesh))


def compiled(mesh, function, *args):
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*args).compile(compiler_options=tiny.QUICK)


@pytest.mark.parametrize(
    ("config", "loss"),
    # All terms of the loss, the teacher's passages one a device at a time; and the lightest.
    [(UNEVEN, tiny.FULL_LOSS), (tiny.LUMEN, tiny.LIGHT_LOSS)],
    ids=["glimmer", "lumen"],
)
def test_training_with_spread_passages_equals_training_without(mesh, config, loss):
    loss_fn = tiny.model(config, loss).loss_fn

    def step(params, batch):
        return jax.value_and_grad(lambda p: loss_fn(p, batch, None), has_aux=True)(params)

    params, batch = on(mesh, config)
    got = compiled(mesh, step, params, batch)(params, batch)
    want = tiny.loss_and_grad(config, loss)(tiny.params(config), tiny.batch(rows=ROWS, passages=K))
    tiny.assert_trees_close(got[0], want[0], rtol=1e-5)
    tiny.assert_trees_close(got[1], want[1], rtol=1e-4, atol=1e-5)


def test_answers_with_spread_passages_equal_those_without(mesh):
    predict = tiny.model(UNEVEN).predict_batch_with_aux
    params, batch = on(mesh, UNEVEN)
    tokens, aux = compiled(mesh, predict, params, batch)(params, batch)
    plain = jax.jit(predict, compiler_options=tiny.QUICK)
    want, want_aux = plain(tiny.params(UNEVEN), tiny.batch(rows=ROWS, passages=K))
    np.testing.assert_array_equal(tokens, want)
    tiny.assert_trees_close(aux, want_aux, rtol=1e-5)


def between_passages(text, mesh):
    """Collectives of a program that join devices with different passages of a question."""
    index = np.indices(mesh.devices.shape).reshape(len(mesh.axis_names), -1)
    ways = index[mesh.axis_names.index("passages")]
    return [one for one in hlo.collectives(text) if one.joins(ways)]


def test_before_the_choice_passages_do_not_meet(mesh):
    """Memory encoder and Live-A: all that is asked is whether a question has any passage."""
    apply = functools.partial(Glimmer(EVEN).apply, method="rerank")

    def rerank(params, batch):
        live = apply({"params": params}, batch)
        names = (axes.BATCH, axes.PASSAGES)
        return live._replace(scores=partitioning.constrain(live.scores, names))

    params, batch = on(mesh, EVEN)
    program = compiled(mesh, rerank, params, batch)
    met = between_passages(program.as_text(), mesh)
    assert sum(one.size for one in met) <= ROWS and all(one.times == 1 for one in met)
    states = program(params, batch).states
    assert states.sharding.shard_shape(states.shape)[:2] == (ROWS // 2, K // 4)


@pytest.mark.parametrize("kept", [3, 4])
def test_selection_moves_at_most_twice_the_kept_part_of_the_states(mesh, kept):
    length, dim = 16, 32
    shapes = {"states": (ROWS, K, length, dim), "mask": (ROWS, K, length), "scores": (ROWS, K)}
    # float32: a CPU adds bfloat16 in float32, and would send it so.
    dtypes = {"states": "float32", "mask": "bool", "scores": "float32"}
    spread = jax.NamedSharding(mesh, partitioning.spec((axes.BATCH, axes.PASSAGES)))
    live = Live(*(jax.ShapeDtypeStruct(s, dtypes[n], sharding=spread) for n, s in shapes.items()))
    text = compiled(mesh, lambda live: select(live, kept), live).as_text()
    met = between_passages(text, mesh)
    # What a device receives, of the states of the one question that it shares with three others.
    moved = sum(one.moved(mesh.size) for one in met)
    assert 0 < moved <= 2 * kept / K * (K * length * dim * 4)
    assert all(not one.in_loop for one in met)


def test_selected_states_are_bit_equal(mesh):
    random = np.random.default_rng(0)
    states = random.normal(size=(ROWS, K, 6, 16)).astype(np.float32)
    mask = random.random((ROWS, K, 6)) < 0.7
    scores = random.normal(size=(ROWS, K)).astype(np.float32)
    scores[:, 5:] = -np.inf
    want = select(Live(states, mask, scores), 3)
    spread = jax.NamedSharding(mesh, partitioning.spec((axes.BATCH, axes.PASSAGES)))
    live = jax.device_put(Live(states, mask, scores), spread)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda live: select(live, 3))(live)
    np.testing.assert_array_equal(got[0][:, :3], want[0])
    np.testing.assert_array_equal(got[1][:, :3], want[1])
    np.testing.assert_array_equal(got[2], want[2])
    # Filled up to four, which is what the devices share; the last one is masked.
    assert got[1].shape[1] == 4 and not np.asarray(got[1][:, 3]).any()


def test_after_the_choice_every_device_works_on_its_own_part(mesh):
    """Whole passages never meet: the decoder exchanges sums of its attention, not states."""

    def forward(params, batch):
        return Glimmer(EVEN).apply({"params": params}, batch)[0]

    params, batch = on(mesh, EVEN)
    met = between_passages(compiled(mesh, forward, params, batch).as_text(), mesh)
    one_passage = (tiny.Q + tiny.P) * tiny.T5.emb_dim * 4
    gathered = [one for one in met if one.kind == "all-gather"]
    # Scores and indices are gathered; of states, one reduce-scatter of the kept.
    assert all(one.size < one_passage for one in gathered)
    largest = max(one.size for one in met)
    assert largest <= EVEN.num_kept * one_passage
