"""Files with something wrong: a right result or a clear error, in file order."""

import gzip
import json
import logging

import pytest

from glimmer_jax.corpus.reading import Reading, read_passages
from glimmer_jax.corpus.report import Policy, Problem, Report, merge
from glimmer_jax.runtime import progress
from glimmer_jax.storage import lines
from glimmer_jax.storage.lines import Span


def page(number, *text):
    return {"wikipedia_id": str(number), "wikipedia_title": f"T{number}", "text": list(text)}


def kilt(*records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


GOOD = kilt(page(1, "T1\n", "one two\n"))
SKIP = Reading("kilt", 10, Policy("skip", 3))


def read(path, data, reading=SKIP, report=None):
    path.write_bytes(data)
    return list(read_passages([str(path)], reading, report))


@pytest.mark.fault
@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"wikipedia_id": "2"', "not a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"wikipedia_id": "2", "wikipedia_title": "a", "text": [NaN]}', "NaN is not JSON"),
        (b'{"wikipedia_id": "2", "wikipedia_title": "\\ud800", "text": []}', "half of a surrogate"),
        (b'{"wikipedia_id": "2", "wikipedia_title": "caf\xe9", "text": []}', "expected UTF-8"),
        (b'{"wikipedia_id": "2", "wikipedia_title": "a"}', "list of strings in `text`, got None"),
        (kilt(page(1, "again")).strip(), "the page '1' occurs more than once"),
        (b'{"wikipedia_id": "' + b"2" * 300 + b'"}', "the line is longer than 200 bytes"),
    ],
)
def test_an_invalid_line_is_reported_or_skipped(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(lines, "MAX_LINE", 200)
    data = GOOD + b"\r\n" + line + b"\r\n" + kilt(page(3, "three"))
    place = f"a.json:3: byte {len(GOOD) + 2}: "
    with pytest.raises(ValueError, match=f"{place}.*{message}"):
        read(tmp_path / "a.json", data, Reading("kilt", 10))
    report = Report()
    assert [one["page"] for one in read(tmp_path / "a.json", data, SKIP, report)] == ["1", "3"]
    assert (report.lines, report.documents, report.passages, report.skipped) == (4, 2, 2, 1)
    assert place in report.summary() and "1 invalid lines skipped" in report.summary()


def test_more_invalid_lines_than_allowed_stop_reading(tmp_path):
    data = (GOOD + b"bad\n") * 4
    with pytest.raises(
        ValueError,
        match=rf"MAX_SKIPPED=3 .* The first: .*a:2: byte {len(GOOD)}: .*a:3: .*more than once",
    ):
        read(tmp_path / "a", data, Reading("kilt", 10, Policy("skip", 3)))
    report = Report()
    assert len(read(tmp_path / "a", data, Reading("kilt", 10, Policy("skip", 7)), report)) == 1
    assert report.summary().endswith("and 2 more")


@pytest.mark.fault
def test_empty_pages_and_long_passages_are_counted(tmp_path):
    report = Report()
    read(tmp_path / "a", GOOD + kilt(page(2, "T2", " \n"), page(3)), SKIP, report)
    assert (report.documents, report.passages, report.empty) == (3, 1, 2)
    assert "2 without text dropped" in report.summary()
    report = Report()
    data = kilt({"id": 1, "title": "", "text": "a b c"}, {"id": 2, "title": "", "text": "a"})
    assert len(read(tmp_path / "a", data, Reading(words=2), report)) == 3
    assert report.split == 1 and "1 longer ones cut" in report.summary()


@pytest.mark.fault
def test_repeated_ids_are_detected_across_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(ValueError, match="b:1: byte 0: .*'1' .*more than once"):
        list(read_passages([str(tmp_path / "a"), str(tmp_path / "b")], Reading("kilt", 10)))


@pytest.mark.fault
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\n\n"),
        lambda data: data.rstrip(b"\n"),
        gzip.compress,
    ],
)
def test_harmless_differences_change_nothing(tmp_path, change):
    text = "one\u2028two \u2029 three \x85 🙂"
    line = json.dumps(page(2, text), ensure_ascii=False).encode() + b"\n"
    wanted = read(tmp_path / "a", GOOD + line)
    assert wanted[1]["text"] == "one two three 🙂"
    assert read(tmp_path / "a", change(GOOD + line)) == wanted


@pytest.mark.fault
def test_a_truncated_gzip_file_is_an_error_even_when_skipping(tmp_path):
    packed = gzip.compress(kilt(*(page(i, str(i)) for i in range(100))))
    with pytest.raises(ValueError, match="damaged or truncated"):
        read(tmp_path / "a", packed[:-20])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"format": "csv"}, "CORPUS_FORMAT must be one of .*got 'csv'"),
        ({"words": 1}, "PASSAGE_WORDS must be at least 2, got 1"),
        ({"format": "kilt"}, "PASSAGE_WORDS must be set"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Reading(**settings)


def test_reading_logs_bytes_and_counts(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    (tmp_path / "a.jsonl").write_text('{"id": 1, "title": "t", "text": "one"}\n')
    with caplog.at_level(logging.INFO):
        list(read_passages([str(tmp_path / "a.jsonl")]))
    assert "corpus: 3.9e-08 of 3.9e-08 GB" in caplog.text and "0 bad lines" in caplog.text


def test_reports_of_spans_merge_to_that_of_the_file():
    def report(numbers, lines=10, **more):
        named = [Problem("f", number, None, "x") for number in numbers]
        return Report(lines=lines, skipped=len(numbers), named=named, **more)

    spans = [Span("f", 0, 5), Span("f", 5, 9), Span("g"), Span("h")]
    parts = [report([2, 9]), report([1]), report([4], stopped=True), report([1], failure="no")]
    merged = merge(zip(spans, parts, strict=True))
    # Of the last one the line is not known: not all before it were read.
    assert [one.number for one in merged.named] == [2, 9, 11, 4]
    assert (merged.lines, merged.skipped, merged.stopped, merged.failure) == (40, 5, True, None)
    assert Report.from_json(merged.to_json()) == merged
