"""The emulated GPU, for all tests of the CUDA source."""

import os

import pytest

from parsimony_kernels.step import device
from tests.emulation.emulator import FORWARD, WATCHED, Emulator


@pytest.fixture
def emulated(monkeypatch):
    """Return a function that makes CUDA's launches run emulated, in an order."""

    def use(order=FORWARD, flags=()):
        watched = ("-fsanitize=address",) if os.environ.get(WATCHED) else ()
        monkeypatch.setattr(device, "launcher", Emulator(order, (*watched, *flags)))
        return device.launcher

    return use
