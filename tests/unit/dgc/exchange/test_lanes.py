"""Gradients of several streams of a GPU: their exchange is on one, after all of them."""

from contextlib import contextmanager

import pytest
import torch

from dgc.exchange import lanes
from dgc.exchange.lanes import Lanes

GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


class Machine:
    """Streams of GPUs that are not there; `log` has what was asked of them."""

    def __init__(self):
        self.current, self.log = {}, []

    @contextmanager
    def stream(self, stream):
        before = self.current[stream.device]
        self.current[stream.device] = stream
        yield
        self.current[stream.device] = before


class Stream:
    def __init__(self, name, device, log):
        self.name, self.device, self.log = name, device, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Gradient:
    def __init__(self, log):
        self.log = log

    def record_stream(self, stream):
        self.log.append(f"recorded for {stream.name}")


@pytest.fixture
def machine(monkeypatch):
    there = Machine()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: there.current[device])
    monkeypatch.setattr(lanes, "raw_stream", lambda device: id(there.current[device]))
    monkeypatch.setattr(torch.cuda, "stream", there.stream)
    return there


def test_work_of_a_second_stream_goes_to_the_first_and_what_follows_waits_for_it(machine):
    log, ways = machine.log, Lanes()
    main, one, two = (Stream(name, GPU, log) for name in ("main", "one", "two"))
    machine.current[GPU] = one
    with ways.on(GPU, Gradient(log), None):
        assert machine.current[GPU] is one
    assert log == []  # there is one stream so far
    machine.current[GPU] = two
    with ways.on(GPU, Gradient(log), None):
        assert machine.current[GPU] is one
    assert log == ["one waits for two", "recorded for one"]
    log.clear()
    machine.current[GPU] = main
    ways.move_here()
    assert log == ["main waits for one"]
    with ways.on(GPU):
        assert machine.current[GPU] is main
    assert log == ["main waits for one"]


def test_each_device_has_its_lane_and_the_cpu_none(machine):
    ways = Lanes()
    machine.current = {d: Stream(str(d), d, machine.log) for d in (GPU, OTHER)}
    with ways.on(GPU), ways.on(OTHER), ways.on(torch.device("cpu")):
        ways.move_here()
    assert machine.log == []
