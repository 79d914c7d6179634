"""The kinds of memory in the order in which tables and pictures show them."""

from __future__ import annotations

from memory import tracker as kinds
from memory.rehearsal import STATE

STATE_KIND = "optimizer state"
ORDER = (
    kinds.PARAMETERS, "averaged parameters", kinds.BUFFERS, kinds.GRADIENTS, "residual", "velocity",
    "statistics", STATE_KIND, kinds.EXCHANGE, kinds.ACTIVATIONS, kinds.TEMPORARIES, kinds.INPUTS,
    kinds.CARRIED,
)  # fmt: skip


def grouped(by_kind: dict[str, int]) -> dict[str, int]:
    """Return bytes by kind, with all optimizer state as one kind, in the order of the tables."""
    found: dict[str, int] = {}
    for kind in sorted(by_kind, key=rank):
        name = STATE_KIND if kind.startswith(STATE) else kind
        found[name] = found.get(name, 0) + by_kind[kind]
    return found


def rank(kind: str) -> tuple[int, str]:
    """Return the key by which kinds are sorted."""
    name = STATE_KIND if kind.startswith(STATE) else kind
    return (ORDER.index(name) if name in ORDER else len(ORDER)), kind
