"""What every implementation of step/ops.py must compute as step/reference.py does.

A case is data; `check` runs it under an implementation (a module with reference.py's functions) and
under the reference and compares bits. Used for C++ and for CUDA, emulated or on a GPU.

Every tensor lies between sentinels, at an address that is aligned for nothing but its own numbers:
writes outside it are seen, and reads outside it spoil results.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Buffer
from parsimony_kernels.runtime.operands import (
    Cover,
    Factored,
    First,
    Full,
    MomentOfUpdates,
    Rule,
    Second,
    Table,
)
from parsimony_kernels.step import reference

CPU = torch.device("cpu")
PADDING = 33
NUM_STEPS = 3
FIRSTS = ("none", "full", "velocity", "table")
SECONDS = ("none", "full", "cover", "cover I", "factored")
SECONDS += tuple(f"table {depth}" for depth in range(1, 6))
MODES = ("dense", "rows", "elements")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (33, 40), (1000, 24), (5, 5000), (1025, 1), (32, 31), (1, 1500), (4097, 3), (31, 129)

# An average that forgets, with everything on; sums, with everything off; one that forgets so much
# that rows which share a bucket would together take more than it holds.
AVERAGES = {
    **{"param_scale": 0.99, "weight_decay": 0.1, "sign": -1.0},
    **{"eps_inside": 1e-6, "eps_outside": 1e-8},
    **{"first_beta": 0.9, "first_gain": 0.1, "first_forgetting": 0.1, "first_scale": 1.7},
    **{"second_beta": 0.99, "second_gain": 0.01, "second_forgetting": 0.01, "second_scale": 1.9},
}
SUMS = {"first_beta": 0.9}
FORGETFUL = {"second_beta": 0.3, "second_gain": 0.7, "second_forgetting": 0.7,
             "first_forgetting": 0.5, "largest_quotient": 0.7}  # fmt: skip
RULES = {"averages": AVERAGES, "sums": SUMS, "forgetful": FORGETFUL}


@dataclass(frozen=True)
class Case:
    first: str
    second: str
    mode: str
    size: tuple[int, int]
    dtype: torch.dtype = torch.float32
    rule: str = "averages"
    width: int | None = None  # of tables; by default a fifth of the rows
    scale: float = 1.0  # of the gradient, and of the parameter

    def __str__(self) -> str:
        n, m = self.size
        dtype = str(self.dtype).removeprefix("torch.")
        width = "" if self.width is None else f"-width {self.width}"
        scale = "" if self.scale == 1.0 else f"-scale {self.scale}"
        return f"{self.first}-{self.second}-{self.mode}-{n}x{m}-{dtype}-{self.rule}{width}{scale}"


def step_cases() -> list[Case]:
    """Every first with every second in every mode; sizes, types and rules take turns."""
    kinds = itertools.product(FIRSTS, SECONDS, MODES)
    turns = zip(
        kinds, itertools.cycle(SIZES), itertools.cycle(DTYPES[:1] * 2 + DTYPES), strict=False
    )
    rules = itertools.cycle(RULES)
    cases = [Case(*kind, size, dtype, next(rules)) for kind, size, dtype in turns]
    return [*cases, *_size_cases(), *_collision_cases(), *_depth_cases(), *_tiny_cases()]


def _size_cases() -> list[Case]:
    """Every size with state that rows or columns share."""
    seconds = ("cover", "cover I", "factored", "table 3")
    kinds = itertools.product(SIZES, seconds, MODES)
    rules = itertools.cycle(("averages", "sums", "averages", "averages"))  # each in every mode
    return [Case("none", second, mode, size, rule=next(rules)) for size, second, mode in kinds]


def _collision_cases() -> list[Case]:
    kinds = itertools.product(("table 1", "table 4"), MODES, (1, 2), ("averages", "forgetful"))
    cases = [Case("table", second, mode, (65, 7), rule=rule, width=width)
             for second, mode, width, rule in kinds]  # fmt: skip
    return cases


def _depth_cases() -> list[Case]:
    """Sketched first moments of every depth (a "table" has 3) whose rows collide."""
    kinds = itertools.product(("table 1", "table 2", "table 4", "table 5"), MODES)
    rules = itertools.cycle(("averages", "sums", "forgetful", "averages"))
    return [Case(first, "full", mode, (65, 40), rule=next(rules)) for first, mode in kinds]


def _tiny_cases() -> list[Case]:
    """Numbers too close to 0 for full precision, which a GPU may be told to make 0."""
    return [
        Case("full", second, mode, (33, 40), dtype, "sums", scale=scale)
        for second, mode in itertools.product(("none", "full", "cover", "table 2"), MODES)
        for dtype, scale in ((torch.float32, 1e-20), (torch.float16, 1e-6), (torch.float32, 1e-39))
    ]


@dataclass
class Guarded:
    """Makes copies of tensors on a device, between sentinels."""

    device: torch.device
    padding: int = PADDING  # of another multiple than 32, tensors begin off boundaries
    _made: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def copy(self, tensor: Tensor) -> Tensor:
        is_float = tensor.is_floating_point()
        sentinel = float("nan") if is_float else torch.iinfo(tensor.dtype).min
        length = tensor.numel() + 2 * self.padding
        buffer = torch.full((length,), sentinel, dtype=tensor.dtype, device=self.device)
        inner = buffer[self.padding : self.padding + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        self._made.append((buffer, buffer.clone()))
        return inner

    def buffer(self, buffer: Buffer | None) -> Buffer | None:
        if buffer is None:
            return None
        return buffers.from_tensors(tuple(map(self.copy, buffers.tensors(buffer))))

    def check(self) -> None:
        for buffer, before in self._made:
            for part in (slice(0, self.padding), slice(-self.padding, None)):
                assert _same_bits(buffer[part], before[part]), "written outside a tensor"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = (x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, but for what bits a NaN has."""
    places = a.isnan()
    if a.shape != b.shape or not torch.equal(places, b.isnan()):
        return False
    return _same_bits(a.masked_fill(places, 0), b.masked_fill(places, 0))


