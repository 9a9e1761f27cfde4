import gzip
import itertools
import tracemalloc

import pytest

from glimmer_jax.corpus import files, lines
from glimmer_jax.corpus.files import Span


def read(path, start=0, end=None):
    return list(lines.read_lines(Span(str(path), start, end)))


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a").write_bytes("one\n\ntwo\u2028three\x85\r\n".encode() + b"last")
    return tmp_path / "a"


def test_lines_end_at_newlines_alone_and_know_their_place(path):
    found = read(path)
    assert [line.number for line in found] == [1, 2, 3, 4]
    assert [line.offset for line in found] == [0, 4, 5, 20]
    wanted = [b"one\n", b"\n", "two\u2028three\x85\r\n".encode(), b"last"]
    assert [line.data for line in found] == wanted


def test_spans_cut_anywhere_share_the_lines_out(path):
    size = path.stat().st_size
    whole = [(line.offset, line.data) for line in read(path)]
    for cuts in itertools.combinations(range(1, size), 2):
        parts = [read(path, *span) for span in itertools.pairwise((0, *cuts, size))]
        assert [(line.offset, line.data) for part in parts for line in part] == whole


def test_make_spans_covers_a_file_and_leaves_gzip_and_parquet_whole(tmp_path, path):
    packed = tmp_path / "b.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "c").write_bytes(b"PAR1" + b"\0" * 20)
    spans = list(files.make_spans([str(path), str(packed), str(tmp_path / "c")], 10))
    assert spans == [
        *(Span(str(path), start, min(start + 10, 24)) for start in (0, 10, 20)),
        Span(str(packed)),
        Span(str(tmp_path / "c")),
    ]


def test_gzip_is_told_by_its_first_bytes_and_counts_packed_bytes(tmp_path, path):
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
def test_a_truncated_gzip_file_is_named(tmp_path, end):
    packed = tmp_path / "b.gz"
    packed.write_bytes(gzip.compress(b"".join(b"line %d\n" % i for i in range(1000)))[:end])
    with pytest.raises(
        ValueError, match=r"b\.gz: the gzip file is damaged or was not copied whole"
    ):
        read(packed)


@pytest.mark.fault
def test_a_damaged_gzip_file_is_named(tmp_path):
    data = bytearray(gzip.compress(b"".join(b"line %d\n" % i for i in range(1000))))
    data[len(data) // 2] ^= 255
    (tmp_path / "b.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"b\.gz: the gzip file is damaged"):
        read(tmp_path / "b.gz")


@pytest.mark.fault
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_refused_by_name(tmp_path, encoding):
    (tmp_path / "a").write_bytes('{"id": 1}\n'.encode(encoding))
    with pytest.raises(ValueError, match="a is neither UTF-8 nor gzip: it begins as UTF-16"):
        read(tmp_path / "a")


@pytest.mark.fault
def test_a_byte_order_mark_of_utf8_is_left_out(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf{}\n\xef\xbb\xbf")
    assert [line.data for line in read(tmp_path / "a")] == [b"{}\n", b"\xef\xbb\xbf"]


@pytest.mark.fault
@pytest.mark.parametrize("length", [10, 11, 12, 50])
def test_an_overlong_line_is_passed_over(tmp_path, monkeypatch, length):
    monkeypatch.setattr(lines, "MAX_LINE", 10)
    monkeypatch.setattr(lines, "_BUFFER", 8)
    (tmp_path / "a").write_bytes(b"x" * (length - 1) + b"\nnext\n" + b"y" * length)
    found = read(tmp_path / "a")
    assert [line.offset for line in found] == [0, length, length + 5]
    long = length > 10
    assert [line.data is None for line in found] == [long, False, long]
    assert found[1].data == b"next\n"


@pytest.mark.fault
def test_a_line_of_100_mb_takes_no_more_memory_than_the_longest_that_is_read(tmp_path):
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


def test_patterns_find_files_in_order(tmp_path, monkeypatch):
    for name in ("b/2.jsonl", "a/10.jsonl", "a/1.jsonl", "a/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "a" / "folder.jsonl").mkdir()
    wanted = [str(tmp_path / name) for name in ("a/1.jsonl", "a/10.jsonl", "b/2.jsonl")]
    assert files.find_files(f"{tmp_path}/*/*.jsonl") == wanted
    assert files.find_files(f"{tmp_path}/[a]/1?.jsonl") == wanted[1:2]
    assert files.find_files(wanted[0]) == wanted[:1]
    monkeypatch.chdir(tmp_path)
    assert files.find_files("a/*.jsonl") == ["a/1.jsonl", "a/10.jsonl"]
    (tmp_path / "[x].jsonl").write_text("")
    assert files.find_files("[x].jsonl") == ["[x].jsonl"]


def test_paths_of_buckets_go_through_epath(tmp_path, monkeypatch):
    real = files.epath.Path
    bucket = lambda path: real(str(path).replace("gs://", f"{tmp_path}/"))  # noqa: E731
    monkeypatch.setattr(files.epath, "Path", bucket)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jsonl").write_bytes(b"one\ntwo\n")
    assert files.find_files("gs://b/*.jsonl") == [str(tmp_path / "b" / "1.jsonl")]
    assert [line.data for line in read("gs://b/1.jsonl", 2)] == [b"two\n"]


@pytest.mark.fault
def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="CORPUS: there is no file .*absent. Check the path"):
        files.find_files(f"{tmp_path}/absent")
    with pytest.raises(ValueError, match=r"CORPUS: no file matches .*\*\.jsonl. Check the pattern"):
        files.find_files(f"{tmp_path}/*.jsonl")


@pytest.mark.fault
def test_missing_shards_are_named(tmp_path):
    for index in (0, 2, 4):
        (tmp_path / f"c-{index:05d}-of-00005.jsonl").write_text("")
    with pytest.raises(ValueError, match="2 of 5 shards are missing.*c-00001-of-00005.jsonl"):
        files.find_files(f"{tmp_path}/*")
