"""What a line of a corpus file holds, by format, and the passages that come of it.

    passages   JSON Lines of {"id": 7, "title": "Emma", "text": "…", …}
    kilt       JSON Lines of pages, see `kilt_pages`
    dpr        psgs_w100.tsv: id, text and title between tabs, under a head line
    parquet    tables with columns id, title and text

DPR's file is no real table of quoted fields: tabs and line ends always separate, but most of its texts
stand in quotation marks, with those inside doubled. These are undone.
"""

from typing import Any, NamedTuple

from glimmer_jax.corpus.kilt_pages import check_page, page_passages
from glimmer_jax.corpus.record import check_record, stable_hash
from glimmer_jax.corpus.words import pieces, split_words
from glimmer_jax.storage.json_lines import parse_line

FORMATS = ("passages", "kilt", "dpr", "parquet")
DPR_HEAD = ("id", "text", "title")


class Document(NamedTuple):
    """One page or passage of the corpus; `name` for messages, `key` the same for the same id alone."""

    name: str
    key: int
    record: dict[str, Any]


def parse(format: str, data: bytes) -> Document | None:
    """A line as a document, or None for one that holds none. Raises ValueError saying what is wrong."""
    if not data.strip():
        return None
    if format == "dpr":
        return _parse_dpr(data)
    record = _parse_json(data)
    if format == "kilt":
        check_page(record)
        name = f"the page {str(record['wikipedia_id'])!r}"
        return Document(name, stable_hash(record["wikipedia_id"]), record)
    return document(record)


def document(record: dict[str, Any]) -> Document:
    """A record as a document. Raises ValueError saying what is wrong."""
    check_record(record)
    return Document(f"the id {record['id']}", record["id"], record)


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        return parse_line(data, "")
    except ValueError as error:
        # The place is named by whoever counts the lines.
        raise ValueError(str(error).removeprefix(": ")) from None


def _parse_dpr(data: bytes) -> Document | None:
    try:
        fields = data.decode("utf-8").rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise ValueError(f"wanted UTF-8, got {error}. Re-encode the file.") from None
    if tuple(fields) == DPR_HEAD:
        return None
    if len(fields) != len(DPR_HEAD):
        raise ValueError(
            f"wanted id, text and title between tabs, got {len(fields)} fields. Copy the file again."
        )
    number, text, title = fields
    # Not int() alone: it takes signs, spaces and underscores.
    identifier = int(number) if number.isascii() and number.isdigit() else number
    return document({"id": identifier, "title": _unquoted(title), "text": _unquoted(text)})


def _unquoted(field: str) -> str:
    inner = field[1:-1]
    if len(field) < 2 or field[0] + field[-1] != '""' or '"' in inner.replace('""', ""):
        return field
    return inner.replace('""', '"')


def passages(format: str, record: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    """The passages of a document's record; none where it has no text.

    A record that is a passage already stays as it is if it has no more than `limit` words; the pieces of
    a longer one get ids of their own. None is no limit, except for pages, which have none of their own.
    """
    if format == "kilt":
        assert limit is not None
        return page_passages(record, limit)
    text = record["text"]
    if limit is None or len(text) < 2 * limit or len(split_words(text)) <= limit:
        return [record] if text and not text.isspace() else []
    return [
        {**record, "id": stable_hash("passage", record["id"], limit, place), "text": piece.text}
        for place, piece in enumerate(pieces([(0, text)], limit))
    ]