def table(values: Tensor, signed: bool, seed: int = 0) -> Table:
    generator = torch.Generator().manual_seed(1000 + seed)
    seeds = torch.randint(-(2**62), 2**62, (len(values),), generator=generator)
    return Table(values, seeds, signed)


# ---- steps ---------------------------------------------------------------------------------------


class _Run:
    """One implementation's parameter and state, going through the steps of a case."""

    def __init__(self, case: Case, implementation: ModuleType, device: torch.device) -> None:
        self.case, self.implementation = case, implementation
        self.guarded = Guarded(device)
        generator = torch.Generator().manual_seed(0)
        param = (torch.randn(case.size, generator=generator) * case.scale).to(case.dtype)
        self.param = self.guarded.copy(param)
        self.state: dict[str, Tensor] = {"param": self.param}
        self.first = self._first()
        self.second = self._second()

    def _zeros(self, name: str, *shape: int) -> Tensor:
        self.state[name] = self.guarded.copy(torch.zeros(shape))
        return self.state[name]

    def _first(self) -> First:
        if self.case.first == "none":
            return None
        if self.case.first.startswith("table"):
            depth = int(self.case.first.removeprefix("table") or 3)
            return self._table("first", depth, signed=True)
        values = self._zeros("first", *self.case.size)
        return Full(values) if self.case.first == "full" else MomentOfUpdates(values)

    def _second(self) -> Second:
        n, m = self.case.size
        match self.case.second.split():
            case ["full"]:
                return Full(self._zeros("second", n, m))
            case ["cover", *variant]:
                variant = "I" if variant else "II"
                return Cover(self._zeros("row", n), self._zeros("col", m), variant)
            case ["factored"]:
                return Factored(self._zeros("row", n), self._zeros("col", m))
            case ["table", depth]:
                return self._table("second", int(depth), signed=False)
        return None

    def _table(self, name: str, depth: int, signed: bool) -> Table:
        n, m = self.case.size
        width = self.case.width or max(1, n // 5)
        return table(self._zeros(name, depth, width, m), signed, seed=depth)

    def step(self, gradient: Tensor, positions: Tensor | None) -> None:
        rule = Rule(lr=0.1, **RULES[self.case.rule])
        gradient = self.guarded.copy(gradient)
        where = None if positions is None else self.guarded.copy(positions)
        args = (rule, self.first, self.second)
        if self.case.mode == "elements":
            self.implementation.step_elements(self.param, gradient, where, *args)
        else:
            self.implementation.step(self.param, gradient, *args, where)
        self.guarded.check()


def arrivals(case: Case, step: int) -> tuple[Tensor, Tensor | None]:
    """Return a step's gradient, with zeros in it, and where it belongs."""
    generator = torch.Generator().manual_seed(10 + step)
    n, m = case.size
    if case.mode == "dense":
        positions, shape = None, (n, m)
    else:
        bound, most = (n, n // 2) if case.mode == "rows" else (n * m, 3000)
        count = max(1, min(bound // 3 if case.mode == "elements" else most, most))
        positions = torch.randperm(bound, generator=generator)[:count].sort().values
        shape = (count, m) if case.mode == "rows" else (count,)
    gradient = torch.randn(shape, generator=generator) * case.scale
    gradient[torch.rand(shape, generator=generator) < 0.1] = 0.0
    gradient[: len(gradient) // 8] = 0.0  # rows that have never had any: 0 / 0 with eps 0
    return gradient if case.mode == "elements" else gradient.to(case.dtype), positions


def check_steps(case: Case, implementation: ModuleType, device: torch.device = CPU) -> None:
    """Take a few steps both ways; parameter and state must agree after each."""
    expected, actual = _Run(case, reference, CPU), _Run(case, implementation, device)
    for step in range(NUM_STEPS):
        gradient, positions = arrivals(case, step)
        expected.step(gradient, positions)
        actual.step(gradient, positions)
        for name, tensor in expected.state.items():
            assert tensor.float().isfinite().all(), f"the case itself is not finite: {name}"
            assert_same(actual.state[name].cpu(), tensor, f"{name}, step {step}", case)


def assert_same(actual: Tensor, expected: Tensor, what: str, case: Case) -> None:
    """To the bit; with Factored, to the rounding of a few float32 operations on numbers below 4."""
    if case.second != "factored":
        wrong = (actual != expected).sum() if actual.shape == expected.shape else "shape"
        assert same_numbers(actual, expected), f"{what}: {wrong} of {expected.numel()} differ"
        return
    rounding = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[expected.dtype]
    torch.testing.assert_close(
        actual, expected, rtol=rounding, atol=3e-7, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def final_bits(case: Case, implementation: ModuleType, device: torch.device = CPU) -> list[Tensor]:
    """Return parameter and state after the steps, to compare between ways of running."""
    run = _Run(case, implementation, device)
    for step in range(NUM_STEPS):
        run.step(*arrivals(case, step))
    return [tensor.cpu() for tensor in run.state.values()]


# ---- sketches ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SketchCase:
    depth: int
    signed: bool
    num_rows: int
    dim: int
    width: int
    decay: float = 0.0

    def __str__(self) -> str:
        kind = "count-sketch" if self.signed else "count-min"
        shape = f"{self.depth}x{self.width}x{self.dim}"
        return f"{kind}-{shape}-{self.num_rows} rows-decay {self.decay}"


def sketch_cases() -> list[SketchCase]:
    sizes = ((0, 5, 3), (1, 24, 1), (33, 40, 2), (100, 1, 7), (1025, 33, 300), (31, 1500, 20))
    decays = itertools.cycle((0.0, 0.1, 0.9))
    return [
        SketchCase(depth, signed, *size, decay=next(decays))
        for depth, signed, size in itertools.product(range(1, 6), (True, False), sizes)
    ]


def check_sketch(case: SketchCase, implementation: ModuleType, device: torch.device = CPU) -> None:
    """Insert rows that repeat, update, query: tables and estimates must agree to the bit."""
    results = []
    for module, where in ((reference, CPU), (implementation, device)):
        generator = torch.Generator().manual_seed(1)
        guarded = Guarded(where)
        rows = torch.randint(0, 2**31, (case.num_rows,), generator=generator)
        repeated = rows[
            torch.randint(0, max(1, case.num_rows), (case.num_rows,), generator=generator)
        ]
        values = torch.randn(case.num_rows, case.dim, generator=generator).abs()
        rows, repeated, values = (guarded.copy(x) for x in (rows, repeated, values))
        zeros = guarded.copy(torch.zeros(case.depth, case.width, case.dim))
        sketch = table(zeros, case.signed, seed=case.depth)
        module.sketch_insert(sketch, repeated, values)
        module.sketch_update(sketch, rows, values, 0.5, case.decay)
        module.sketch_update(sketch, repeated, values, 0.25, case.decay)
        found = sketch.values.cpu(), module.sketch_query(sketch, repeated).cpu()
        columns = torch.arange(case.num_rows, device=where) % max(1, case.dim)
        indices = guarded.copy(repeated * case.dim + columns)
        elements = module.sketch_query_elements(sketch, indices).cpu() if case.dim else found[1]
        assert not case.dim or torch.equal(
            elements, found[1].gather(1, columns.cpu()[:, None])[:, 0]
        )
        results.append(found)
        guarded.check()
    for name, expected, actual in zip(("table", "estimates"), *results, strict=True):
        assert _same_bits(actual, expected), f"{name}: {(actual != expected).sum()} differ"


# ---- sizes that 32 bits do not count -------------------------------------------------------------


def check_far_entries(implementation: ModuleType, device: torch.device = CPU) -> None:
    """Step a few rows and elements on both sides of the 2^31st and 2^32nd element.

    Only their pages are touched, so that on a CPU the tensors need little of the memory they span.
    """
    n, m = 2**22 + 9, 1024
    rows = torch.tensor([0, 2**21 - 1, 2**21, 2**22 - 1, 2**22, n - 1])
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(rows), m, generator=generator).bfloat16()
    small, large = values.clone(), torch.empty(n, m, dtype=torch.bfloat16, device=device)
    small_state, large_state = torch.zeros(len(rows), m), torch.empty(n, m, device=device)
    large[rows.to(device)], large_state[rows.to(device)] = small.to(device), 0.0
    rule = Rule(lr=0.1, **AVERAGES)
    reference.step(small, values, rule, None, Full(small_state), torch.arange(len(rows)))
    there = values.to(device), rule, None, Full(large_state)
    implementation.step(large, *there, rows.to(device))
    indices = torch.arange(0, small.numel(), 7)
    numbers = torch.randn(len(indices), generator=generator)
    reference.step_elements(small, numbers, indices, rule, None, Full(small_state))
    far = (rows[indices // m] * m + indices % m).to(device)
    implementation.step_elements(large, numbers.to(device), far, *there[1:])
    assert _same_bits(large[rows.to(device)].cpu(), small)
    assert _same_bits(large_state[rows.to(device)].cpu(), small_state)
