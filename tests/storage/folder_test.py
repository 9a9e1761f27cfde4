"""Paths of folders and buckets, and files that are complete or absent."""

import pathlib

import pytest

from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.storage import folder
from glimmer_jax.storage.errors import StorageError


def test_what_is_written_through_memory_maps_is_local():
    assert folder.local("X", "data/x") == pathlib.Path("data/x")
    with pytest.raises(ValueError, match="PASSAGES_DIR.*local.*gs://b/p"):
        write_passages("gs://b/passages", [], str.split, "f", 9, vocab_size=9)


@pytest.mark.parametrize(
    ("path", "parent"),
    [
        ("a.json", f"file://{pathlib.Path.cwd()}/"),
        ("/a.json", "file:///"),
        ("/data/a.json", "file:///data/"),
        (pathlib.Path("/data/a.json"), "file:///data/"),
        ("gs://bucket/a.json", "gs://bucket/"),
        ("gs://bucket/data/a.json", "gs://bucket/data/"),
    ],
)
def test_a_file_lies_in_its_folder(path, parent):
    place, name = folder.of_file(path)
    assert (place.url.rstrip("/"), name) == (parent.rstrip("/"), "a.json")


@pytest.mark.parametrize(
    "path, reason",
    [
        ("file://host/x", "file:///"),
        ("file:x", "file:///"),
        ("foo://x/y", "unsupported URL scheme"),
        ("gs://Not_A_Bucket!", "bucket name"),
        ("a\0b", "Invalid file path"),
        ("/a/\udcff", "not a path that can be opened"),
    ],
)
def test_a_path_that_cannot_be_opened_is_rejected_by_name(path, reason):
    with pytest.raises(ValueError, match=reason):
        folder.open_folder(path)


def test_file_urls_are_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for path in (f"file://{tmp_path}/a", "../b", tmp_path / "new" / "c"):
        with folder.writing(path) as file:
            file.write(b"1")
        place, name = folder.of_file(path)
        assert folder.read_file(place, name) == b"1"
    assert (tmp_path / "a").is_file() and (tmp_path / "b").is_file()
    assert folder.local("X", f"file://{tmp_path}/a") == tmp_path / "a"


def write_half(path):
    with folder.writing(path) as file:
        file.write(b"new")
        raise KeyError("half")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyError, match="half"):
        write_half(path)
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"old"]
    with folder.writing(path, private=True) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600


def test_a_bucket_gets_an_object_when_it_is_complete(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bucket = folder.open_folder("memory://bucket/")
    monkeypatch.setattr(folder, "of_file", lambda path: (bucket, "a.jsonl"))
    with pytest.raises(KeyError, match="half"):
        write_half("memory://bucket/a.jsonl")
    assert folder.read_file(bucket, "a.jsonl") is None
    with folder.writing("memory://bucket/a.jsonl") as file:
        file.write(b"1")
    assert folder.read_file(bucket, "a.jsonl") == b"1" and not list(tmp_path.iterdir())


def test_a_file_that_is_too_large_to_be_read_at_once_is_rejected(tmp_path):
    # A damaged size; TensorStore would end the process.
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**40)
    kvstore = folder.open_folder(tmp_path)
    with pytest.raises(StorageError, match=r"manifest.json has \d+ bytes, expected at most"):
        folder.read_file(kvstore, "manifest.json")
    assert folder.read_file(kvstore, "manifest.json", 5) is None
    assert folder.read_range(kvstore, "manifest.json", 0, 3) == bytes(3)


def test_a_large_file_of_known_size_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "MAX_WHOLE_BYTES", 4)
    (tmp_path / "c").write_bytes(b"12345")
    kvstore = folder.open_folder(tmp_path)
    assert folder.read_file(kvstore, "c", 5) == b"12345"
    with pytest.raises(StorageError, match="c has 5 bytes, expected at most 4"):
        folder.read_file(kvstore, "c")
