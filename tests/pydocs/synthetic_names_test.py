"""Made-up names: pieces of real ones, some of them blends or names that repeat what came before."""

import random

from glimmer_jax.pydocs.synthetic_names import BLENDED, REPEATED, made_up_name

PARTS = ["alpha", "bravo", "charlie"]


def names(before=(), count=2000):
    draw = random.Random(0)
    return [made_up_name(PARTS, draw, before) for _ in range(count)]


def is_blend(name, heads, tails):
    return any(
        head.startswith(name[:cut]) and tail.endswith(name[cut:])
        for cut in range(1, len(name))
        for head in heads
        for tail in tails
    )


def test_a_name_is_a_part_or_the_head_of_one_and_the_tail_of_another():
    assert all(name in PARTS or is_blend(name, PARTS, PARTS) for name in names())


def test_about_as_many_are_blends_as_the_share_says():
    # A blend may happen to be a part: of one part with itself, cut at the same place.
    share = sum(name not in PARTS for name in names()) / 2000
    assert BLENDED - 0.1 < share < BLENDED + 0.03


def test_blends_take_pieces_of_the_names_before_and_whole_ones():
    made = [name for name in names(before=["Z_YX"]) if name.upper() != "Z_YX"]
    assert 0.1 < sum(not name.islower() for name in made) / len(made) < 0.35
    assert any(name.startswith("Z_YX") for name in made)


def test_the_last_two_names_come_again_in_all_capitals():
    made = names(before=["oldest", "elemTree", "_build"])
    again = [name for name in made if name.lower() in ("oldest", "elemtree", "_build")]
    assert {"elemTree", "elemtree", "ELEMTREE", "ElemTree", "_build", "_BUILD"} <= set(again)
    assert abs(len(again) / len(made) - REPEATED) < 0.05


def test_names_depend_on_the_draws_alone():
    assert names() == names()
