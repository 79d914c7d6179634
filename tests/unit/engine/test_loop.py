"""The loop's own part in steps that are undone, in 16 bits too; compression has tests elsewhere."""

import copy
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from assembly import parts
from configs import load
from dgc.comm.local import run_local
from engine.checkpoint import CheckpointError, CheckpointFolder
from engine.replicas import ReplicaError, average_batch_statistics
from engine.report import SilentReporter
from engine.sampling import random_states, set_random_states
from engine.state import Progress

DIGITS = Path(__file__).parents[3] / "configs/digits/resnet20.py"
SETTINGS = {"train.micro_batches_per_step": "2", "train.polyak_decay": "0.9"}
NAN = float("nan")


def make_model():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
    )


def make_trainer(comm, folder, precision="float32", clip_norm=None, model=make_model, **train):
    more = {"train.precision": precision, "train.clip_norm": str(clip_norm)}
    config = load.compose([DIGITS], {**SETTINGS, **more})
    run = load.build(config)
    run.model = model
    for name, value in train.items():
        setattr(run.train, name, value)
    flat = load.flatten(config)
    device = torch.device("cpu")
    return parts.build_trainer(run, comm, device, folder, flat, SilentReporter())


def batches(comm, *factors):
    """One batch for each factor, which multiplies its images."""
    generator = torch.Generator().manual_seed(comm.rank)
    for factor in factors:
        images = torch.randn(8, 1, 8, 8, generator=generator)
        yield factor * images, torch.randint(10, (8,), generator=generator)


def step(trainer, data):
    trainer.train_step(data)
    trainer._count_step(0.0)
    trainer.state.learning_rate.step()


def all_but_schedule(state):
    """Copies of what a step that is undone must leave alone."""
    parts = [state.model.state_dict(), state.averaged.state_dict(), state.train_sums.values,
             state.optimizer.state_dict()["state"]]  # fmt: skip
    return copy.deepcopy(parts)


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("bad", [(NAN, 1.0), (1.0, NAN)], ids=["first", "last"])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_a_nan_in_a_micro_batch_of_one_rank_leaves_no_trace_on_any(
    tmp_path, bad, precision, clip_norm
):
    def work(comm):
        trainer = make_trainer(comm, tmp_path, precision, clip_norm)
        state = trainer.state
        step(trainer, batches(comm, 1.0, 1.0))
        before, lr = all_but_schedule(state), state.optimizer.param_groups[0]["lr"]
        step(trainer, batches(comm, *(bad if comm.rank == 1 else (1.0, 1.0))))
        assert state.optimizer.stats.skipped
        assert_equal(all_but_schedule(state), before)
        assert state.optimizer.param_groups[0]["lr"] > lr  # the schedule goes by steps
        step(trainer, batches(comm, 1.0, 1.0))
        assert state.train_sums.values.isfinite().all()
        assert (state.progress.step, state.progress.skipped_steps) == (3, 1)
        return list(state.averaged.parameters())

    one, other = run_local(2, work)
    assert_equal(one, other)


def test_a_batch_in_two_micro_batches_counts_once(tmp_path):
    def work(comm):
        twice = make_trainer(comm, tmp_path)
        once = make_trainer(comm, tmp_path, micro_batches_per_step=1)
        once.state.model.load_state_dict(twice.state.model.state_dict())
        (batch,) = batches(comm, 1.0)
        step(twice, iter([batch, batch]))
        step(once, iter([batch]))
        parameters = (list(each.state.model.parameters()) for each in (twice, once))
        assert_equal(*parameters)

    run_local(1, work)


def test_batch_statistics_become_the_mean_of_the_ranks(tmp_path):
    def work(comm):
        trainer = make_trainer(comm, tmp_path)
        (norm,) = (m for m in trainer.state.model.modules() if isinstance(m, nn.BatchNorm1d))
        norm.running_mean.fill_(comm.rank), norm.running_var.fill_(2.0 + comm.rank)
        average_batch_statistics(trainer.state.model, comm)
        return norm.running_mean, norm.running_var

    for mean, var in run_local(2, work):
        assert (mean == 0.5).all() and (var == 2.5).all()


