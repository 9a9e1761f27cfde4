"""Recut moves layers, keeps the function, and rejects cuts that would change it."""

import dataclasses

import jax
import numpy as np
import pytest

from glimmer_jax.models.recut import recut
from glimmer_jax.models.stacking import unstack_layers
from tests.models import tiny

KEEPS_ALL = dataclasses.replace(tiny.GLIMMER, num_kept=None)
FROZEN_LUMEN = dataclasses.replace(tiny.LUMEN, freeze_memory=True, share_question_encoder=False)
SEPARATE = dataclasses.replace(KEEPS_ALL, separate_reranker=True)


@pytest.fixture(scope="module")
def fid():
    return tiny.params(tiny.FID)


def nudged(tree):
    return jax.tree.map(lambda x: x + 1, tree)


def test_going_round_the_family_gives_the_same_bits(fid):
    cuts = [tiny.FID, tiny.GLIMMER, tiny.LUMEN, FROZEN_LUMEN, SEPARATE, KEEPS_ALL, tiny.FID]
    params = fid
    for source, target in zip(cuts, cuts[1:], strict=False):
        params = recut(params, source, target)
        want = jax.tree.map(lambda x: (x.shape, x.dtype), tiny.abstract(target)[0])
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == want
    tiny.assert_trees_equal(params, fid)


def test_a_recut_to_looped_layers_gives_looped_parameters(fid):
    looped = dataclasses.replace(KEEPS_ALL, t5=dataclasses.replace(tiny.T5, scan_layers=False))
    tiny.assert_trees_equal(
        recut(fid, tiny.FID, looped), unstack_layers(recut(fid, tiny.FID, KEEPS_ALL))
    )


def test_cuts_that_keep_m_compute_the_same_function():
    """Between LUMEN and GLIMMER, frozen or not, with one question encoder or two."""
    params, batch = tiny.params(KEEPS_ALL), tiny.batch()
    want = tiny.forward(KEEPS_ALL)(params, batch)[0]
    for target in (tiny.LUMEN, FROZEN_LUMEN):
        got = tiny.forward(target)(recut(params, KEEPS_ALL, target), batch)[0]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_new_score_head_lets_the_retrievers_order_stand(fid):
    batch = tiny.batch()
    _, live, kept = tiny.forward(tiny.GLIMMER)(recut(fid, tiny.FID, tiny.GLIMMER), batch)
    exists = (batch["passage_tokens"] > 0).any(-1)
    np.testing.assert_array_equal(live.scores, np.where(exists, 0.0, -np.inf))
    np.testing.assert_array_equal(kept[0], [0, 1])
    np.testing.assert_array_equal(kept[1], [0, 2])  # the second is absent


def test_an_old_score_head_is_kept():
    params = tiny.params(tiny.GLIMMER)
    kept = recut(params, tiny.GLIMMER, KEEPS_ALL)["reranker"]
    tiny.assert_trees_equal(kept, params["reranker"])


def test_a_separate_reranker_starts_as_a_copy_of_live_a(fid):
    params = recut(fid, tiny.FID, SEPARATE)
    tiny.assert_trees_equal(params["reranker"]["stack"], params["live_encoder"]["live_a"])


def test_a_trained_question_encoder_moves_along(fid):
    params = recut(fid, tiny.FID, FROZEN_LUMEN)
    params["question_encoder"] = nudged(params["question_encoder"])
    params["token_embedder"] = nudged(params["token_embedder"])
    moved = recut(params, FROZEN_LUMEN, tiny.FROZEN)
    tiny.assert_trees_equal(moved["question_encoder"], params["question_encoder"])
    tiny.assert_trees_equal(moved["memory_embedder"], params["memory_embedder"])
    tiny.assert_trees_equal(moved["token_embedder"], params["token_embedder"])


def test_layers_that_would_change_their_position_table_are_rejected():
    params = tiny.params(KEEPS_ALL)  # with two different tables
    with pytest.raises(ValueError, match="memory_layers=2 .* 0.*position tables.*differ"):
        recut(params, KEEPS_ALL, tiny.FID)
    longer = dataclasses.replace(tiny.LUMEN, memory_layers=3)
    with pytest.raises(ValueError, match="memory_layers=2 .* 3.*Recut before training"):
        recut(params, KEEPS_ALL, longer)


@pytest.mark.parametrize(
    "part, target, match",
    [
        ("question_encoder", tiny.LUMEN, "cannot be merged.*share_question_encoder=False"),
        (
            "question_encoder",
            dataclasses.replace(FROZEN_LUMEN, memory_layers=3),
            "memory_layers=2 .* 3.*question and memory encoder differ",
        ),
        (
            "token_embedder",
            dataclasses.replace(FROZEN_LUMEN, freeze_memory=False),
            "cannot be merged.*freeze_memory=True",
        ),
    ],
)
def test_copies_with_different_values_are_not_merged(fid, part, target, match):
    params = recut(fid, tiny.FID, FROZEN_LUMEN)
    params[part] = nudged(params[part])
    with pytest.raises(ValueError, match=match):
        recut(params, FROZEN_LUMEN, target)


def test_another_size_is_rejected(fid):
    wide = dataclasses.replace(tiny.FID, t5=dataclasses.replace(tiny.T5, mlp_dim=64))
    with pytest.raises(ValueError, match="mlp_dim=32 .*mlp_dim=64"):
        recut(fid, tiny.FID, wide)


def test_numerics_may_change(fid):
    t5 = dataclasses.replace(tiny.T5, dtype="bfloat16", dropout_rate=0.1, remat_policy="full")
    tiny.assert_trees_equal(recut(fid, tiny.FID, dataclasses.replace(tiny.FID, t5=t5)), fid)


def test_a_trained_shared_table_lets_the_cut_move(fid):
    shared = dataclasses.replace(KEEPS_ALL, share_position_table=True)
    params = recut(fid, tiny.FID, shared)
    params["live_encoder"]["relpos_bias"] = nudged(params["live_encoder"]["relpos_bias"])
    longer = dataclasses.replace(shared, memory_layers=3)
    back = recut(recut(recut(params, shared, longer), longer, tiny.FID), tiny.FID, shared)
    np.testing.assert_array_equal(
        back["live_encoder"]["relpos_bias"]["rel_embedding"],
        params["live_encoder"]["relpos_bias"]["rel_embedding"],
    )


def test_two_tables_that_differ_do_not_become_one():
    shared = dataclasses.replace(KEEPS_ALL, share_position_table=True)
    with pytest.raises(ValueError, match="share_position_table.*differ"):
        recut(tiny.params(KEEPS_ALL), KEEPS_ALL, shared)


def test_where_no_parameter_moves_the_tree_is_left_as_it_is(fid):
    params = recut(fid, tiny.FID, tiny.GLIMMER)
    other = dataclasses.replace(tiny.GLIMMER, num_kept=1, memory_codec="bf16")
    assert recut(params, tiny.GLIMMER, other) is params


def test_on_the_host_it_stays_on_the_host(fid):
    """A device would have to hold all of a large model, and then give it back."""
    looped = dataclasses.replace(SEPARATE, t5=dataclasses.replace(tiny.T5, scan_layers=False))
    with jax.transfer_guard("disallow_explicit"):
        params = recut(recut(fid, tiny.FID, looped), looped, SEPARATE)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
