import gzip
import itertools
import tracemalloc

import pytest

from glimmer_jax.storage import lines
from glimmer_jax.storage.lines import Span


def read(path, start=0, end=None):
    return list(lines.read_lines(Span(str(path), start, end)))


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a").write_bytes("one\n\ntwo\u2028three\x85\r\n".encode() + b"last")
    return tmp_path / "a"


def test_lines_end_only_at_newlines_and_have_number_and_offset(path):
    found = read(path)
    assert [line.number for line in found] == [1, 2, 3, 4]
    assert [line.offset for line in found] == [0, 4, 5, 20]
    wanted = [b"one\n", b"\n", "two\u2028three\x85\r\n".encode(), b"last"]
    assert [line.data for line in found] == wanted


def test_spans_cut_anywhere_partition_the_lines(path):
    size = path.stat().st_size
    whole = [(line.offset, line.data) for line in read(path)]
    for cuts in itertools.combinations(range(1, size), 2):
        parts = [read(path, *span) for span in itertools.pairwise((0, *cuts, size))]
        assert [(line.offset, line.data) for part in parts for line in part] == whole


def test_gzip_is_recognised_by_its_bytes_and_counts_packed_bytes(tmp_path, path):
    packed = tmp_path / "b"
    packed.write_bytes(
        gzip.compress(path.read_bytes()[:10]) + gzip.compress(path.read_bytes()[10:])
    )
    counted = []
    found = list(lines.read_lines(Span(str(packed)), counted.append))
    assert [(line.number, line.data) for line in found] == [
        (line.number, line.data) for line in read(path)
    ]
    assert {line.offset for line in found} == {None}
    assert sum(counted) == packed.stat().st_size


@pytest.mark.fault
@pytest.mark.parametrize("end", [-1, -8, -30])
def test_a_truncated_gzip_file_is_reported(tmp_path, end):
    packed = tmp_path / "b.gz"
    packed.write_bytes(gzip.compress(b"".join(b"line %d\n" % i for i in range(1000)))[:end])
    with pytest.raises(ValueError, match=r"b\.gz: .*damaged or truncated"):
        read(packed)


@pytest.mark.fault
def test_a_damaged_gzip_file_is_reported(tmp_path):
    data = bytearray(gzip.compress(b"".join(b"line %d\n" % i for i in range(1000))))
    data[len(data) // 2] ^= 255
    (tmp_path / "b.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"b\.gz: .*damaged"):
        read(tmp_path / "b.gz")


@pytest.mark.fault
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_rejected_by_name(tmp_path, encoding):
    (tmp_path / "a").write_bytes('{"id": 1}\n'.encode(encoding))
    with pytest.raises(ValueError, match="a: expected UTF-8 or gzip, found UTF-16"):
        read(tmp_path / "a")


@pytest.mark.fault
def test_a_byte_order_mark_is_dropped_only_at_the_start(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf{}\n\xef\xbb\xbf")
    assert [line.data for line in read(tmp_path / "a")] == [b"{}\n", b"\xef\xbb\xbf"]


@pytest.mark.fault
@pytest.mark.parametrize("length", [10, 11, 12, 50])
def test_an_overlong_line_is_skipped(tmp_path, monkeypatch, length):
    monkeypatch.setattr(lines, "MAX_LINE", 10)
    monkeypatch.setattr(lines, "_BUFFER", 8)
    (tmp_path / "a").write_bytes(b"x" * (length - 1) + b"\nnext\n" + b"y" * length)
    found = read(tmp_path / "a")
    assert [line.offset for line in found] == [0, length, length + 5]
    long = length > 10
    assert [line.data is None for line in found] == [long, False, long]
    assert found[1].data == b"next\n"


@pytest.mark.fault
def test_a_line_of_100_mb_takes_no_more_memory_than_max_line(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(100 * 2**20)
        # The file has a hole; what it begins with must look like text.
        file.seek(0)
        file.write(b"x" * 100)
        file.seek(100 * 2**20)
        file.write(b"\nnext\n")
    tracemalloc.start()
    found = read(tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line.data for line in found] == [None, b"next\n"]
    # Twice, while the parts of the longest line are joined.
    assert peak < 2.2 * lines.MAX_LINE


@pytest.mark.fault
def test_endless_blank_lines_and_endless_lines_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_BLANK_LINES", 1000)
    (tmp_path / "a").write_bytes(b"one" + b" \n" * 1001)
    assert len(read(tmp_path / "a")) == 1001
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"one\n" + b"\n" * 10**6))
    with pytest.raises(ValueError, match=r"b\.gz:1002: more than 1000 blank lines"):
        read(tmp_path / "b.gz")
    monkeypatch.setattr(lines, "MAX_LINE", 10)
    monkeypatch.setattr(lines, "MAX_SKIPPED_BYTES", 2**21)
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"x" * 2**23))
    with pytest.raises(ValueError, match=r"c\.gz: .*2097152 bytes"):
        read(tmp_path / "c.gz")


@pytest.mark.fault
def test_bytes_behind_gzip_data_are_reported(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    assert [line.data for line in read(tmp_path / "a.gz")] == [b"one\n", b"two\n"]
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"one\n") + b"garbage")
    with pytest.raises(ValueError, match=r"b\.gz: the gzip data is damaged"):
        read(tmp_path / "b.gz")


def test_urls_of_an_unknown_kind_are_rejected():
    with pytest.raises(ValueError, match="nowhere://x/y: .*nowhere://.*gs://"):
        lines.is_regular_file("nowhere://x/y")
