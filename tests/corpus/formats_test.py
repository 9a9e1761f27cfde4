import json

import pytest

from glimmer_jax.corpus import formats
from glimmer_jax.corpus.reading import Reading, read_passages
from glimmer_jax.corpus.report import Report


def record(format, line):
    found = formats.parse(format, line.encode())
    return None if found is None else found.record


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("1\ttext\ttitle\n", (1, "text", "title")),
        ("1\ttext\ttitle\r\n", (1, "text", "title")),
        ('7\t"The ""Emma"" of"\t"Emma ""x"""', (7, 'The "Emma" of', 'Emma "x"')),
        # Not quoted: quotation marks inside stand alone.
        ('7\t"Emma" is by "Austen"\tEmma', (7, '"Emma" is by "Austen"', "Emma")),
        ('7\t"\t"a', (7, '"', '"a')),
        ("7\ta\u2028b\x0b\tt", (7, "a\u2028b\x0b", "t")),
        ("7\t\t", (7, "", "")),
        # Any text is an id; only integers as they are written become numbers.
        ("one\ttext\ttitle", ("one", "text", "title")),
        ("007\ttext\ttitle", ("007", "text", "title")),
        ("-1\ttext\ttitle", ("-1", "text", "title")),
        ("٣\ttext\ttitle", ("٣", "text", "title")),
    ],
)
def test_dprs_lines_are_read(line, wanted):
    found = record("dpr", line)
    assert (found["id"], found["text"], found["title"]) == wanted


@pytest.mark.parametrize("format", formats.FORMATS[:3])
@pytest.mark.parametrize("line", ["\n", " \r\n", ""])
def test_blank_lines_hold_nothing(format, line):
    assert record(format, line) is None


def test_the_head_line_of_dprs_file_holds_nothing():
    assert record("dpr", "id\ttext\ttitle\n") is None


def test_a_quoted_dpr_file_is_read():
    assert record("dpr", '"id"\t"text"\t"title"\n') is None
    assert record("dpr", '"1"\t"x ""y"""\t"t"') == {"id": 1, "text": 'x "y"', "title": "t"}


def test_texts_that_are_empty_equal_absent():
    line = {"id": 1, "title": "", "text": "a", "page": "", "split": "", "document": ""}
    assert record("passages", json.dumps(line)) == {"id": 1, "title": "", "text": "a"}


def test_pieces_keep_the_document_of_their_record():
    long = {"id": "D-0", "document": "D", "title": "", "text": "a b. c d. e f."}
    assert [x["document"] for x in formats.passages("passages", long, 2)] == ["D"] * 3
    del long["document"]
    assert [x["document"] for x in formats.passages("passages", long, 2)] == ["D-0"] * 3


@pytest.mark.parametrize(
    "format, line, message",
    [
        ("dpr", "1\ttext", "id, text and title between tabs, got 2 fields"),
        ("dpr", "1\ta\tb\tc", "got 4 fields"),
        ("dpr", "id\ttitle\ttext", "columns id, text, title, found id, title, text. Reorder"),
        (
            "passages",
            '{"id": 1, "title": "", "text": "a", "paragraphs": [5, 3]}',
            "`paragraphs` must be the numbers of the first and the last",
        ),
        ("passages", '{"id": true, "title": "", "text": ""}', "an integer or .* got True"),
        ("passages", '{"id": "", "title": "", "text": ""}', "non-empty string, got ''"),
        ("passages", '{"title": "", "text": ""}', "an `id`, found none"),
        ("passages", '{"id": 3.0, "title": "", "text": ""}', "integer or .* got 3.0"),
        ("passages", '{"id": -1, "title": "", "text": ""}', "must be from 0 .* got -1"),
        ("passages", '{"id": 9223372036854775808, "title": "", "text": ""}', "from 0 to 2"),
        ("passages", '{"id": 7, "text": ""}', "string `title`, got None"),
        ("passages", '{"id": 7, "title": "", "text": 3}', "string `text`, got 3"),
        ("passages", '{"id": 7, "title": "", "text": "", "x": 1e999}', "too large a number"),
        ("passages", '{"id": 7, "title": "", "text": "", "page": 1.5}', "`page` must be .*got 1.5"),
        ("passages", '{"id": 7, "title": "", "text": "", "chunk": "1"}', "`chunk` must .*got '1'"),
        ("passages", '{"id": 7, "title": "", "text": "", "chunk": -1}', "`chunk` must be .*got -1"),
        ("passages", '{"id": 7, "title": "", "text": "", "split": 3}', "`split` must .*string"),
        (
            "passages",
            '{"id": 7, "title": "", "text": "", "paragraphs": ["Emma is a novel."]}',
            "`paragraphs` must be the numbers .* got",
        ),
        ("passages", '{"id": 7, "title": "", "text": "", "paragraphs": []}', "`paragraphs` must"),
        ("kilt", '{"id": 7, "title": "", "text": ""}', "page's id in `wikipedia_id`, got None"),
    ],
)
def test_the_problem_of_a_line_is_reported(format, line, message):
    with pytest.raises(ValueError, match=f"^(?=.*{message})(expected|`[a-z]+` must|not)"):
        record(format, line)