def test_ranks_draw_from_random_states_of_their_own(tmp_path):
    def work(comm):
        trainer, before, drawn = make_trainer(comm, tmp_path), random_states(), []
        for rank in range(2):
            trainer.comm = SimpleNamespace(rank=rank, broadcast=lambda *_: None)
            trainer._resume()
            drawn.append((torch.rand(()).item(), random.random(), numpy.random.rand()))
        set_random_states(before)
        assert all(one != other for one, other in zip(*drawn, strict=True))

    run_local(1, work)


def test_a_checkpoint_holds_the_count_and_the_loss_scale(tmp_path):
    def work(comm):
        trainer, fresh = (make_trainer(comm, tmp_path, "float16") for _ in range(2))
        step(trainer, batches(comm, 1.0, 1.0))
        step(trainer, batches(comm, NAN, 1.0))
        fresh.state.restore(*copy.deepcopy((trainer.state.shared(), trainer.state.worker())))
        assert fresh.state.progress.skipped_steps == 1
        assert fresh.state.grad_scaler.state_dict() == trainer.state.grad_scaler.state_dict()
        assert fresh.state.grad_scaler.get_scale() == 2.0**15
        for each in (trainer, fresh):
            step(each, batches(comm, 1.0, 2.0))
        assert_equal(all_but_schedule(fresh.state), all_but_schedule(trainer.state))

    run_local(2, work)


