"""A server on loopback that speaks the part of Google Cloud Storage's XML interface that the store needs."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class CloudStorage:
    """Buckets by name, objects by key; used as a context manager."""

    def __init__(self, *buckets: str):
        self.buckets = {name: {} for name in buckets}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def _handler(cloud):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _do(self):
                parts = urlsplit(self.path)
                bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                objects = cloud.buckets.get(bucket)
                if objects is None:
                    self._answer(404, b"")
                elif not key:
                    self._answer(200, _listing(objects, parse_qs(parts.query).get("prefix", [""])[0]))
                elif self.command == "PUT":
                    if self.headers.get("x-goog-if-generation-match") == "0" and key in objects:
                        self._answer(412, b"")
                    else:
                        objects[key] = body
                        self._answer(200, b"", ETag=_tag(body))
                elif key not in objects:
                    self._answer(404, b"")
                elif self.command == "DELETE":
                    del objects[key]
                    self._answer(204, b"")
                elif self.headers.get("If-Match") not in (None, _tag(objects[key])):
                    self._answer(412, b"")
                else:
                    self._send(objects[key])

            def _send(self, data: bytes):
                given, size = self.headers.get("Range"), len(data)
                headers = {"ETag": _tag(data), "Last-Modified": "Fri, 27 Nov 2026 12:00:00 GMT"}
                if given and self.command == "GET":
                    start, end = (int(part) for part in given.removeprefix("bytes=").split("-"))
                    part = data[start : end + 1]
                    headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{size}"
                    self._answer(206, part, **headers)
                else:
                    self._answer(200, data, **headers)

            def _answer(self, status: int, data: bytes, **headers: str):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_HEAD = do_DELETE = _do

            def log_message(self, *_):
                pass

        return Handler


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _listing(objects: dict[str, bytes], prefix: str) -> bytes:
    items = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>{escape(_tag(data))}</ETag>"
        "<LastModified>2026-11-27T12:00:00.000Z</LastModified></Contents>"
        for key, data in sorted(objects.items())
        if key.startswith(prefix)
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode()