@pytest.mark.parametrize("format", ["passages", "parquet"])
def test_null_equals_absent(tmp_path, format):
    path = tmp_path / "corpus"
    row = {"id": 1, "title": "t", "text": "x", "page": None, "split": None, "chunk": None}
    if format == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row))
    assert list(read_passages([str(path)], Reading(format))) == [
        {"id": 1, "title": "t", "text": "x"}
    ]


def test_passages_stay_as_they_are_up_to_the_limit():
    whole = {"id": 7, "title": "t", "text": "one  two\nthree ", "split": "dev"}
    assert formats.passages("passages", whole, None) == [whole]
    assert formats.passages("passages", whole, 3) == [whole]
    pieces = formats.passages("passages", whole, 2)
    assert [one["text"] for one in pieces] == ["one two", "three"]
    assert {one["split"] for one in pieces} == {"dev"}
    assert len({7} | {one["id"] for one in pieces}) == 3
    assert {one["document"] for one in pieces} == {7}
    assert formats.passages("dpr", {"id": 7, "title": "t", "text": " \n"}, None) == []


def test_parquet_gives_what_json_lines_give(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    columns = {
        "text": ["one", "two", "three", None],
        "id": ["1", "2", "x", "4"],
        "title": ["a", "b", "c", "d"],
        "page": ["p", None, "q", "r"],
        "paragraphs": [[0, 1], None, [2, 2], [3, 3]],
        "document": ["D", "", None, "E"],
        "embeddings": [[0.5]] * 4,
    }
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(ValueError, match=r"a\.parquet:4: expected a string `text`, got None"):
        list(read_passages([path], Reading("parquet")))
    parquet.write_table(pyarrow.table(columns).slice(0, 3), path)
    report = Report()
    assert list(read_passages([path], Reading("parquet"), report)) == [
        {
            "id": "1",
            "title": "a",
            "text": "one",
            "page": "p",
            "paragraphs": [0, 1],
            "document": "D",
        },
        {"id": "2", "title": "b", "text": "two"},
        {"id": "x", "title": "c", "text": "three", "page": "q", "paragraphs": [2, 2]},
    ]
    assert (report.lines, report.passages) == (3, 3)
    parquet.write_table(pyarrow.table({"id": [1], "text": ["x"]}), path)
    with pytest.raises(ValueError, match="column title; .* id, text"):
        list(read_passages([path], Reading("parquet")))


@pytest.mark.fault
def test_a_damaged_parquet_file_is_reported(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"id": [1], "title": ["t"], "text": ["word " * 1000]})
    parquet.write_table(table, path, compression="gzip")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is not Parquet"):
        list(read_passages([str(path)], Reading("parquet")))
    place = whole.index(b"\x1f\x8b", whole.index(b"\x1f\x8b", whole.index(b"\x1f\x8b") + 1) + 1)
    path.write_bytes(whole[: place + 2] + b"\0" * 12 + whole[place + 14 :])
    with pytest.raises(ValueError, match=r"a\.parquet .*damaged after row 0"):
        list(read_passages([str(path)], Reading("parquet")))


def test_parquet_without_pyarrow_reports_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pip install 'glimmer-jax\[parquet\]'"):
        list(read_passages([str(tmp_path / "a.parquet")], Reading("parquet")))