def test_a_checkpoint_without_a_loss_scale_is_taken_up_in_float32(tmp_path):
    def work(comm):
        trainer = make_trainer(comm, tmp_path)
        step(trainer, batches(comm, 1.0, 1.0))
        shared = trainer.state.shared()
        del shared["grad_scaler"], shared["progress"]["skipped_steps"]
        worker = trainer.state.worker()
        del worker["carried"], worker["position"]
        trainer.state.restore(shared, worker)
        return trainer.state.progress.skipped_steps

    assert run_local(1, work) == [0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_forward_runs_in_the_precision_asked_for_and_parameters_stay(tmp_path, precision):
    def work(comm):
        trainer = make_trainer(comm, tmp_path, precision)
        inputs, labels = next(batches(comm, 1.0))
        seen = []
        trainer.state.model[-1].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        loss, _, _ = trainer._forward(trainer.state.model, (inputs, labels), None)
        assert seen == [getattr(torch, precision)]
        assert loss.dtype == torch.float32
        step(trainer, batches(comm, 1.0, 1.0))
        assert {p.dtype for p in trainer.state.model.parameters()} == {torch.float32}
        assert trainer.state.progress.skipped_steps == 0
        assert trainer.evaluate()["loss/test"] < 10

    run_local(1, work)


def test_statistics_that_workers_keep_are_a_kind_of_state_of_their_own(tmp_path):
    config = load.compose([DIGITS, DIGITS.parents[1] / "optim/parsimony.py"], {})

    def work(comm):
        trainer = parts.build_trainer(
            load.build(config), comm, torch.device("cpu"), tmp_path, {}, SilentReporter()
        )
        step(trainer, batches(comm, 1.0))
        return trainer.state.state_bytes()

    (kinds,) = run_local(1, work)
    assert kinds["velocity"] == kinds["gradients"] == 0
    assert kinds["statistics"] > 0
    assert 1.9 < kinds["residual"] / (kinds["parameters"] / 4) < 2


class Counting:
    """A task that carries on how many batches came before."""

    num_sums = 1

    def __call__(self, model, batch, carried):
        loss = model(batch[0]).square().mean()
        return (
            loss,
            torch.ones(1, dtype=torch.float64),
            (torch.zeros(1) if carried is None else carried[0] + 1,),
        )

    def metrics(self, sums, split):
        return {f"loss/{split}": sums[0]}


def test_what_is_carried_on_goes_back_with_a_step_that_is_undone_and_into_checkpoints(tmp_path):
    def work(comm):
        trainer, fresh = (make_trainer(comm, tmp_path) for _ in range(2))
        trainer.task = fresh.task = Counting()
        for each in (trainer, fresh):
            each.state.train_sums.values = torch.zeros(1, dtype=torch.float64)
        step(trainer, batches(comm, 1.0, 1.0))
        assert trainer.state.carried == (1,)
        step(trainer, batches(comm, 1.0, NAN))
        assert trainer.state.carried == (1,)
        fresh.state.restore(*copy.deepcopy((trainer.state.shared(), trainer.state.worker())))
        step(fresh, batches(comm, 1.0, 1.0))
        assert fresh.state.carried == (3,)

    run_local(2, work)


def test_the_best_epoch_is_known_though_the_first_one_was_not_a_number():
    progress = Progress()
    losses, accuracies = [NAN, 3.0, 2.0, 2.5], [5.0, 6.0, 7.0, 9.0]
    was_best = [
        progress.note({"loss/test": loss, "acc/test_top1": accuracy}, "loss/test")
        for loss, accuracy in zip(losses, accuracies, strict=True)
    ]
    assert was_best == [True, True, True, False]
    assert progress.metrics["loss/test"] == {"best": 2.0, "last": 2.5, "at_best": 2.0}
    assert progress.metrics["acc/test_top1"] == {"best": 9.0, "last": 9.0, "at_best": 7.0}


def test_a_model_that_writes_its_parameters_trains_on_one_rank_and_on_no_more(tmp_path):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.last = nn.Embedding(16, 4, max_norm=1.0), nn.Linear(256, 10)

        def forward(self, images):
            return self.last(self.rows(images.abs().clamp(max=15).long().flatten(1)).flatten(1))

    def work(comm):
        trainer = make_trainer(comm, tmp_path, model=Rows)
        step(trainer, batches(comm, 1.0, 1.0))

    run_local(1, work)
    with pytest.raises(ReplicaError, match="the parameter rows.weight of Embedding is written"):
        run_local(2, work)


def test_what_no_checkpoint_could_hold_is_refused_before_the_first_step(tmp_path):
    adam = partial(torch.optim.Adam, eps=numpy.array([1e-8]))

    def work(comm):
        trainer = make_trainer(comm, tmp_path, optimizer=adam)
        with pytest.raises(CheckpointError, match=r"shared.optimizer.param_groups\[0\].eps is"):
            trainer.train()
        assert trainer.state.progress.step == 0

    run_local(1, work)


def test_a_rate_that_is_a_tensor_goes_on_to_the_bit(tmp_path):
    def make(comm, folder):
        rate = {"optimizer": partial(torch.optim.Adam, lr=torch.tensor(1e-3)),
                "weight_decay_on_batch_norm": False,
                "scheduler": partial(ExponentialLR, gamma=0.7)}  # fmt: skip
        return make_trainer(comm, folder, **rate)

    def work(comm):
        straight, resumed = make(comm, tmp_path / "one"), make(comm, tmp_path / "other")
        data = list(batches(comm, *[1.0] * 12))
        for number in range(3):
            step(straight, iter(data[2 * number :]))
        straight._save(is_best=False)
        saved = CheckpointFolder(tmp_path / "one/checkpoints", comm).load_latest()
        # LocalComm gives all ranks one object.
        resumed.state.restore(copy.deepcopy(saved.shared), copy.deepcopy(saved.mine))
        for number in range(3, 6):
            for trainer in (straight, resumed):
                step(trainer, iter(data[2 * number :]))
        groups = [trainer.state.optimizer.param_groups for trainer in (straight, resumed)]
        assert len(groups[0]) == 2
        assert groups[0][0]["lr"] is not groups[0][1]["lr"]
        assert len({group["lr"].item() for each in groups for group in each}) == 1
        assert_equal(*(trainer.state.model.state_dict() for trainer in (straight, resumed)))

    run_local(2, work)
