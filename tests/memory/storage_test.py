"""Storage that does not answer is not damage."""

import http.server
import threading

import numpy as np
import pytest

from glimmer_jax.memory import manifest, shard
from glimmer_jax.memory.maintain import verify
from glimmer_jax.memory.manifest import DamagedStore
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.storage import folder


@pytest.fixture
def served(copied_store):
    """A store behind a web server that can be told to fail: (TensorStore spec, server)."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(copied_store))

        def do_GET(self):
            if self.server.status is None:
                super().do_GET()
                return
            self.send_response(self.server.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 (the base class wants this name)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.status = None
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    retries = {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}
    url = f"http://127.0.0.1:{server.server_port}/"
    yield {"driver": "http", "base_url": url, "http_request_retries": retries}, server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.fault
@pytest.mark.parametrize("status", [400, 401, 403, 429, 503])
def test_a_failing_server_is_not_reported_as_damage(served, status):
    spec, server = served
    store = MemoryStore.open(spec, cache_bytes=0)
    server.status = status
    message = r"http://127.*shards/000001/.*could not be read.*run the same command again"
    with pytest.raises(OSError, match=message):
        store.read(np.array([7]), 12)
    with pytest.raises(OSError, match=r"http://127.*manifest.json could not be read"):
        verify(store.path)
    with pytest.raises(OSError, match=r"manifest.json could not be read"):
        MemoryStore.open(spec)


@pytest.mark.fault
def test_a_server_that_is_gone_is_no_damage(served):
    spec, server = served
    store = MemoryStore.open(spec, cache_bytes=0)
    server.status = 503
    kvstore = folder.subfolder(folder.open_folder(spec), manifest.shard_folder("000001"))
    with pytest.raises(OSError, match="could not be read"):
        shard.check_sizes(kvstore, {"states/c/0/0": (10, "")})
    server.status = 404
    with pytest.raises(DamagedStore, match="000001 .* is damaged"):
        store.read(np.array([7]), 12)
    assert shard.check_sizes(kvstore, {"states/c/0/0": (10, "")}) == ["states/c/0/0 is missing"]


@pytest.mark.parametrize("code", ["UNAVAILABLE", "PERMISSION_DENIED", "ABORTED", "INTERNAL"])
def test_only_codes_about_bytes_are_damage(code):
    assert not folder.is_damage(ValueError(f"{code}: chunk is DATA_LOSS: missing"))
    assert folder.is_damage(ValueError("DATA_LOSS: Digest mismatch"))


@pytest.mark.fault
def test_a_disk_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "s").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="s/shards/0/x .*permissions.*free space"):
        folder.write_file(folder.open_folder(tmp_path), "s/shards/0/x", b"1")
