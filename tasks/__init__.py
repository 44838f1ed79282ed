"""Prefect tasks, thin; the drivers that run a stage on Ray or in this process.

A Ray of one machine listens on the loopback address only. Ray reads this switch of its own when it is imported, so it is
set here, before any module of this package imports Ray; for a cluster, named by RAY_ADDRESS, it is left as it is.
"""

import os
import re

_LOOPBACK = re.compile(r"(.*://)?(localhost|127\.[\d.]+|\[?::1\]?)(:\d+)?")

if os.environ.get("RAY_ADDRESS", "local") in ("", "local") or _LOOPBACK.fullmatch(os.environ["RAY_ADDRESS"]):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
