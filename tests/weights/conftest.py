"""A folder behind a web server, which TensorStore reads as it reads a bucket."""

import http.server
import re
import threading

import pytest


@pytest.fixture
def serve():
    """folder -> (URL, server). The server counts bytes in `sent`; a `status` denies requests."""
    servers = []

    def start(folder):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                path = folder / self.path.lstrip("/")
                if self.server.status or not path.is_file():
                    self.answer(self.server.status or 404)
                    return
                data = path.read_bytes()
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if asked is None:
                    self.answer(200, data)
                    return
                start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
                if start >= stop:
                    self.answer(416)
                    return
                content_range = f"bytes {start}-{stop - 1}/{len(data)}"
                self.answer(206, data[start:stop], {"Content-Range": content_range})

            def answer(self, status, body=b"", headers=()):
                self.send_response(status)
                for name, value in {**dict(headers), "Content-Length": len(body)}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body)
                self.server.sent += len(body)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.sent, server.status = 0, None
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/", server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()
