"""What the ranks agreed on in a step: the means that the optimizer is to apply."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dgc.wire.entries import Entries


@dataclass
class Update:
    """The means over ranks, by tensor: all elements (N,), some entries, or (rows, their values).

    A tensor that rests on all ranks is in none of them.
    bad: the tensors, with ranks where they are known, because of which there is no update.
    """

    dense: dict[str, Tensor] = field(default_factory=dict)
    sparse: dict[str, Entries] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def take_in(self, other: Update) -> None:
        """Add what another bucket brought."""
        self.dense |= other.dense
        self.sparse |= other.sparse
        self.rows |= other.rows
        self.bad += other.bad
