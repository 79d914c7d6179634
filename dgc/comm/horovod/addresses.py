"""By which addresses a rank can be reached from others, beside Horovod."""

from __future__ import annotations

import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"


def to_try(host: str, addresses: list[str]) -> list[str]:
    """Return addresses of a program of a host, the likeliest first."""
    return [LOOPBACK, *addresses] if host == socket.gethostname() else addresses


def own() -> list[str]:
    """Return this machine's IPv4 addresses, but for its loopback's."""
    found, last = {}, ""
    try:
        lines = Path("/proc/net/fib_trie").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        word = line.split()
        if word[:1] == ["|--"]:
            last = word[1]
        elif "host LOCAL" in line and not last.startswith("127."):
            found[last] = None
    return list(found) or [socket.gethostname()]
