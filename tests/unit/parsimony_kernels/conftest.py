"""The emulated GPU, for all tests of the CUDA source."""

import os

import pytest

from parsimony_kernels.runtime import launch
from tests.emulation.emulator import FORWARD, WATCHED, Emulator


@pytest.fixture
def emulated(monkeypatch):
    """Return a function that makes CUDA's launches run emulated, in an order."""

    def use(order=FORWARD, flags=()):
        watched = ("-fsanitize=address",) if os.environ.get(WATCHED) else ()
        monkeypatch.setattr(launch, "launcher", Emulator(order, (*watched, *flags)))
        return launch.launcher

    return use
