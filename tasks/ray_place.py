"""Where Ray is, checked before Ray itself looks: a named cluster that answers, a folder short enough for its sockets."""

import os
import re
import socket
from collections.abc import Mapping

from facediffuser.errors import InputError, UnreachableError

ANSWER_S = 4.0
# The path of a Unix socket has at most 107 bytes; Ray adds up to 68: /ray, the session's name, /sockets/plasma_store.
LONGEST_FOLDER = 39
SHORT_FOLDER = "/tmp"
_ADDRESS = re.compile(r"(?:ray://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[\w.-]+):(?P<port>\d{1,5})")


def require_reachable(address: str) -> None:
    """Raise InputError within seconds unless something listens at the address of a cluster; `auto` is left to Ray."""
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
                return
            except (OSError, OverflowError):
                continue
    raise UnreachableError(
        f"RAY_ADDRESS {address}: no cluster answers there; start it, correct it, or unset it for a Ray of this machine"
    )


def session_folder(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return what RAY_TMPDIR must be for a Ray started here, None for Ray's own choice.

    Ray takes TMPDIR; where that is too long for the paths of its sockets, /tmp is taken. Raises InputError naming the
    variable when RAY_TMPDIR, which is Ray's own, is too long, or /tmp cannot be written.
    """
    own = environment.get("RAY_TMPDIR")
    name, folder = ("RAY_TMPDIR", own) if own else ("TMPDIR", environment.get("TMPDIR", ""))
    if len(os.fsencode(folder)) <= LONGEST_FOLDER:
        return None
    if own or not os.access(SHORT_FOLDER, os.W_OK | os.X_OK):
        raise InputError(
            f"{name} {folder}: longer than {LONGEST_FOLDER} characters, too long for Ray's sockets; set RAY_TMPDIR to a "
            "shorter folder"
        )
    return SHORT_FOLDER
