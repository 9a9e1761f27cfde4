"""Synthetic names: parts of real ones, blends of two parts, and variants of previous names."""

import random

from glimmer_jax.pydocs.synthetic_names import BLENDED, REPEATED, synthetic_name

PARTS = ["alpha", "bravo", "charlie"]


def names(previous=(), count=2000):
    draw = random.Random(0)
    return [synthetic_name(PARTS, draw, previous) for _ in range(count)]


def is_blend(name, heads, tails):
    return any(
        head.startswith(name[:cut]) and tail.endswith(name[cut:])
        for cut in range(1, len(name))
        for head in heads
        for tail in tails
    )


def test_a_name_is_a_part_or_the_head_of_one_and_the_tail_of_another():
    assert all(name in PARTS or is_blend(name, PARTS, PARTS) for name in names())


def test_the_share_of_blends_is_about_blended():
    # A blend of a part with itself, cut at the same place, is that part.
    share = sum(name not in PARTS for name in names()) / 2000
    assert BLENDED - 0.1 < share < BLENDED + 0.03


def test_blends_use_pieces_of_previous_names_and_complete_ones():
    new = [name for name in names(previous=["Z_YX"]) if name.upper() != "Z_YX"]
    assert 0.1 < sum(not name.islower() for name in new) / len(new) < 0.35
    assert any(name.startswith("Z_YX") for name in new)


def test_the_last_two_names_repeat_in_every_capitalisation():
    drawn = names(previous=["oldest", "elemTree", "_build"])
    repeated = [name for name in drawn if name.lower() in ("oldest", "elemtree", "_build")]
    assert {"elemTree", "elemtree", "ELEMTREE", "ElemTree", "_build", "_BUILD"} <= set(repeated)
    assert abs(len(repeated) / len(drawn) - REPEATED) < 0.05


def test_names_depend_only_on_the_seed():
    assert names() == names()
