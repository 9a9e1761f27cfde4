import gzip
import os

import pytest

from glimmer_jax.corpus import files
from glimmer_jax.storage.lines import Span, read_lines


def test_spans_cover_a_file_and_gzip_and_parquet_are_single_spans(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789\n" * 2 + b"ab")
    packed = tmp_path / "b.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "c").write_bytes(b"PAR1" + b"\0" * 20)
    spans = list(files.make_spans([str(path), str(packed), str(tmp_path / "c")], 10))
    assert spans == [
        *(Span(str(path), start, min(start + 10, 24)) for start in (0, 10, 20)),
        Span(str(packed)),
        Span(str(tmp_path / "c")),
    ]


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
    assert [line.data for line in read_lines(Span("gs://b/1.jsonl", 2))] == [b"two\n"]


def test_any_number_of_folders_is_no_pattern(tmp_path):
    with pytest.raises(ValueError, match=r"CORPUS: .*\*\*, which is not supported"):
        files.find_files(f"{tmp_path}/**/*.jsonl")


@pytest.mark.fault
def test_missing_files_are_reported(tmp_path):
    with pytest.raises(ValueError, match="CORPUS: .*absent does not exist"):
        files.find_files(f"{tmp_path}/absent")
    with pytest.raises(ValueError, match=r"CORPUS: no file matches .*\*\.jsonl"):
        files.find_files(f"{tmp_path}/*.jsonl")


@pytest.mark.fault
def test_pipes_and_devices_are_rejected_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("")
    for pattern in (f"{tmp_path}/a.jsonl", f"{tmp_path}/*.jsonl", "/dev/zero"):
        with pytest.raises(ValueError, match="CORPUS: .* is not a regular file"):
            files.find_files(pattern)


@pytest.mark.fault
def test_missing_shards_are_reported(tmp_path):
    for index in (0, 2, 4):
        (tmp_path / f"c-{index:05d}-of-00005.jsonl").write_text("")
    with pytest.raises(ValueError, match="2 of 5 shards are missing.*c-00001-of-00005.jsonl"):
        files.find_files(f"{tmp_path}/*")
