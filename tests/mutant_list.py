"""The faults that tests/mutants.py tries: what they change, and who is asked to find them."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault: `new` in the place of `old`, a text that the source has once; spaces do not matter.

    tests: files that must find it, by the ends of their paths, and -k with words, as pytest has it.
    Where code is edited, old and new follow; a mutant must change what the program does.
    """

    name: str
    old: str
    new: str
    tests: str


MUTANTS = [
    # ---- selection ----
    Mutant(
        "threshold-host",
        "(fabsf(x[j]) >= threshold)",
        "(fabsf(x[j]) > threshold)",
        "buffers/test_selecting.py",
    ),
    Mutant(
        "threshold-cuda",
        "fabsf(v) >= s.threshold && v != 0.0f",
        "fabsf(v) > s.threshold && v != 0.0f",
        "buffers/test_device.py",
    ),
    Mutant(
        "too-many-reduced",
        "is_kept[largest_indices(taken.values_K.abs(),",
        "is_kept[largest_indices(taken.values_K,",
        "test_selector.py",
    ),
    Mutant(
        "steering-excess",
        "plan.k * (1 - self.excess)",
        "plan.k * (1 + self.excess)",
        "test_selector.py",
    ),
    Mutant(
        "steering-aim",
        "plan.k * (1 - _MADE_UP * excess)",
        "plan.k * (1 + _MADE_UP * excess)",
        "test_selector.py",
    ),
    # ---- momentum correction, masking, residual ----
    Mutant(
        "momentum-once-a-step",
        "else Correction(1, 1, 0, 1)",
        "else Correction(m, 1, 0, 1)",
        "test_residual.py",
    ),
    Mutant(
        "mask-is-an-option",
        "if self.mask_velocity and name in self.velocity:",
        "if name in self.velocity:",
        "test_residual.py",
    ),
    Mutant(
        "lost-in-residuals-units",
        "part.values_K - back",
        "part.values_K - sent",
        "test_method.py -k loses",
    ),
    # ---- protocols ----
    Mutant(
        "put-back-the-rest",
        "is_back_K = ~self._is_delivered(delivered_U)",
        "is_back_K = self._is_delivered(delivered_U) & False",
        "test_protocols.py",
    ),
    Mutant(
        "owner-of-the-last-block",
        "(num_blocks - 1) % self.num_owners == self.owner",
        "(num_blocks - 1) % self.num_owners >= self.owner",
        "test_codec.py test_protocols.py",
    ),
    # ---- checkpoint ----
    Mutant(
        "part-unhashed",
        'if sha256 != part["sha256"]:',
        'if not part["sha256"]:',
        "test_checkpoint.py",
    ),
]
