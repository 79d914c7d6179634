"""Optimizers that keep little state. Each is an ordinary torch.optim.Optimizer."""

from optim.adagrad import Adagrad, SketchAdagrad
from optim.adam import Adam, FactoredAdam, SketchAdam, SM3Adam
from optim.momentum import Momentum, SketchMomentum
from optim.rmsprop import RMSprop, SketchRMSprop
from optim.schedules import QuadraticWarmupLinearCooldown
from optim.sketch import CountMinSketch, CountSketch
from optim.sm3 import SM3

__all__ = [
    "SM3",
    "Adagrad",
    "Adam",
    "CountMinSketch",
    "CountSketch",
    "FactoredAdam",
    "Momentum",
    "QuadraticWarmupLinearCooldown",
    "RMSprop",
    "SM3Adam",
    "SketchAdagrad",
    "SketchAdam",
    "SketchMomentum",
    "SketchRMSprop",
]
