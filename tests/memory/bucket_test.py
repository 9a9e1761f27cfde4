"""A store in a bucket: TensorStore's own gcs driver against a small server that misbehaves."""

import os
import subprocess
import sys

import numpy as np
import pytest
from fake_gcs import FakeGcs

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.memory import lookup
from glimmer_jax.memory.maintain import verify
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.storage import folder, local_copy

# As many as a store's requests in the middle of what is tested.
FAULTS = {
    "busy": [429] * 3,
    "error": [500] * 3,
    "away": [503] * 3,
    "reset": ["reset"] * 3,
    "lost": ["lost"] * 3,
    "slow": [0.2] * 3,
}


@pytest.fixture(scope="module")
def server():
    """One for all tests: TensorStore reads its address once."""
    with pytest.MonkeyPatch.context() as patch:
        gcs = FakeGcs("bucket")
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", gcs.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        yield gcs
        gcs.close()


@pytest.fixture
def bucket(server):
    with server.lock:
        server.objects.clear()
        server.faults.clear()
    return server


def _spec(name, retries=8):
    return {
        "driver": "gcs",
        "bucket": "bucket",
        "path": f"{name}/",
        "context": {
            "gcs_request_retries": {
                "max_retries": retries,
                "initial_delay": "5ms",
                "max_delay": "20ms",
            }
        },
    }


def test_a_store_in_a_bucket_has_the_bytes_of_one_on_disk(tiny, tiny_store, bucket, folder_bytes):
    tiny.build_tiny("gs://bucket/memory")
    found = {name.removeprefix("memory/"): data for name, (_, data) in bucket.objects.items()}
    assert found == folder_bytes(tiny_store)
    store = MemoryStore.open("gs://bucket/memory/")
    rows = np.array([[0, 22, -1], [7, 7, 3]])
    there, lengths = lookup.DiskLookup(store, 12)(rows)
    here, _ = lookup.DiskLookup(MemoryStore.open(tiny_store), 12)(rows)
    np.testing.assert_array_equal(there["states"].view(np.uint16), here["states"].view(np.uint16))
    assert lengths[0, 2] == 0 and verify(store.path) == []
    del bucket.objects["memory/shards/000001/states/c/0/0"]
    assert verify(store.path) == ["shards/000001/states/c/0/0 is missing"]


def test_passages_in_a_bucket_are_fetched_in_blocks(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv(local_copy.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(local_copy, "BLOCK_BYTES", 100)
    records = [{"id": i, "title": f"t{i}", "text": f"text {i}"} for i in range(20)]
    write_passages(tmp_path / "p", records, lambda t: list(t.encode()), "f", 30, vocab_size=300)
    with bucket.lock:
        for path in (tmp_path / "p").iterdir():
            bucket.put(f"corpus/{path.name}", path.read_bytes())
        bucket.requests.clear()
        bucket.faults.extend([503, "reset"])
    passages = Passages.open("gs://bucket/corpus")
    assert list(passages.records()) == records
    passages.verify()
    # The manifest and five files, most of them of several blocks.
    assert len(bucket.requests) > 20 and bucket.hit >= 2
    asked = len(bucket.requests)
    assert Passages.open("gs://bucket/corpus/").fingerprint == "f"
    assert len(bucket.requests) == asked + 1
    with bucket.lock:
        for path in (tmp_path / "p").iterdir():
            bucket.put(path.name, path.read_bytes())
    assert list(Passages.open("gs://bucket").records()) == records
    assert local_copy.fetch_file("X", "gs://bucket/ids.npy").stat().st_size == 20 * 8 + 128
    with pytest.raises(ValueError, match=r"PASSAGES_DIR: .* gs://bucket/other/manifest"):
        Passages.open("gs://bucket/other")


@pytest.mark.fault
@pytest.mark.parametrize("kind", FAULTS)
def test_transient_bucket_errors_are_retried(tiny, bucket, kind):
    def stumble():
        with bucket.lock:
            bucket.faults.extend(FAULTS[kind])
            bucket.hit = 0

    path = _spec(kind)
    stumble()
    tiny.build_tiny(path, tiny.part(range(9)), reference=None)
    assert bucket.hit == 3
    stumble()
    store = MemoryStore.open(path)
    assert bucket.hit == 3 and len(store) == 9
    stumble()
    _, lengths = lookup.DiskLookup(store, 12)(np.arange(9)[None])
    assert bucket.hit == 3
    np.testing.assert_array_equal(lengths[0], tiny.TinyPassages().lengths(range(9)))
    stumble()
    made = tiny.append_tiny(path, tiny.TinyPassages())
    assert made.num_passages == 23 and len(store) == 9
    stumble()
    assert verify(path) == [] and bucket.hit == 3


STALLED = """
import os
import tensorstore
os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "1"
from glimmer_jax.storage import folder
kvstore = folder.open_folder("gs://bucket/stalled/")
folder.write_file(kvstore, "a", b"1")
print(folder.read_file(kvstore, "a"), os.environ["TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES"])
"""


@pytest.mark.fault
def test_a_request_that_the_bucket_never_answers_is_retried(bucket):
    with bucket.lock:
        bucket.faults.extend(["stall"] * 2)
        bucket.hit = 0
    # A process of its own, as nothing was set outside: the variables are read with the first
    # request.
    bare = {k: v for k, v in os.environ.items() if "CURL_LOW_SPEED" not in k}
    done = subprocess.run(
        [sys.executable, "-c", STALLED], env=bare, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "b'1' 1\n", done.stderr
    assert bucket.hit == 2
    assert os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] == "60"


@pytest.mark.fault
@pytest.mark.parametrize("fault", [429, 500, 503, "reset"])
def test_an_unreachable_bucket_is_no_damage_and_the_build_resumes(tiny, bucket, fault):
    path = _spec("gone", retries=2)
    calls = 0

    def encode(tokens):
        nonlocal calls
        calls += 1
        if calls == 4:
            with bucket.lock:
                bucket.faults.extend([fault] * 200)
        return tiny.encode(tokens)

    with pytest.raises(OSError, match="could not be .*command again"):
        tiny.build_tiny(path, reference=None, encode=encode)
    bucket.faults.clear()
    assert folder.read_file(folder.open_folder(path), "manifest.json") is None
    with bucket.lock:
        # The process that held it is this one; elsewhere its lease would have ended.
        bucket.objects.pop("gone/build.lock", None)
    assert tiny.build_tiny(path, reference=None).manifest.num_passages == 23
    assert verify(path) == []
