"""A proxy in front of an S3 server that fails as object stores do: 500, 503, cut connections, slow answers.

One request a connection, passed on as it came (signatures stay valid); which request fails is drawn with a seed.
"""

import asyncio
import random
import socket
import threading
from collections import Counter
from typing import NamedTuple
from urllib.parse import urlsplit

KINDS = ("500", "503", "cut", "slow")
WAIT_S = 0.15
PIECES = 4


class Request(NamedTuple):
    """Who asked for what: the address of the client, the method, the path with its query, the range of bytes if any."""

    client: str
    method: str
    path: str
    bytes: str


class FaultyProxy:
    """As a context manager it serves on `endpoint`; while `active`, a share of the requests fails in the `kinds` given.

    A request that fails with 500 or is cut may have been carried out, as with a real store. `counts`: requests by what
    was done to them; `requests`: all of them. It listens on the loopback address, or where the given socket does.
    """

    def __init__(
        self,
        upstream: str,
        kinds: tuple[str, ...] = (),
        share: float = 0.0,
        seed: int = 0,
        listener: socket.socket | None = None,
    ):
        parts = urlsplit(upstream)
        self.host, self.port = parts.hostname, parts.port
        self.kinds, self.share, self.active = kinds, share, True
        self.counts: Counter[str] = Counter()
        self.requests: list[Request] = []
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        starting = asyncio.start_server(self._serve, sock=self._listener)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(30)
        host, port = self._listener.getsockname()
        self.endpoint = f"http://{host}:{port}"
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await self._request(reader, writer)
            if request:
                await self._answer(request, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # a client that was killed
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        method, path, _ = first.decode().split(" ", 2)
        headers = {line.split(b":", 1)[0].strip().lower(): line for line in lines}
        part = headers.get(b"range", b"").decode()
        self.requests.append(Request(writer.get_extra_info("peername")[0], method, path, part))
        if headers.pop(b"expect", None):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        headers[b"connection"] = b"Connection: close"
        length = int(headers.get(b"content-length", b":0").split(b":", 1)[1])
        body = await reader.readexactly(length)
        return b"\r\n".join([first, *headers.values(), b"", b""]) + body

    async def _answer(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        fault = self._random.choice(self.kinds) if self.active and self._random.random() < self.share else "none"
        carried_out = self._random.random() < 0.5
        self.counts[fault] += 1
        if fault == "slow":
            await asyncio.sleep(WAIT_S)
        answer = await self._upstream(request) if fault in ("none", "slow") or carried_out else b""
        if fault in ("500", "503"):
            code, name = (
                ("500 Internal Server Error", "InternalError") if fault == "500" else ("503 Slow Down", "SlowDown")
            )
            body = f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>no</Message></Error>".encode()
            head = f"HTTP/1.1 {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
            answer = head.encode() + b"Connection: close\r\n\r\n" + body
        elif fault == "cut":
            head, end, body = answer.partition(b"\r\n\r\n")
            answer = head + end + body[: len(body) // 2] if body else b""  # breaks off, or never comes
        step = max(1, len(answer) // PIECES) if fault == "slow" else max(1, len(answer))
        for start in range(0, len(answer), step):
            writer.write(answer[start : start + step])
            await writer.drain()
            if fault == "slow":
                await asyncio.sleep(WAIT_S / PIECES)

    async def _upstream(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()
