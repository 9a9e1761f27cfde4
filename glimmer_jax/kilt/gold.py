"""Gold passages: those that a question's provenance names.

Retrieval marks the passages of a task file with `is_gold` (`retrieval.retriever`), and the marks
become the feature `gold_passages` (`data.preprocessors`). The texts of passages and answers play no
part.

A passage is gold if an entry of the provenance of any answer names its page and its paragraphs. The
first row that applies decides the page; if none does, the entry names another:

    passage has     entry has       compared
    page            wikipedia_id    the ids
    title           title           the titles
    no page         wikipedia_id    the entry's id with the passage's document, or else its id

Paragraphs are compared if both sides have them, and must overlap. Those of an entry reach from
`start_paragraph_id` to `end_paragraph_id`; a passage has its first and last one in `paragraphs`, or
a single one in `chunk` (`corpus.formats`).

Null, "" and KILT's paragraph -1 (evidence not found in its page) equal absent. Names are compared
in Unicode's normal form NFC, since composed and decomposed letters look the same.
"""

import collections
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Place = Mapping[str, Any]


def is_gold(record: Record, provenance: Sequence[Place]) -> bool:
    """Whether an entry of provenance names the passage: its page, and its paragraphs if known."""
    return any(
        _names_page(place, record) and _names_paragraph(place, record) for place in provenance
    )


def name_no_passage(provenance: Iterable[Place], records: Iterable[Record]) -> bool:
    """Whether no entry names the page of any passage. Reads records up to the first one named."""
    places = collections.defaultdict(list)
    for place in provenance:
        for field in ("wikipedia_id", "title"):
            places[_name(place, field)].append(place)
    for record in records:
        for field in ("page", "title", "document", "id"):
            name = _name(record, field)
            if name is not None and any(_names_page(place, record) for place in places[name]):
                return False
    return True


def _names_page(place: Place, record: Record) -> bool:
    gold_page, page = _name(place, "wikipedia_id"), _name(record, "page")
    if gold_page is not None and page is not None:
        return gold_page == page
    gold_title, title = _name(place, "title"), _name(record, "title")
    if gold_title is not None and title is not None:
        return gold_title == title
    own_id = _name(record, "document") or _name(record, "id")
    return gold_page is not None and page is None and gold_page == own_id


def _names_paragraph(place: Place, record: Record) -> bool:
    first, last = (_paragraph(place, f"{end}_paragraph_id") for end in ("start", "end"))
    paragraphs = record.get("paragraphs") or [record.get("chunk")]
    if first is None or paragraphs[0] is None:
        return True
    return first <= paragraphs[-1] and paragraphs[0] <= (first if last is None else last)


def _paragraph(place: Place, field: str) -> int | None:
    number = place.get(field)
    return number if number is not None and number >= 0 else None


def _name(fields: Mapping[str, Any], field: str) -> str | None:
    value = fields.get(field)
    return None if value is None or value == "" else unicodedata.normalize("NFC", str(value))
