"""Files of a bucket on this disk; `file://` is a bucket to everything but TensorStore."""

import concurrent.futures
import errno
import logging
import shutil
import threading

import numpy as np
import pytest

from glimmer_jax.corpus.manifest import FILES, MANIFEST
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.data import retrieved_tasks
from glimmer_jax.storage import folder, lease, local_copy
from glimmer_jax.vocabulary import PYDOCS_MODEL, Vocabulary
from tests.damage import JSON_TEXTS

RECORDS = [{"id": i, "title": f"t{i}", "text": f"text {i}"} for i in range(20)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(local_copy.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "fetched"


@pytest.fixture
def bucket(tmp_path):
    """A passages folder, and its URL."""
    path = tmp_path / "bucket" / "passages"
    write_passages(path, RECORDS, lambda text: list(text.encode()), "f", 30, vocab_size=300)
    return path, f"file://{path}"


def test_passages_in_a_bucket_are_copied_once_and_read_locally(bucket, cache, monkeypatch, caplog):
    path, url = bucket
    monkeypatch.setattr(local_copy, "BLOCK_BYTES", 100)
    with caplog.at_level(logging.INFO, "glimmer_jax"):
        here = Passages.open(url, "f")
    assert "PASSAGES_DIR: fetching 4.17e-06 GB" in caplog.text and str(cache) in caplog.text
    assert list(here.records()) == RECORDS
    there = Passages.open(path)
    rows = np.arange(20)
    np.testing.assert_array_equal(here.tokens(rows, 30), there.tokens(rows, 30))
    here.verify()
    assert here.place == url
    # Only deleted files are copied again.
    (here.path / "tokens.npy").unlink()
    for name in set(FILES) - {"tokens.npy"}:
        (path / name).unlink()
    assert list(Passages.open(url).records()) == RECORDS
    assert not list(cache.rglob("*.partial"))
    with pytest.raises(ValueError, match=f"{url} .*vocabulary f, .* g"):
        Passages.open(url, "g")


def test_an_interrupted_copy_resumes_with_complete_files(bucket, monkeypatch):
    _, url = bucket
    asked = []
    read_range = folder.read_range

    def failing(kvstore, file, start, stop):
        asked.append(file)
        if file == "ids.npy" and asked.count(file) == 1:
            raise OSError(f"{file} could not be read")
        return read_range(kvstore, file, start, stop)

    monkeypatch.setattr(folder, "read_range", failing)
    with pytest.raises(OSError, match=r"ids\.npy could not be read"):
        Passages.open(url)
    assert list(Passages.open(url).records()) == RECORDS
    assert asked.count("tokens.npy") == 1 and asked.count("ids.npy") == 2


def test_a_changed_file_is_rejected(bucket, cache):
    path, url = bucket
    data = bytearray((path / "tokens.npy").read_bytes())
    data[-1] ^= 1
    (path / "tokens.npy").write_bytes(data)
    wanted = rf"PASSAGES_DIR: {url}/tokens\.npy is damaged: expected sha256 .*Copy the folder"
    with pytest.raises(ValueError, match=wanted):
        Passages.open(url)
    assert not list(cache.rglob("tokens.npy*"))
    (path / "tokens.npy").unlink()
    with pytest.raises(ValueError, match=r"tokens\.npy is missing"):
        Passages.open(url)


def test_other_passages_at_the_same_place_are_not_taken_for_the_first(bucket):
    path, url = bucket
    Passages.open(url)
    shutil.rmtree(path)
    write_passages(path, RECORDS[:3], lambda text: list(text.encode()), "f", 30, vocab_size=300)
    assert len(Passages.open(url)) == 3


def test_processes_of_a_machine_share_a_copy(bucket, monkeypatch):
    _, url = bucket
    asked = []
    read_range = folder.read_range

    def counted(kvstore, file, start, stop):
        asked.append(file)
        return read_range(kvstore, file, start, stop)

    monkeypatch.setattr(folder, "read_range", counted)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(len(Passages.open(url)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [20] * 3 and sorted(asked) == sorted([*FILES, MANIFEST])


def test_without_locks_each_process_copies_for_itself(bucket, cache, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lease.fcntl, "flock", unsupported)
    _, url = bucket
    assert list(Passages.open(url).records()) == RECORDS
    assert "No locks available; other processes may copy the same files" in caplog.text
    assert not list(cache.rglob("*.partial"))


def test_a_disk_that_is_too_small_is_named_before_copying(bucket, cache, monkeypatch):
    _, url = bucket
    usage = shutil.disk_usage(cache.parent.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"needs 4\.17e-06 GB .* 1e-06 GB left.*GLIMMER_CACHE"):
        Passages.open(url)
    assert not list(cache.rglob("*.npy*"))


@pytest.mark.parametrize("text", ["{}", '{"files": {"tokens.npy": {"bytes": 1}}}', *JSON_TEXTS])
def test_a_manifest_without_files_is_reported(bucket, text):
    path, url = bucket
    (path / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"manifest\.json.*tokens"):
        Passages.open(url)


def test_one_file_is_the_bucket_s_newest(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        path.write_text(text)
        found = local_copy.fetch_file("X", f"file://{path}")
        assert found.read_text() == text and found.name == "a.txt"
    # It is asked whether it is another one, and not read again.
    read, states = folder.read_if_new, []

    def seen(*args):
        states.append(read(*args))
        return states[-1]

    monkeypatch.setattr(folder, "read_if_new", seen)
    assert local_copy.fetch_file("X", f"file://{path}") == found and states[0][0] is None
    for number, damaged in enumerate(("", "owt"), start=1):
        found.write_text(damaged)
        assert local_copy.fetch_file("X", f"file://{path}").read_text() == "two"
        assert states[number][0] == b"two"
    assert local_copy.fetch_file("X", path) == path
    for missing in (f"file://{tmp_path}/b.txt", f"file://{tmp_path}/"):
        with pytest.raises(ValueError, match=r"X: .* file://.*path"):
            local_copy.fetch_file("X", missing)


def test_threads_may_fetch_the_same_file_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda _: local_copy.fetch_file("X", f"file://{tmp_path}/a.txt"), range(32))
        )
    assert {path.read_text() for path in found} == {"one"}
    assert not [path for path in found[0].parent.iterdir() if path.name != "a.txt"]


def test_a_vocabulary_and_retrieved_files_may_lie_in_a_bucket(tmp_path):
    assert Vocabulary(f"file://{PYDOCS_MODEL}").fingerprint == Vocabulary("pydocs").fingerprint
    (tmp_path / "nq-dev.jsonl").write_text("{}\n")
    retrieved_tasks.configure(f"file://{tmp_path}/")
    assert retrieved_tasks.retrieved_file("nq", "validation").read_text() == "{}\n"
    with pytest.raises(ValueError, match=r"DATA_DIR: .* file://.*nq-train\.jsonl"):
        retrieved_tasks.retrieved_file("nq", "train")
    retrieved_tasks.configure()
