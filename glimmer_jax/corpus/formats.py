"""Corpus formats: what a line holds, and the passages of a document.

    passages   JSON Lines of {"id": 7, "title": "Emma", "text": "…", …}
    kilt       JSON Lines of pages, see `kilt_pages`
    dpr        psgs_w100.tsv: id, text and title between tabs, under a header line
    parquet    tables with columns id, title and text

A record is `{"id", "title", "text"}` with an external id (`ids`) and optional fields, where null
equals absent: `page`, the `wikipedia_id` of KILT's provenance; `paragraphs`, the first and the last
paragraph of the page that the passage covers, or `chunk`, the only one; `split`; `document`, which the
pieces of a long record have from it, or else its id. "" equals absent in page, document and split. Other
fields are kept in JSON Lines and not read from Parquet.

DPR's file is not a quoted table: tabs and line ends always separate, but most texts stand in quotation
marks with the inner ones doubled, which is undone here.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from glimmer_jax.corpus.ids import id_number, stable_hash
from glimmer_jax.corpus.kilt_pages import check_page, page_passages
from glimmer_jax.corpus.words import pieces, split_words
from glimmer_jax.storage.json_lines import parse_line
from glimmer_jax.storage.parquet import read_rows

FORMATS = ("passages", "kilt", "dpr", "parquet")
DPR_HEADER = ("id", "text", "title")
_REQUIRED = ("id", "title", "text")
_OPTIONAL = ("page", "document", "paragraphs", "chunk", "split")
# Optional texts, which a table without absent fields holds as "".
_TEXTS = ("page", "document", "split")


class Document(NamedTuple):
    """A page or passage of a corpus.

    Attributes:
      name: for messages.
      key: 63-bit number, equal for equal ids.
      record: its fields.
    """

    name: str
    key: int
    record: dict[str, Any]


def parse(format: str, data: bytes) -> Document | None:
    """A line as a document, or None for a blank or header line. Raises ValueError."""
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
    """A record as a document, without its absent fields. Raises ValueError."""
    absent = {k for k, v in record.items() if v is None and k not in _REQUIRED}
    absent |= {k for k in _TEXTS if record.get(k) == ""}
    record = {k: v for k, v in record.items() if k not in absent}
    check_record(record)
    return Document(f"the id {record['id']!r}", id_number(record["id"]), record)


def check_record(record: dict[str, Any]) -> None:
    """Raises ValueError for an invalid `id`, a missing `title` or `text`, or fields of a wrong type."""
    if record.get("id") is None:
        raise ValueError(
            "expected an `id`, found none. Number the passages, or set CORPUS_FORMAT to the file's "
            "format."
        )
    id_number(record["id"])
    for field in ("title", "text"):
        if not isinstance(record.get(field), str):
            raise ValueError(
                f"expected a string `{field}`, got {record.get(field)!r:.80}. Every passage needs a "
                "title and a text; either may be empty."
            )
    for field, (valid, kind) in _FIELD_TYPES.items():
        if field in record and not valid(record[field]):
            raise ValueError(
                f"`{field}` must be {kind}, got {record[field]!r:.80}. Correct the field, rename it, "
                "or remove it."
            )


def _is_paragraph(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_paragraphs(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(map(_is_paragraph, value)):
        return False
    return value[0] <= value[-1]


_FIELD_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "page": (lambda value: type(value) in (int, str), "an integer or a string"),
    "document": (lambda value: type(value) in (int, str), "an integer or a string"),
    "paragraphs": (_is_paragraphs, "the numbers of the first and the last paragraph"),
    "chunk": (_is_paragraph, "the number of a paragraph, from 0"),
    "split": (lambda value: isinstance(value, str), "a string"),
}


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        return parse_line(data, "")
    except ValueError as error:
        # The caller, which counts lines, names the place.
        raise ValueError(str(error).removeprefix(": ")) from None


def _parse_dpr(data: bytes) -> Document | None:
    try:
        fields = data.decode("utf-8").rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, got {error}. Re-encode the file.") from None
    names = tuple(map(_unquote, fields))
    if names == DPR_HEADER:
        return None
    if sorted(names) == sorted(DPR_HEADER):
        raise ValueError(
            f"expected the columns {', '.join(DPR_HEADER)}, found {', '.join(names)}. Reorder them."
        )
    if len(fields) != len(DPR_HEADER):
        raise ValueError(
            f"expected id, text and title between tabs, got {len(fields)} fields. Copy the file again."
        )
    name, text, title = _unquote(fields[0]), *fields[1:]
    # An integer stays one, as in JSON Lines; "007" and "a7" are strings.
    identifier = id_number(name) if name and str(id_number(name)) == name else name
    return document({"id": identifier, "title": _unquote(title), "text": _unquote(text)})


def _unquote(field: str) -> str:
    inner = field[1:-1]
    if len(field) < 2 or field[0] + field[-1] != '""' or '"' in inner.replace('""', ""):
        return field
    return inner.replace('""', '"')


def read_parquet(path: str, on_read: Callable[[int], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, record) of each row. Raises ValueError as `storage.parquet.read_rows`."""
    # Any other column (vectors, links) may be larger than the text.
    yield from enumerate(read_rows(path, _REQUIRED, _OPTIONAL, on_read), start=1)


def passages(format: str, record: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    """The passages of a document's record; none where it has no text.

    A record of at most `limit` words stays as it is. A longer one is cut into pieces with ids of their
    own and its id as `document`. None means no limit; pages require one.
    """
    if format == "kilt":
        assert limit is not None
        return page_passages(record, limit)
    text = record["text"]
    if limit is None or len(text) < 2 * limit or len(split_words(text)) <= limit:
        return [record] if text and not text.isspace() else []
    return [
        {
            **record,
            "id": stable_hash("passage", record["id"], limit, index),
            "document": record.get("document", record["id"]),
            "text": piece.text,
        }
        for index, piece in enumerate(pieces([(0, text)], limit))
    ]
