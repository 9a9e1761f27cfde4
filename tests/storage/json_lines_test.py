import gzip
import os
import time

import pytest

from glimmer_jax.storage.json_lines import parse_line, read_json_lines, write_json_lines


def test_lines_are_split_only_at_newlines(tmp_path):
    records = [{"text": "one\u2028two\x85three\x0bfour"}, {"text": "日本 🙂"}]
    assert write_json_lines(tmp_path / "a.jsonl", records) == 2
    assert [record for _, record in read_json_lines(tmp_path / "a.jsonl")] == records


def test_blank_lines_and_windows_ends_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\r\n\n{"a": 2}')
    assert list(read_json_lines(tmp_path / "a.jsonl")) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' occurs twice"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "expected UTF-8"),
        (b'{"a": 1', "not a JSON object"),
        (b"[1]", "expected a JSON object like .*got list"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_invalid_lines_are_rejected_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"good": 1}\n' + line)
    with pytest.raises(ValueError, match=f"a.jsonl:2: .*{message}"):
        list(read_json_lines(path))


def test_gzip_and_a_byte_order_mark_are_read(tmp_path):
    data = b'\xef\xbb\xbf{"a": 1}\n'
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert list(read_json_lines(tmp_path / name)) == [(1, {"a": 1})]


def test_a_missing_file_is_reported(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="No file: .*pipe .*regular file"):
        list(read_json_lines(tmp_path / "pipe"))
    with pytest.raises(ValueError, match="No file: .*absent does not exist"):
        list(read_json_lines(tmp_path / "absent"))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.jsonl"
    write_json_lines(path, [{"a": 1}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_lines(path, [{"a": 2}, {"a": float("nan")}])
    assert [record for _, record in read_json_lines(path)] == [{"a": 1}]
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_complete_surrogate_pair_is_a_character():
    assert parse_line(b'{"a": "\\ud83d\\ude42"}', "x:1") == {"a": "🙂"}


def test_a_key_that_is_repeated_at_the_end_of_many_is_found_at_once():
    keys = [*range(200_000), 199_999]
    line = ("{" + ",".join(f'"k{key}":0' for key in keys) + "}").encode()
    began = time.process_time()
    with pytest.raises(ValueError, match="the key 'k199999' occurs twice"):
        parse_line(line, "a:1")
    assert time.process_time() - began < 10
