"""How much memory a run takes: predict it before training, measure it, compare it with rivals.

The prediction runs the code that trains, on tensors without data (fakes.py, answers.py, inside.py),
and follows which of them are alive (tracker.py).
"""

from memory.batches import largest_batch
from memory.job import RECOMMENDED, Contender, Job, contenders, this_run
from memory.measure import Measured, held_by, measure
from memory.predict import Prediction, Predictor
from memory.report import predict, report

__all__ = [
    "RECOMMENDED", "Contender", "Job", "Measured", "Prediction", "Predictor", "contenders",
    "held_by", "largest_batch", "measure", "predict", "report", "this_run",
]  # fmt: skip
