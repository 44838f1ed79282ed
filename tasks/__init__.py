"""Prefect tasks, thin; the drivers that run a stage on Ray or in this process.

Ray reads two switches of its own when it is imported, so they are set here, before any module of this package imports
Ray; for a cluster, named by RAY_ADDRESS, they are left as they are:

- A Ray of one machine listens on the loopback address only.
- A Ray started by this process asks for a token. It would do so anyway, with a warning unless the mode is set.
"""

import os
import re

_LOOPBACK = re.compile(r"(.*://)?(localhost|127\.[\d.]+|\[?::1\]?)(:\d+)?")

_address = os.environ.get("RAY_ADDRESS") or "local"
if _address == "local":
    os.environ.setdefault("RAY_AUTH_MODE", "token")
if _address == "local" or _LOOPBACK.fullmatch(_address):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
