import pytest

from glimmer_jax.kilt.gold import is_gold, name_no_passage


@pytest.mark.parametrize(
    "record, gold",
    [
        ({"page": "p", "chunk": 1}, True),
        ({"page": "p", "chunk": 2}, True),
        ({"page": "p", "chunk": 3}, False),
        ({"page": "q", "chunk": 1}, False),
        ({"title": "p"}, False),
        ({"title": "whole"}, True),
        ({"page": "7", "chunk": 9}, True),
        ({"page": "8", "chunk": 9}, False),
        ({"page": "open", "chunk": 3}, True),
        ({"page": "open", "chunk": 4}, False),
        ({"page": "p", "paragraphs": [2, 5]}, True),
        ({"page": "p", "paragraphs": [0, 1]}, True),
        ({"page": "p", "paragraphs": [0, 5]}, True),
        ({"page": "p", "paragraphs": [3, 5]}, False),
        ({"page": "lost", "paragraphs": [3, 5]}, True),
        ({}, False),
    ],
)
def test_gold_is_the_page_and_the_paragraph(record, gold):
    where = [
        {"wikipedia_id": "p", "start_paragraph_id": 1, "end_paragraph_id": 2},
        {"wikipedia_id": "7", "title": "whole"},
        # KILT's files spell some missing fields as null.
        {"wikipedia_id": "open", "start_paragraph_id": 3, "end_paragraph_id": None},
        {"wikipedia_id": None, "title": "8"},
        # Evidence that KILT did not find in its page.
        {"wikipedia_id": "lost", "start_paragraph_id": -1, "end_paragraph_id": -1},
    ]
    assert is_gold(record, where) is gold


@pytest.mark.parametrize(
    ("record", "place", "gold"),
    [
        # Ids decide where both sides have one, whatever the titles.
        ({"page": "1", "title": "Emma"}, {"wikipedia_id": "2", "title": "Emma"}, False),
        ({"page": 1, "title": "Emma"}, {"wikipedia_id": "1", "title": "Other"}, True),
        # Titles otherwise: either side may lack the id.
        ({"page": "15782", "title": "Emma"}, {"title": "Emma"}, True),
        ({"page": "15782", "title": "Emma"}, {"wikipedia_id": None, "title": "Other"}, False),
        ({"id": 7, "title": "Emma", "page": None}, {"wikipedia_id": "1", "title": "Emma"}, True),
        # Passages of their own, without pages, by their ids.
        ({"id": "doc-7", "title": ""}, {"wikipedia_id": "doc-7"}, True),
        ({"id": 7, "title": "Emma"}, {"wikipedia_id": "7"}, True),
        ({"id": 7, "title": "Emma"}, {"wikipedia_id": "7", "title": "Other"}, False),
        ({"id": 99, "document": "doc-7", "title": ""}, {"wikipedia_id": "doc-7"}, True),
        ({"id": "doc-8", "title": ""}, {"wikipedia_id": "doc-7", "title": ""}, False),
        # Composed and decomposed letters look the same.
        ({"id": 1, "title": "Beyonce\u0301"}, {"title": "Beyonc\u00e9"}, True),
        ({"id": 1, "title": "Beyonc\u00e9"}, {"title": "Beyonce\u0301"}, True),
    ],
)
def test_ids_decide_the_page_and_titles_otherwise(record, place, gold):
    assert is_gold(record, [place]) is gold
    assert name_no_passage([place], [{"id": "other", "title": "x"}, record]) is not gold


def test_provenance_that_names_no_passage_is_found():
    records = ({"id": i, "title": f"t{i}", "page": f"p{i}"} for i in range(5))
    places = [{"wikipedia_id": "q3", "title": "t3"}, {"title": "t9"}]
    assert name_no_passage(places, records)
    assert name_no_passage([], [])
