import math

import pytest
import torch

from dgc.selection.plan import plan_sparsity
from dgc.selection.selector import MAX_TRIES, Selector
from dgc.worker.elements import TensorSpec
from dgc.worker.residual import Compensation
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.step import ops

SIZES = [1, 31, 32, 33, 1000, 1024, 1025, 4097, 50_000]


class Worker:
    """One tensor's compensation and selector, step by step."""

    def __init__(self, numel, density, momentum=0.0, dtype="float32", **settings):
        self.compensation = Compensation(momentum, residual_dtype=dtype, velocity_dtype=dtype)
        self.selector = Selector(plan_sparsity(numel, density, **settings))
        self.num_passes = 0
        again = self.compensation.select_again

        def counted(*arguments):
            self.num_passes += 1
            return again(*arguments)

        self.compensation.select_again = counted

    def take(self, grad):
        self.num_passes = 0
        selection = self.selector.begin(self.compensation.num_steps)
        found = self.compensation.accumulate("w", grad, selection=selection)
        (report,) = buffers.read_reports([found])
        return self.selector.settle(found, report, self.compensation, "w")

    def finish(self, keep=True):
        for part in (self.compensation, self.selector):
            part.end_step(stands=True) if keep else part.end_step(stands=False)

    def step(self, grad):
        taken = self.take(grad)
        self.finish()
        return taken

    def residual(self):
        return buffers.decode(self.compensation.residual["w"])


def gaussian(numel, seed=0):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def oracle(values, k):
    """The k largest magnitudes that are not zero, ties to the lower index, by sorting a list."""
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    return sorted(i for i in order[:k] if values[i] != 0)


# ---- exactly -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.001, 0.1, 0.99])
def test_exact_selection_is_the_sorted_one(size, density):
    values = gaussian(size, size)
    worker = Worker(size, density, exact_below=10**6)
    taken = worker.step(values)
    assert taken.indices_K.tolist() == oracle(values.tolist(), worker.selector.plan.k)
    assert torch.equal(taken.values_K, values[taken.indices_K])
    assert (worker.residual()[taken.indices_K] == 0).all()


def test_small_tensors_and_dense_ones_are_ranked():
    assert plan_sparsity(8191, 0.001).is_exact and not plan_sparsity(8192, 0.001).is_exact
    assert plan_sparsity(10**6, 0.25).is_exact and not plan_sparsity(10**6, 0.2).is_exact
    plan = plan_sparsity(10**7, 0.001)
    assert (plan.k, plan.k_bounds, plan.capacity) == (10_000, (8_000, 13_000), 80_000)
    assert plan.sample_every == 78
    assert plan_sparsity(10**5, 0.001).k_bounds == (70, 130)  # three deviations of a count of 100


# ---- within one step -----------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", buffers.DTYPES)
@pytest.mark.parametrize("threshold", (math.inf, 0.0, 1e-3, 2.0, 3.2, 4.5, 1e9))
def test_wherever_a_threshold_starts_the_largest_are_taken_and_the_rest_stays(
    implementation, dtype, threshold
):
    """The predecessors cut an overshoot by position, so that late large entries stayed behind."""
    worker = Worker(50_000, 0.002, 0.9, dtype)
    whole = Worker(50_000, 0.002, 0.9, dtype)
    worker.selector.load(torch.tensor([threshold, 0.0, math.inf, 0.0, 0.0, 100.0]))
    with ops.use(implementation):
        whole.compensation.accumulate("w", gaussian(50_000))
        taken = worker.take(gaussian(50_000))
    fewest, _, most = worker.selector.steering.bounds(worker.selector.plan)
    assert fewest <= taken.indices_K.numel() <= most and taken.indices_K.diff().gt(0).all()
    assert worker.residual().abs().max() <= taken.values_K.abs().min() * 1.02  # of an int8 level
    velocity = worker.compensation.velocity["w"]
    assert (buffers.take(velocity, taken.indices_K) == 0).all()
    worker.compensation.put_back("w", taken)
    for kind in ("residual", "velocity"):
        ours, all_of = (getattr(w.compensation, kind)["w"] for w in (worker, whole))
        for a, b in zip(buffers.tensors(ours), buffers.tensors(all_of), strict=True):
            assert torch.equal(a, b)


def test_zeros_are_never_sent():
    values = torch.zeros(10_000)
    values[[17, 9_999]] = torch.tensor([1e-20, -3.0])
    for exact_below in (0, 10**6):
        worker = Worker(10_000, 0.01, exact_below=exact_below)
        assert worker.step(values).indices_K.tolist() == [17, 9_999]
        for _ in range(3):
            assert worker.step(torch.zeros(10_000)).indices_K.numel() == 0
        assert worker.num_passes <= 1
        assert worker.step(gaussian(10_000)).indices_K.numel() >= 50


def test_a_tensor_of_equal_magnitudes_is_ranked_by_index():
    worker = Worker(100_000, 0.001)
    taken = worker.step(torch.ones(100_000))
    assert taken.indices_K.tolist() == list(range(100))
    assert worker.num_passes <= MAX_TRIES
    assert worker.residual().sum() == 99_900


