"""Pages of the KILT knowledge source (arXiv 2009.02252, section 3) to passages.

    {"_id": "10979", "wikipedia_id": "10979", "wikipedia_title": "Emma", "text": ["Emma\\n", "Emma is a
     novel.\\n", "Section::::Plot.\\n", "Section::::Plot.:First volume.\\n", "It begins …\\n",
     "BULLET::::- Emma Woodhouse\\n"], "anchors": […], "categories": "…", "history": {…}, …}

becomes

    {"id": 4611…, "title": "Emma", "text": "Emma is a novel.", "page": "10979", "paragraphs": [1, 1]}
    {"id": 1152…, "title": "Emma", "text": "Plot. First volume. It begins … - Emma Woodhouse",
     "page": "10979", "paragraphs": [4, 5]}

A passage never crosses a section. `title` is the page's alone: answers are scored by page, and dense
retrievers are trained on page titles. Section headings start the text of every passage of the section and
count as words of it. Passages are retrieved and read one by one, and "He moved there in 1921" is easier
to interpret after "Early life.".

Paragraph numbers index `text`, as in KILT's provenance; the title's own line is 0.
"""

from collections.abc import Iterator
from typing import Any

from glimmer_jax.corpus.ids import stable_hash
from glimmer_jax.corpus.words import pieces

SECTION, BULLET = "Section::::", "BULLET::::"


def check_page(page: dict[str, Any]) -> None:
    """Raises ValueError where the id, title or text is missing or of another type."""
    identifier = page.get("wikipedia_id")
    if isinstance(identifier, bool) or not isinstance(identifier, (int, str)) or identifier == "":
        raise ValueError(
            f"expected the page's id in `wikipedia_id`, got {identifier!r:.80}. Give KILT's knowledge "
            "source, or set CORPUS_FORMAT to the file's format."
        )
    title, text = page.get("wikipedia_title"), page.get("text")
    if not isinstance(title, str):
        raise ValueError(
            f"expected a string `wikipedia_title`, got {title!r:.80}. Repair the page."
        )
    if not isinstance(text, list) or not all(isinstance(line, str) for line in text):
        raise ValueError(
            f"expected a list of strings in `text`, got {text!r:.80}. Repair the page."
        )


def sections(page: dict[str, Any]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """(heading, [(paragraph number, text), …]) of each section with text; the first has no heading."""
    heading: str = ""
    paragraphs: list[tuple[int, str]] = []
    for number, text in enumerate(page["text"]):
        text = text.strip()
        if number == 0 and text == page["wikipedia_title"].strip():
            continue
        if text.startswith(SECTION):
            if paragraphs:
                yield heading, paragraphs
            heading, paragraphs = text.removeprefix(SECTION).replace(".:", ". "), []
        elif text := text.removeprefix(BULLET):
            paragraphs.append((number, text))
    if paragraphs:
        yield heading, paragraphs


def page_passages(page: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """Passages of a page, of at most `limit` words each; none where the page has no text.

    An id is a hash of the page, `limit` and the passage's index, so that passages cut at another limit
    have other ids.
    """
    name = str(page["wikipedia_id"])
    page_pieces = [
        piece
        for heading, paragraphs in sections(page)
        for piece in pieces(paragraphs, limit, heading)
    ]
    return [
        {
            "id": stable_hash("kilt", name, limit, index),
            "title": page["wikipedia_title"],
            "text": piece.text,
            "page": name,
            "paragraphs": [piece.first, piece.last],
        }
        for index, piece in enumerate(page_pieces)
    ]
