import pytest
from hypothesis import given
from hypothesis import strategies as st

from glimmer_jax.corpus.words import MAX_WORD, pieces, split_words

WORD = st.sampled_from(["a", "b", "c.", "d!”", "e)"])
PARAGRAPHS = st.lists(st.lists(WORD, max_size=12).map(" ".join), max_size=6)


@given(PARAGRAPHS, st.integers(2, 8), st.sampled_from(["", "H", "A long heading of many words"]))
def test_pieces_are_all_words_in_order_and_none_is_too_long(texts, limit, heading):
    found = list(pieces(enumerate(texts), limit, heading))
    head = heading.split()[: limit // 2]
    words = []
    for piece in found:
        inside = piece.text.split()
        assert len(head) < len(inside) <= limit
        assert inside[: len(head)] == head
        words += inside[len(head) :]
    assert words == " ".join(texts).split()


@given(PARAGRAPHS, st.integers(2, 8))
def test_pieces_name_their_first_and_last_paragraph(texts, limit):
    # Each word carries its paragraph.
    marked = [
        (number, " ".join(f"{number}:{word}" for word in text.split()))
        for number, text in enumerate(texts)
    ]
    for piece in pieces(marked, limit):
        inside = [int(word.split(":")[0]) for word in piece.text.split()]
        assert (piece.first, piece.last) == (inside[0], inside[-1])


@pytest.mark.parametrize(
    "texts, wanted",
    [
        (["a b c d e f g"], ["a b c d", "e f g"]),
        (["a b c. d e f g"], ["a b c.", "d e f g"]),
        (["a b. c d e f"], ["a b. c d", "e f"]),
        (['a b "c." d e f'], ['a b "c."', "d e f"]),
        (["a b c", "d e f"], ["a b c", "d e f"]),
        (["a\u2028b\n c", " ", "d"], ["a b c d"]),
        (["", " \t"], []),
        ([], []),
    ],
)
def test_a_cut_is_behind_a_sentence_or_paragraph_if_it_can(texts, wanted):
    assert [piece.text for piece in pieces(enumerate(texts), 4)] == wanted


def test_text_without_spaces_is_cut_up():
    long = "漢" * (2 * MAX_WORD + 1)
    assert [len(word) for word in split_words(f"a {long}")] == [1, MAX_WORD, MAX_WORD, 1]
    assert [len(piece.text.split()) for piece in pieces([(0, long * 10)], 3)] == [3] * 6 + [3]