def test_a_misleading_sample_is_corrected():
    """Few elements carry everything, in blocks that are not sampled."""
    values = torch.zeros(10**6)
    values[999_000:] = torch.arange(1.0, 1001.0)
    worker = Worker(10**6, 0.0005)
    taken = worker.step(values)
    fewest, most = worker.selector.plan.k_bounds
    assert fewest <= taken.indices_K.numel() <= most
    assert taken.indices_K.tolist() == list(range(10**6 - taken.indices_K.numel(), 10**6))


# ---- from step to step ---------------------------------------------------------------------------


def heavy_tailed(numel, drift, seed=1):
    """Student's t with 3 degrees of freedom, of scales and means that differ by element."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(numel, generator=generator)

    scale, mean, step = normal().exp(), 0.3 * normal(), 0
    while True:
        chi = sum(normal() ** 2 for _ in range(3)) / 3
        yield drift**step * scale * (normal() / chi.sqrt() + mean)
        step += 1


@pytest.mark.parametrize("drift", (1.0, 0.95, 1.05))
@pytest.mark.parametrize("momentum", (0.0, 0.9))
@pytest.mark.parametrize(
    "numel, dtype", ((16_384, "float32"), (16_384, "int8"), (200_000, "bfloat16"))
)
def test_ten_steps_average_to_what_is_wanted_with_hardly_a_second_pass(
    numel, dtype, momentum, drift
):
    worker, counts, num_passes = Worker(numel, 0.001, momentum, dtype), [], 0
    for step, grad in zip(range(40), heavy_tailed(numel, drift), strict=False):
        counts.append(worker.step(grad).indices_K.numel())
        num_passes += worker.num_passes if step >= 3 else 0
    means = torch.tensor(counts).float().unfold(0, 10, 1).mean(1) / worker.selector.plan.k
    assert 0.9 <= means.min() and means.max() <= 1.1
    assert num_passes <= 4  # of 37


def test_real_gradients_are_followed():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 256), torch.nn.Tanh(),
        torch.nn.Linear(256, 10),
    )  # fmt: skip
    weight, target = model[2].weight, torch.randn(64, 10)
    worker, counts, num_passes = Worker(weight.numel(), 0.002, 0.9), [], 0
    for step in range(60):
        x = torch.randn(32, 64)
        loss = torch.nn.functional.cross_entropy(model(x), (x @ target).argmax(1))
        model.zero_grad()
        loss.backward()
        taken = worker.step(weight.grad.view(-1))
        counts.append(taken.indices_K.numel())
        num_passes += worker.num_passes if step >= 3 else 0
        with torch.no_grad():
            weight.view(-1)[taken.indices_K] -= 0.1 * taken.values_K
            for p in model.parameters():
                if p is not weight:
                    p -= 0.1 * p.grad
    means = torch.tensor(counts).float().unfold(0, 10, 1).mean(1) / worker.selector.plan.k
    assert 0.9 <= means.min() and means.max() <= 1.1
    assert num_passes <= 5


def test_nothing_is_lost_from_step_to_step():
    """Whole numbers, which float32 adds without rounding."""
    worker, added, sent = Worker(20_000, 0.01), torch.zeros(20_000), torch.zeros(20_000)
    for seed in range(20):
        grad = (10 * gaussian(20_000, seed)).round()
        added += grad
        taken = worker.step(grad)
        sent[taken.indices_K] += taken.values_K
    assert torch.equal(sent + worker.residual(), added)


def test_an_undone_step_leaves_no_trace():
    one, other = Worker(20_000, 0.01, 0.9, "int8"), Worker(20_000, 0.01, 0.9, "int8")
    for seed in range(6):
        other.take(gaussian(20_000, 100 + seed) * 30)
        other.finish(keep=False)
        a, b = one.step(gaussian(20_000, seed)), other.step(gaussian(20_000, seed))
        assert torch.equal(a.indices_K, b.indices_K) and torch.equal(a.values_K, b.values_K)
        assert torch.equal(one.selector.state(), other.selector.state())


def test_a_saved_selector_goes_on_as_if_never_stopped():
    one, other = Worker(20_000, 0.01), Worker(20_000, 0.01)
    for seed in range(5):
        one.step(gaussian(20_000, seed))
    spec = TensorSpec("w", 20_000, torch.device("cpu"), compressible=True)
    other.compensation.load_state_dict(one.compensation.state_dict(), {"w": spec})
    other.selector.load(one.selector.state())
    for seed in range(5, 10):
        a, b = one.step(gaussian(20_000, seed)), other.step(gaussian(20_000, seed))
        assert torch.equal(a.indices_K, b.indices_K)
        assert one.num_passes == other.num_passes


def test_another_density_starts_from_the_threshold_there_is():
    worker = Worker(100_000, 0.01)
    for seed in range(5):
        worker.step(gaussian(100_000, seed))
    threshold = worker.selector.threshold
    worker.selector.plan = plan_sparsity(100_000, 0.001)
    assert worker.selector.threshold == threshold < math.inf
    assert 70 <= worker.step(gaussian(100_000, 9)).indices_K.numel() <= 130


def test_what_is_of_another_size_is_refused():
    worker = Worker(20_000, 0.1)
    with pytest.raises(ValueError, match="plan is for 99 elements; allowed: 20000"):
        worker.selector.plan = plan_sparsity(99, 0.1)
    with pytest.raises(ValueError, match="state has shape .2,.; allowed"):
        worker.selector.load(torch.zeros(2))
