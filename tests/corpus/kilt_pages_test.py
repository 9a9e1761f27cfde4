import pytest

from glimmer_jax.corpus.ids import MAX_ID
from glimmer_jax.corpus.kilt_pages import check_page, page_passages

PAGE = {
    "_id": "10979",
    "wikipedia_id": "10979",
    "wikipedia_title": "Emma",
    "text": [
        "Emma\n",
        "Emma is a novel.\n",
        "Section::::Plot.\n",
        "Section::::Plot.:First volume.\n",
        "It begins in Highbury. It goes on.\n",
        "BULLET::::- Emma Woodhouse\n",
        "Section::::Empty.\n",
        " \n",
        "Section::::Reception.\n",
        "It was well received.\n",
    ],
    "anchors": [],
}


def test_a_page_becomes_passages_of_its_sections():
    found = page_passages(PAGE, 11)
    assert [(one["text"], one["paragraphs"]) for one in found] == [
        ("Emma is a novel.", [1, 1]),
        ("Plot. First volume. It begins in Highbury. It goes on.", [4, 4]),
        ("Plot. First volume. - Emma Woodhouse", [5, 5]),
        ("Reception. It was well received.", [9, 9]),
    ]
    assert {(one["title"], one["page"]) for one in found} == {("Emma", "10979")}
    joined = page_passages(PAGE, 100)
    assert [one["paragraphs"] for one in joined] == [[1, 1], [4, 5], [9, 9]]


def test_ids_are_stable_and_name_page_length_and_place():
    ids = [one["id"] for one in page_passages(PAGE, 100)]
    # Written down: memory and examples of other machines carry these numbers.
    assert ids == [6740946275853166240, 928396196770706718, 2126024920141107103]
    assert all(0 <= one <= MAX_ID for one in ids)
    other = [one["id"] for one in page_passages(PAGE, 200)]
    numbered = [one["id"] for one in page_passages({**PAGE, "wikipedia_id": 10979}, 100)]
    assert not set(ids) & set(other)
    assert numbered == ids


def test_the_first_paragraph_is_left_out_only_where_it_is_the_title():
    page = {**PAGE, "text": ["Emma is a novel.\n"]}
    assert [one["paragraphs"] for one in page_passages(page, 100)] == [[0, 0]]


@pytest.mark.parametrize(
    "text", [[], ["Emma\n"], ["Emma\n", "", "Section::::Plot.\n", "BULLET::::\n"]]
)
def test_a_page_without_text_has_no_passage(text):
    assert page_passages({**PAGE, "text": text}, 100) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"wikipedia_id": None}, "page's id in `wikipedia_id`, got None.*CORPUS_FORMAT"),
        ({"wikipedia_id": ""}, "page's id in `wikipedia_id`, got ''"),
        ({"wikipedia_id": True}, "page's id in `wikipedia_id`, got True"),
        ({"wikipedia_id": 1.5}, "page's id in `wikipedia_id`, got 1.5"),
        ({"wikipedia_title": None}, "string `wikipedia_title`, got None"),
        ({"text": None}, "list of strings in `text`, got None"),
        ({"text": "one"}, "list of strings in `text`, got 'one'"),
        ({"text": ["one", None]}, "list of strings in `text`, got "),
    ],
)
def test_missing_fields_of_a_page_are_reported(change, message):
    with pytest.raises(ValueError, match=message):
        check_page({**PAGE, **change})
