"""A hub on loopback: repositories, commits and large files, as far as huggingface_hub's client needs them to publish and read."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


class Hub:
    """A server of one user's repositories; used as a context manager.

    fail_after: commits it takes before it answers 500.
    states: the files of every commit of a repository, by its SHA.
    ranges: the ranges of bytes that were asked for.
    """

    def __init__(self, large: int = 2000):
        self.large, self.files, self.blobs, self.commits, self.tokens = large, {}, {}, [], set()
        self.states, self.ranges = {}, []
        self.fail_after = -1
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

    def answer(self, method: str, path: str, body: bytes):
        """Return (status, document) for a request."""
        if path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}" if made.get("organization") else made["name"]
            if name in self.files:
                return 409, {"error": "exists", "url": f"{self.endpoint}/datasets/{name}"}
            self.files[name] = {}
            return 200, {"url": f"{self.endpoint}/datasets/{name}", "name": name, "id": name}
        if match := re.match(r"/api/datasets/([^/]+/[^/]+)/tree/(\w+)", path):
            files = self.files[match[1]] if match[2] == "main" else self.states[match[2]]
            return 200, [self._entry(key, data) for key, data in sorted(files.items())]
        if match := re.match(r"/datasets/[^/]+/[^/]+/resolve/(\w+)/(.+)", path):
            data = self.states.get(match[1], {}).get(match[2])
            return (404, {"error": "Entry not found"}) if data is None else (200, data)
        if match := re.match(r"/api/datasets/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [{"path": one["path"], "uploadMode": "lfs" if one["size"] > self.large else "regular",
                      "shouldIgnore": False, "oid": None} for one in files]  # fmt: skip
            return 200, {"files": modes}
        if match := re.match(r"/datasets/([^/]+/[^/]+).git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [
                {"oid": one["oid"], "size": one["size"]} | ({} if one["oid"] in self.blobs else
                {"actions": {"upload": {"href": f"{self.endpoint}/put/{one['oid']}"}}}) for one in objects]}  # fmt: skip
        if match := re.match(r"/put/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.blobs[match[1]] = body
            return 200, {}
        if match := re.match(r"/api/datasets/([^/]+/[^/]+)/commit/main", path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        if path == "/api/validate-yaml":  # a card's front matter
            front = json.loads(body)["content"].split("---")[1]
            errors = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "not YAML"}]
            return (400 if errors else 200), {"errors": errors, "warnings": []}
        if match := re.match(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(\w+))?$", path):
            if match[1] not in self.files or match[2] not in (None, "main", *self.states):
                return 404, {"error": "Repository not found"}
            return 200, {"id": match[1], "sha": match[2] if match[2] in self.states else self.head}
        return 404, {"error": f"{method} {path}"}

    def _entry(self, key: str, data: bytes) -> dict:
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        digest = hashlib.sha256(data).hexdigest()
        lfs = {"lfs": {"oid": digest, "size": len(data), "pointerSize": 130}} if digest in self.blobs else {}
        return {"type": "file", "path": key, "size": len(data), "oid": git, **lfs}

    def _commit(self, name: str, lines: list[dict]):
        if self.fail_after == 0:
            return 500, {"error": "out of order"}
        self.fail_after -= 1
        files = self.files[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.commits.append([line["value"].get("path") for line in lines if line["key"] != "header"])
        self.states[self.head] = dict(files)
        url = f"{self.endpoint}/datasets/{name}/commit/{self.head}"
        return 200, {"commitUrl": url, "commitOid": self.head, "success": True}

    @property
    def head(self) -> str:
        """The SHA of the last commit."""
        return f"{len(self.commits):040x}"

    def _handler(hub):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def _do(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.tokens.add(self.headers.get("Authorization"))
                status, document = hub.answer(self.command, self.path.split("?")[0], body)
                data = document if isinstance(document, bytes) else json.dumps(document).encode()
                if isinstance(document, bytes) and (given := self.headers.get("Range")):
                    start, end = (int(part) for part in given.removeprefix("bytes=").split("-"))
                    hub.ranges.append((start, end + 1))
                    status, data = 206, data[start : end + 1]
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_HEAD = _do

            def log_message(self, *_):
                pass

        return Handler
