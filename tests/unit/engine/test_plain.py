"""What a checkpoint may hold: the reader itself is the judge."""

import collections
import decimal
import enum
import io
import pathlib

import numpy
import pytest
import torch
from torch import nn

from engine.plain import plain


class Order(enum.IntEnum):
    FIRST = 1


class Colour(enum.StrEnum):
    RED = "red"


class Kind(enum.Enum):
    ONE = 1


class Text(str):
    def __str__(self):
        return "another"


State = collections.namedtuple("State", "h c")


def read(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(numpy.float64(0.1), float), (numpy.float32(0.1), float), (numpy.int64(7), int),
     (numpy.bool_(True), bool), (numpy.str_("t"), str), (numpy.complex64(1j), complex),
     (Order.FIRST, int), (Colour.RED, str), (Text("t"), str)],
)  # fmt: skip
def test_what_equals_a_plain_value_is_written_as_one(value, kind):
    nested = {"a": [1.0, (value, {"b": value})], value: None}
    became = read(plain(nested, "x"))
    assert became == nested
    assert type(became["a"][1][0]) is type(became["a"][1][1]["b"]) is kind


def test_an_array_of_no_axes_is_its_value():
    assert type(plain(numpy.array(0.5), "x")) is float


def test_containers_keep_their_kind_and_a_models_versions():
    state = nn.BatchNorm1d(2).state_dict()
    state["seen"] = numpy.int64(3)
    counter = collections.Counter({numpy.int64(30): 1})
    became = read(plain({"model": state, "milestones": counter, "set": {numpy.int8(1)}}, "x"))
    assert became["model"]._metadata == state._metadata
    assert type(became["milestones"]) is collections.Counter
    assert became["set"] == {1}


def test_what_is_plain_already_is_not_copied():
    value = {"a": [torch.ones(2), {"b": {1, 2}}], "c": torch.Size([1]), "d": nn.Linear(2, 2).weight}
    assert plain(value, "x") is value


@pytest.mark.parametrize(
    "value",
    [numpy.arange(3), pathlib.Path("x"), Kind.ONE, State(1, 2), collections.deque([1]), range(3),
     frozenset([1]), collections.defaultdict(int), decimal.Decimal(1), numpy.longdouble(1), len],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_the_reader_would_refuse_is_named_with_the_way_to_it(value):
    with pytest.raises(TypeError, match=r"shared\.groups\[1\]\.lr is .* allowed: tensors, numbers"):
        plain({"groups": [{}, {"lr": value}]}, "shared")
