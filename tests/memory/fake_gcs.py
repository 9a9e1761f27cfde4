"""A bucket on loopback: what TensorStore's gcs driver asks of Cloud Storage, kept in a dictionary.

Objects with generations, conditional writes and deletes, ranges, and listing in pages; nothing
else. It can be told to answer the next requests badly: with a status, by closing the connection
before or after it has done what was asked, or late.
"""

import http.server
import json
import threading
import time
import urllib.parse
from typing import Any


class FakeGcs:
    """The server; `url` is for TENSORSTORE_GCS_HTTP_URL.

    Attributes:
      objects: name -> (generation, bytes).
      faults: what befalls the next requests, one each: a status, "reset" (nothing is done), "lost"
        (done, and no answer), "stall" (nothing is done, and the connection stays open), or seconds to
        wait.
      requests: methods and paths so far.
    """

    def __init__(self, bucket: str):
        self.bucket = bucket
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.faults: list[int | str | float] = []
        self.requests: list[str] = []
        self.hit = 0  # requests that a fault befell
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._generation = 0
        handler = type("Handler", (_Handler,), {"gcs": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def put(self, name: str, data: bytes) -> int:
        """Stores an object; the caller holds the lock."""
        self._generation += 1
        self.objects[name] = (self._generation, data)
        return self._generation


class _Handler(http.server.BaseHTTPRequestHandler):
    gcs: FakeGcs
    protocol_version = "HTTP/1.1"
    _is_lost = False

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        name, query = self._begin()
        if query is None:
            return
        with self.gcs.lock:
            if name == "":
                self._list(query)
                return
            found = self.gcs.objects.get(name)
            if found is None:
                self._answer(404)
                return
            generation, data = found
            if query.get("ifGenerationNotMatch") == str(generation):
                self._answer(304)
            elif "alt" not in query:
                self._answer(200, self._described(name))
            else:
                self._send_range(generation, data)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, query = self._begin()
        if query is None:
            return
        with self.gcs.lock:
            name = query["name"]
            if self._holds(name, query):
                self.gcs.put(name, data)
                self._answer(200, self._described(name))

    def do_DELETE(self) -> None:
        name, query = self._begin()
        if query is None:
            return
        with self.gcs.lock:
            if name not in self.gcs.objects:
                self._answer(404)
            elif self._holds(name, query):
                del self.gcs.objects[name]
                self._answer(204)

    def _begin(self) -> tuple[str, dict[str, str] | None]:
        """The requested object ("" for the bucket) and the query; None after an injected fault."""
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        with self.gcs.lock:
            self.gcs.requests.append(f"{self.command} {url.path}")
            fault = self.gcs.faults.pop(0) if self.gcs.faults else None
            self.gcs.hit += fault is not None
        self._is_lost = fault == "lost"
        if fault == "stall":
            self.gcs.closing.wait(60)
        if fault in ("reset", "stall"):
            self.close_connection = True
            self.connection.close()
            return "", None
        if isinstance(fault, float):
            time.sleep(fault)
        elif fault is not None and not self._is_lost:
            self._answer(int(fault))
            return "", None
        name = url.path.partition(f"/b/{self.gcs.bucket}/o")[2].removeprefix("/")
        return urllib.parse.unquote(name), query

    def _holds(self, name: str, query: dict[str, str]) -> bool:
        """Whether the object is the one the writer has seen; answers if it is not."""
        wanted = query.get("ifGenerationMatch")
        generation = self.gcs.objects.get(name, (0, b""))[0]
        if wanted is None or wanted == str(generation):
            return True
        self._answer(412)
        return False

    def _described(self, name: str) -> bytes:
        generation, data = self.gcs.objects[name]
        value = {"name": name, "generation": str(generation), "size": str(len(data))}
        return json.dumps({**value, "kind": "storage#object", "bucket": self.gcs.bucket}).encode()

    def _list(self, query: dict[str, str]) -> None:
        after, start = query.get("pageToken", ""), query.get("startOffset", "")
        names = sorted(
            name
            for name in self.gcs.objects
            if name.startswith(query.get("prefix", "")) and name > after and name >= start
        )
        if end := query.get("endOffset"):
            names = [name for name in names if name < end]
        page: dict[str, Any] = {"items": [json.loads(self._described(n)) for n in names[:10]]}
        if len(names) > 10:
            page["nextPageToken"] = names[9]
        self._answer(200, json.dumps(page).encode())

    def _send_range(self, generation: int, data: bytes) -> None:
        headers = {"x-goog-generation": str(generation)}
        asked = self.headers.get("Range")
        if asked is None:
            self._answer(200, data, headers)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin = int(first) if first else max(len(data) - int(last), 0)
        end = min(int(last) + 1 if first and last else len(data), len(data))
        if begin >= len(data):
            self._answer(416)
            return
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self._answer(206, data[begin:end], headers)

    def _answer(
        self, status: int, data: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        if self._is_lost:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
