"""The checks in front of every implementation: what is refused, and what the message says."""

import pytest
import torch

from parsimony_kernels.runtime.operands import Cover, Factored, Full, MomentOfUpdates, Rule, Table
from parsimony_kernels.step import ops

N, M = 6, 4


def table(signed=False, **changes):
    shape = {"depth": 3, "width": 2, "dim": M} | changes
    return Table(torch.zeros(*shape.values()), torch.arange(shape["depth"]), signed)


def step(**changes):
    arguments = {"param": torch.zeros(N, M), "grad": torch.zeros(N, M), "rule": Rule(0.1)}
    ops.step(**{**arguments, **changes})


def elements(indices, values=None, **changes):
    values = torch.zeros(len(indices)) if values is None else values
    ops.step_elements(torch.zeros(N, M), values, torch.tensor(indices), Rule(0.1), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"param": torch.zeros(N, M, dtype=torch.int32)}, "param is torch.int32; allowed"),
        ({"param": torch.zeros(M, N).t()}, r"param has strides \(1, 6\); allowed: contiguous"),
        ({"param": torch.zeros(N)}, r"param has shape \(6,\); allowed: 2 dimensions"),
        ({"grad": torch.zeros(N, M + 1)}, r"grad has shape \(6, 5\); allowed: \(6, 4\)"),
        ({"grad": torch.zeros(N, M).bfloat16()}, "grad is torch.bfloat16; allowed: the parameter"),
        ({"grad": torch.zeros(N, M, device="meta")}, "grad is on meta; allowed: cpu"),
        ({"first": Full(torch.zeros(N, M + 1))}, r"first moment has shape \(6, 5\); allowed"),
        ({"first": MomentOfUpdates(torch.zeros(N, M).half())}, "first moment is torch.float16"),
        ({"first": table()}, "must be signed"),
        ({"second": table(signed=True)}, "without signs"),
        ({"second": table(depth=6)}, "depth 6; allowed: 1 to 5"),
        ({"second": table(dim=M + 1)}, "dim 5; allowed: 4"),
        ({"second": Cover(torch.zeros(M), torch.zeros(N))}, r"row has shape \(4,\); allowed: \(6"),
        ({"second": Cover(torch.zeros(N), torch.zeros(M), "III")}, "variant 'III'; allowed: I, II"),
        ({"second": Factored(torch.zeros(N), torch.zeros(M, 1))}, "col has shape"),
    ],
)  # fmt: skip
def test_a_step_refuses_what_does_not_fit_and_says_what_would(changes, message):
    with pytest.raises(ValueError, match=message):
        step(**changes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 6], r"rows lie in 0..6; allowed: 0..5"),
        ([-1, 2], r"rows lie in -1..2; allowed: 0..5"),
        ([3, 1], "not ascending and unique; coalesce"),
        ([1, 1], "not ascending and unique; coalesce"),
    ],
)
def test_rows_out_of_range_or_order_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        step(grad=torch.zeros(2, M), rows=torch.tensor(rows))
    with pytest.raises(ValueError, match="rows is torch.int32"):
        step(grad=torch.zeros(2, M), rows=torch.tensor([0, 1], dtype=torch.int32))


DOUBLES = {"param": torch.zeros(N, M).double(), "grad": torch.zeros(N, M).double()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.zeros(N, M)}, "grad is torch.float32; allowed: the parameter's dtype"),
        ({"first": Full(torch.zeros(N, M))}, "first moment is torch.float32; allowed: torch.f"),
        ({"first": MomentOfUpdates(torch.zeros(N, M))}, "first moment is torch.float32; allowed"),
        ({"first": table(signed=True)}, "table is torch.float32; allowed: torch.float64"),
        ({"second": Full(torch.zeros(N, M))}, "second moment is torch.float32; allowed"),
        ({"second": Cover(torch.zeros(N), torch.zeros(M))}, "row is torch.float32; allowed: torch"),
        ({"second": Factored(torch.zeros(N).double(), torch.zeros(M))}, "col is torch.float32; al"),
        ({"second": table()}, "table is torch.float32; allowed: torch.float64"),
    ],
)  # fmt: skip
def test_state_is_float64_where_the_parameter_is_and_only_there(changes, message):
    with pytest.raises(ValueError, match=message):
        step(**{**DOUBLES, **changes})
    doubled = Full(torch.zeros(N, M).double())
    with pytest.raises(ValueError, match="second moment is torch.float64; allowed: torch.float32"):
        step(second=doubled)
    step(**DOUBLES, second=doubled)


