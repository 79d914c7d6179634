"""Find the largest micro-batch that fits into a given memory, by predictions."""

from __future__ import annotations

from memory.job import Contender
from memory.predict import Prediction, Predictor

LARGEST = 2**22  # samples; larger micro-batches are not looked for
_NUM_GUESSES = 8  # guesses by linear interpolation, before the search goes on by bisection


def largest_batch(
    predictor: Predictor, contender: Contender, memory_bytes: int
) -> Prediction | None:
    """Return the prediction for the largest micro-batch whose peak is within `memory_bytes`.

    A micro-batch with one sample more has been predicted not to fit, unless the result is LARGEST.
    Returns: None if not even one sample fits.
    Cost:    about six predictions, since sizes are guessed by linear interpolation.
    """
    below, above = _ends(predictor, contender, memory_bytes)
    num_guesses = 0
    while below is not None and above is not None and above.batch_size > below.batch_size + 1:
        size = (below.batch_size + above.batch_size) // 2
        if num_guesses < _NUM_GUESSES:
            size = below.batch_size + max(1, _ahead(below, above, memory_bytes))
        found = predictor(contender, min(size, above.batch_size - 1))
        below, above = (found, above) if found.peak_bytes <= memory_bytes else (below, found)
        num_guesses += 1
    return below


def _ends(
    predictor: Predictor, contender: Contender, memory_bytes: int
) -> tuple[Prediction | None, Prediction | None]:
    """Return a prediction that fits (None if none does) and one that does not (None if all fit)."""
    found = predictor(contender)
    if found.peak_bytes > memory_bytes:
        one = predictor(contender, 1)
        return (one, found) if one.peak_bytes <= memory_bytes else (None, one)
    other = predictor(contender, 2 * found.batch_size)
    while other.peak_bytes <= memory_bytes and other.batch_size < LARGEST:
        size = other.batch_size + _ahead(found, other, memory_bytes, other) + 1
        size = min(LARGEST, max(size, 2 * other.batch_size))
        found, other = other, predictor(contender, size)
    return (other, None) if other.peak_bytes <= memory_bytes else (found, other)


def _ahead(
    one: Prediction, other: Prediction, memory_bytes: int, start: Prediction | None = None
) -> int:
    """Return by how many samples `start` (None: `one`) can grow, by the line through both."""
    slope = (other.peak_bytes - one.peak_bytes) / (other.batch_size - one.batch_size)
    room = memory_bytes - (start or one).peak_bytes
    return int(min(LARGEST, room / slope)) if slope > 0 else 0
