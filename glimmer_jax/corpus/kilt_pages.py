"""Pages of the KILT knowledge source (arXiv 2009.02252, section 3) to passages.

    {"_id": "10979", "wikipedia_id": "10979", "wikipedia_title": "Emma", "text": ["Emma\\n", "Emma is a
     novel.\\n", "Section::::Plot.\\n", "Section::::Plot.:First volume.\\n", "It begins …\\n",
     "BULLET::::- Emma Woodhouse\\n"], "anchors": […], "categories": "…", "history": {…}, …}

becomes, a page's sections never sharing a passage,

    {"id": 4611…, "title": "Emma", "text": "Emma is a novel.", "page": "10979", "paragraphs": [1, 1]}
    {"id": 1152…, "title": "Emma", "text": "Plot. First volume. It begins … - Emma Woodhouse",
     "page": "10979", "paragraphs": [4, 5]}

`title` stays the page's alone: answers are scored by page, and dense retrievers are trained on page
titles. The headings stand in front of the text, in every passage of the section, because passages are
retrieved and read one by one: "He moved there in 1921" says more after "Early life.", to BM25 and to a
reader alike. They count as words of the passage.

Paragraph ids are places in `text`, as KILT's provenance counts them; the title's own line is 0.
"""

from collections.abc import Iterator
from typing import Any

from glimmer_jax.corpus.record import stable_hash
from glimmer_jax.corpus.words import pieces

SECTION, BULLET = "Section::::", "BULLET::::"


def check_page(page: dict[str, Any]) -> None:
    """Raises ValueError where id, title or text are missing or of another kind."""
    identifier = page.get("wikipedia_id")
    if isinstance(identifier, bool) or not isinstance(identifier, (int, str)) or identifier == "":
        raise ValueError(
            f"wanted the page's id in `wikipedia_id`, got {identifier!r:.80}. Give KILT's knowledge "
            "source, or set CORPUS_FORMAT to what the file is."
        )
    title, text = page.get("wikipedia_title"), page.get("text")
    if not isinstance(title, str):
        raise ValueError(f"wanted a string `wikipedia_title`, got {title!r:.80}. Repair the page.")
    if not isinstance(text, list) or not all(isinstance(one, str) for one in text):
        raise ValueError(f"wanted a list of strings in `text`, got {text!r:.80}. Repair the page.")


def sections(page: dict[str, Any]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """(heading, [(paragraph id, text), …]) of each section that has text; the first has no heading."""
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
    """Passages of a page, of at most `limit` words; none where the page has no text.

    Ids come from the page, `limit` and the passage's place: passages of another length are others.
    """
    name = str(page["wikipedia_id"])
    found = [
        piece
        for heading, paragraphs in sections(page)
        for piece in pieces(paragraphs, limit, heading)
    ]
    return [
        {
            "id": stable_hash("kilt", name, limit, place),
            "title": page["wikipedia_title"],
            "text": piece.text,
            "page": name,
            "paragraphs": [piece.first, piece.last],
        }
        for place, piece in enumerate(found)
    ]