def test_a_float64_gradient_is_observed_in_float64_with_a_scale_of_either():
    grad, rule = torch.full((N, M), 1e140, dtype=torch.float64), Rule(0.1)
    for dtype in (torch.float32, torch.float64):
        second = Full(torch.zeros(N, M).double())
        ops.observe(grad, rule, second, scale=torch.tensor([2.0**-30], dtype=dtype))
        assert (second.values == (1e140 * 2.0**-30) ** 2).all()
    with pytest.raises(ValueError, match="second moment is torch.float32; allowed: torch.float64"):
        ops.observe(grad, rule, Full(torch.zeros(N, M)))
    with pytest.raises(ValueError, match="scale is torch.float64; allowed: torch.float32"):
        ops.observe(grad.float(), rule, Full(torch.zeros(N, M)), scale=torch.ones(1).double())


def test_elements_are_checked_too():
    with pytest.raises(ValueError, match=r"indices lie in 0..24; allowed: 0..23"):
        elements([0, 24])
    with pytest.raises(ValueError, match="not ascending and unique"):
        elements([5, 2])
    with pytest.raises(ValueError, match="values is torch.bfloat16; allowed: torch.float32"):
        elements([1, 2], torch.zeros(2).bfloat16())
    with pytest.raises(ValueError, match="2 entries for 3 values"):
        elements([1, 2], torch.zeros(3))


def test_a_sketch_takes_any_order_but_no_row_that_it_cannot_hash():
    values = torch.zeros(2, M)
    with pytest.raises(ValueError, match=rf"rows lie in 0..{2**31}; allowed: 0..{2**31 - 1}"):
        ops.sketch_insert(table(), torch.tensor([0, 2**31]), values)
    with pytest.raises(ValueError, match="3 rows for 2 rows of values"):
        ops.sketch_update(table(), torch.tensor([0, 1, 2]), values)
    with pytest.raises(ValueError, match="seeds"):
        ops.sketch_query(Table(torch.zeros(2, 2, M), torch.arange(3), True), torch.tensor([0]))
    ops.sketch_insert(table(), torch.tensor([2**31 - 1, 0]), values)


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("size", [(0, M), (N, 0), (0, 0)])
def test_nothing_is_a_step_of_nothing(name, size):
    with ops.use(name):
        step(param=torch.zeros(size), grad=torch.zeros(size), second=Full(torch.zeros(size)))
        step(grad=torch.zeros(0, M), rows=torch.zeros(0, dtype=torch.int64), second=table())
        for dim, count in ((0, 3), (M, 0)):
            rows = torch.arange(count)
            ops.sketch_insert(table(dim=dim), rows, torch.zeros(count, dim))
            ops.sketch_update(table(dim=dim), rows, torch.zeros(count, dim), forgetting=0.1)
            assert ops.sketch_query(table(dim=dim), rows).shape == (count, dim)


def test_the_choice_of_implementation_is_visible_and_checked():
    assert ops.implementation() == "native"
    with ops.use("reference"):
        assert ops.implementation() == "reference"
    assert ops.implementation() == "native"
    with pytest.raises(ValueError, match="'fast'; allowed: native, reference"), ops.use("fast"):
        pass
    with pytest.raises(ValueError, match="no native kernels for device meta"):
        step(param=torch.zeros(N, M, device="meta"), grad=torch.zeros(N, M, device="meta"))


def test_a_rule_is_float32_and_for_float64_what_it_was_made_from():
    rule = Rule(0.1, second_gain=1 - 0.999, weight_decay=torch.tensor(0.5))
    assert rule.scalars(torch.bfloat16) is rule and rule.second_gain != 1 - 0.999
    exact = rule.scalars(torch.float64)
    assert (exact.lr, exact.second_gain, exact.weight_decay) == (0.1, 1 - 0.999, 0.5)
    assert (exact.param_scale, exact.eps_inside) == (1.0, 0.0)
    other = rule.replace(param_scale=0.9)
    assert other.param_scale == Rule(0.1, param_scale=0.9).param_scale
    assert other.scalars(torch.float64).param_scale == 0.9
    assert other.second_gain == rule.second_gain and other.lr == rule.lr and rule.param_scale == 1.0


def test_a_rule_refuses_names_that_it_does_not_have():
    with pytest.raises(TypeError, match="Rule has no momentum"):
        Rule(0.1, momentum=0.9)
    assert Rule(0.1).param_scale == 1.0


def test_tensors_without_memory_of_their_own_are_refused():
    """A DTensor looks like a plain tensor until its memory is asked for, which is at 0."""

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (N, M))

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    with pytest.raises(ValueError, match="Wrapper without memory of its own"):
        step(param=Wrapper())


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_bucket_that_overflowed_stays_infinite_and_is_not_nan(name):
    sketch = table()
    with ops.use(name):
        ops.sketch_insert(sketch, torch.tensor([0]), torch.full((1, M), float("inf")))
        ops.sketch_insert(sketch, torch.tensor([0]), torch.ones(1, M))
        assert bool((ops.sketch_query(sketch, torch.tensor([0])) == float("inf")).all())
