"""What is alive, by kind: against sums by hand."""

import gc

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memory.tracker import ACTIVATIONS, GRADIENTS, PARAMETERS, TEMPORARIES, Tracker

MIB = 2**18  # float32 elements


def test_a_gradient_counts_as_one_from_the_moment_its_memory_is_taken():
    weight = nn.Parameter(torch.zeros(MIB))
    weight.register_post_accumulate_grad_hook(lambda p: tracker.label(GRADIENTS, [p.grad]))
    with Tracker() as tracker:
        tracker.label(PARAMETERS, [weight])
        tracker.mark()
        loss = (weight * weight.detach().clone()).sum()
        tracker.label_new(ACTIVATIONS)
        tracker.forget_peak()
        loss.backward()
    peak = tracker.at_peak().by_kind
    # the peak is when the gradient is computed: its memory, which nobody has labelled yet
    assert {kind: size for kind, size in peak.items() if size > 1000} == {
        PARAMETERS: 2**20, ACTIVATIONS: 2**20 + 4, GRADIENTS: 2**20,
    }  # fmt: skip
    assert tracker.now().by_kind.get(ACTIVATIONS, 0) < 1000  # backward let the graph go


def test_views_count_once_and_what_is_gone_not_at_all():
    with Tracker() as tracker:
        whole = torch.zeros(4, MIB)
        parts = [whole[n].view(-1) for n in range(4)] + [whole.t(), whole.detach()]
        assert tracker.live == 4 * 2**20
        del whole
        assert tracker.live == 4 * 2**20  # its views hold it
        del parts
        gc.collect()
        assert tracker.live == 0
        assert tracker.peak == 4 * 2**20


def test_a_storage_that_grows_is_counted_as_large_as_it_is():
    with Tracker() as tracker:
        tensor = torch.zeros(10)
        tensor.resize_(MIB)
        assert tracker.live == 2**20
        assert tracker.now().by_kind == {TEMPORARIES: 2**20}


def test_the_parts_of_a_sparse_tensor_are_counted():
    with Tracker() as tracker:
        indices, values = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(8, 32)
        rows = torch.sparse_coo_tensor(indices, values, (1000, 32), check_invariants=False)
        before = tracker.live
        tracker.label(GRADIENTS, [rows])
        assert tracker.live == before
        assert tracker.now().by_kind[GRADIENTS] >= 8 * (8 + 32 * 4)


def test_the_phase_of_the_peak_and_the_peak_of_each_phase():
    with Tracker() as tracker:
        with tracker.phase("forward"):
            torch.zeros(MIB)
        with tracker.phase("backward", "exchange buffers"):
            torch.zeros(2 * MIB)
    assert tracker.at_peak().phase == "backward"
    assert tracker.at_peak().by_kind == {"exchange buffers": 2 * 2**20}
    assert tracker.peak_by_phase == {"forward": 2**20, "backward": 2 * 2**20}


def test_fake_tensors_are_followed_as_real_ones_are():
    def work():
        layer = nn.Linear(300, 200)
        y = layer(torch.zeros(50, 300)).relu()
        z = torch.cat([y, y])[:10]
        z.sum().backward()
        return layer, z

    with Tracker() as real:
        kept = work()
    with FakeTensorMode(), Tracker() as fake:
        held = work()
    assert (fake.live, fake.peak) == (real.live, real.peak)
    assert real.peak > 300 * 200 * 4
    del kept, held


def test_on_a_gpu_sizes_are_whole_sectors_and_what_is_on_the_cpu_is_left_out():
    tracker = Tracker("cuda")
    with tracker:
        torch.zeros(100)
    assert tracker.peak == 0
