"""Where Ray is, checked before Ray itself looks: a named cluster that answers, a folder short enough for its sockets."""

import logging
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from facediffuser.errors import InputError, UnreachableError
from facediffuser.storage import LocalStore

logger = logging.getLogger(__name__)

ANSWER_S = 4.0
# The path of a Unix socket has at most 107 bytes; Ray adds up to 68: /ray, the session's name, /sockets/plasma_store.
LONGEST_FOLDER = 39
SHORT_FOLDER = "/tmp"
# Of Ray's servers, which all speak gRPC; Ray itself waits minutes for another one's answer.
_SETTINGS = b"\x04"
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _SETTINGS + bytes(5)
_ADDRESS = re.compile(r"(?:ray://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[\w.-]+):(?P<port>\d{1,5})")


def require_reachable(address: str) -> None:
    """Check within seconds that something listens at the address of a cluster.

    Args:
        address: a value of RAY_ADDRESS; `auto` is left to Ray.

    Raises:
        InputError: it is no address of Ray, or something else than Ray answers there.
        UnreachableError: nothing answers there.
    """
    if address == "auto":
        return
    match = _ADDRESS.fullmatch(address)
    if not match:
        raise InputError(f"RAY_ADDRESS {address}: not an address of Ray; give auto, host:6379 or ray://host:10001")
    host, port = match["host"].strip("[]"), int(match["port"])
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[:2]
    except (OSError, UnicodeError):
        raise UnreachableError(
            f"RAY_ADDRESS {address}: no such host; correct it, or unset it for a Ray of this machine"
        ) from None
    for family, kind, protocol, _, place in found:
        with socket.socket(family, kind, protocol) as connection:
            connection.settimeout(ANSWER_S)
            try:
                connection.connect(place)
            except (OSError, OverflowError):
                continue
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0") and not _speaks_grpc(connection):
                raise InputError(f"RAY_ADDRESS {address}: something else than Ray answers there; correct it, or unset it "
                                 "for a Ray of this machine")  # fmt: skip
            return
    raise UnreachableError(
        f"RAY_ADDRESS {address}: no cluster answers there; start it, correct it, or unset it for a Ray of this machine"
    )


class HeadWatch:
    """Says in the log when a cluster's head stops answering: Ray ends this process then, without a word of its own."""

    def __init__(self, address: str):
        self.address, self.answers = address, True

    def look(self) -> None:
        """Look once; a change is logged."""
        try:
            require_reachable(self.address)
        except InputError:
            if self.answers:
                logger.error(
                    "Ray's head at %s does not answer: if it stays away or has forgotten this run, Ray ends this process; "
                    "run the same command again when it is back, finished shards are kept",
                    self.address,
                )
            self.answers = False
        else:
            if not self.answers:
                logger.warning("Ray's head at %s answers again", self.address)
            self.answers = True


def _speaks_grpc(connection: socket.socket) -> bool:
    """Return whether the other end greets as HTTP/2 servers do: its first frame is one of SETTINGS."""
    try:
        connection.sendall(_HTTP2_GREETING)
        answer = b""
        while len(answer) < 4 and (more := connection.recv(64)):
            answer += more
    except OSError:
        return False
    return answer[3:4] == _SETTINGS


def session_folder(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return what RAY_TMPDIR must be for a Ray started here, None for Ray's own choice.

    Ray takes TMPDIR; where that is too long for the paths of its sockets, or cannot be written, /tmp is taken.

    Args:
        environment: variables by name.

    Raises:
        InputError: RAY_TMPDIR, which is Ray's own, is too long or cannot be written, or /tmp cannot; the error names
            the variable.
    """
    own = environment.get("RAY_TMPDIR")
    name, folder = ("RAY_TMPDIR", own) if own else ("TMPDIR", environment.get("TMPDIR", ""))
    if len(os.fsencode(folder)) <= LONGEST_FOLDER:
        try:
            LocalStore(Path(folder or SHORT_FOLDER)).require_writable()
            return None
        except InputError as error:
            if own or folder == SHORT_FOLDER or not folder:
                raise InputError(f"{name} {error}") from None
            return SHORT_FOLDER
    if own or not os.access(SHORT_FOLDER, os.W_OK | os.X_OK):
        raise InputError(
            f"{name} {folder}: longer than {LONGEST_FOLDER} characters, too long for Ray's sockets; set RAY_TMPDIR to a "
            "shorter folder"
        )
    return SHORT_FOLDER
