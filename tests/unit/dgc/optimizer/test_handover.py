"""Workers that take over from workers of another number, or placed otherwise."""

import copy
import itertools

import pytest
import torch

from dgc.worker.storage import decoded
from tests.unit.dgc.method import CHOICES, INITIAL, assert_equal, combinations, run_jobs

DEFAULT = {key: values[0] for key, values in CHOICES.items()}
SIZES = (4, 2, 3, 4)


def mass(states, kind):
    """Return what is not sent yet, as the method weighs it: the sum over workers / their number."""
    total = {}
    for state in states:
        number, num_slices = state["share"].tolist()
        for name, saved in state["compensation"][kind].items():
            values = decoded(saved).double()
            empty = torch.zeros(num_slices * len(values), dtype=torch.float64)
            sums = total.setdefault(name, empty)
            sums[number * len(values) : (number + 1) * len(values)] += values
    return {
        name: sums[: INITIAL.get_parameter(name).numel()] / len(states)
        for name, sums in total.items()
    }


def go_on(size, name, choice, before=None, num_steps=5):
    """Let `size` workers take over from those before, and make some steps.

    Returns: what each took over, and its state at the end.
    """

    def work(job):
        if before is not None:
            with torch.no_grad():
                for name, value in before[0]["parameters"].items():
                    job.model.get_parameter(name).copy_(value)
            job.optimizer.load_state_dict(copy.deepcopy(before[0]["shared"]))
            mine = enumerate(state["worker"] for state in before)
            job.optimizer.load_worker_states(itertools.islice(mine, job.comm.rank, None, size))
        begin = copy.deepcopy(job.optimizer.worker_state_dict())
        for _ in range(num_steps):
            job.step()
        return begin, {**job.state(), "shared": copy.deepcopy(job.optimizer.state_dict())}

    return zip(*run_jobs(size, name, choice, work), strict=True)


def check_equal(states):
    for state in states:
        assert_equal(state["parameters"], states[0]["parameters"])


@pytest.mark.one_in(40)
@pytest.mark.parametrize("combination", list(combinations()), ids=lambda c: c[0].replace(" ", "_"))
def test_what_was_not_sent_is_worth_the_same_to_other_workers(combination):
    name, choice = combination
    states = None
    for size in SIZES:
        if size % 2 and choice["two_level"]:
            choice = {**choice, "two_level": False}
        begins, new = go_on(size, name, choice, states)
        if states is not None:
            check_mass(choice, [s["worker"] for s in states], begins)
            check_statistics([s["worker"] for s in states], begins)
        check_equal(new)
        states = new


def check_mass(choice, before, after):
    for kind in ("residual", "velocity"):
        old, new = mass(before, kind), mass(after, kind)
        assert old.keys() == new.keys()
        for name, values in old.items():
            if choice[f"{kind}_dtype"] == "float32" and choice["dtype"] == torch.float32:
                assert torch.equal(new[name].float(), values.float())
            elif choice[f"{kind}_dtype"] == "float32":
                atol = 1e-14 * values.abs().max()
                torch.testing.assert_close(new[name], values, rtol=0, atol=float(atol))
            else:
                steps = {"bfloat16": 2**-7, "int8": 1 / 64}[choice[f"{kind}_dtype"]]
                assert (new[name] - values).abs().max() <= steps * values.abs().max()


def check_statistics(before, after):
    for name, parts in after[0]["statistics"].items():
        for part, value in parts.items():
            if value.is_floating_point() and "seed" not in part and part != "step":
                mean = torch.stack([s["statistics"][name][part].double() for s in before]).mean(0)
                torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_in_fewer_bits_the_mass_is_kept_in_the_mean(dtype):
    """Many workers take over from two; each rounds by itself, so their mean comes near."""
    choice = {**DEFAULT, "residual_dtype": dtype}
    _, before = go_on(2, "sgd", choice)
    begins, _ = go_on(32, "sgd", choice, before, num_steps=0)
    old = mass([s["worker"] for s in before], "residual")["0.weight"]
    one, all_32 = (mass(b, "residual")["0.weight"] for b in (begins[:1], begins))
    assert (all_32 - old).norm() < 0.3 * (one - old).norm()  # 1 / sqrt(32) is 0.18


def test_as_many_workers_in_other_islands_take_over_slices():
    choice = {**DEFAULT, "two_level": True, "momentum": 0.9}
    _, before = go_on(4, "sgd", choice)
    assert before[1]["worker"]["share"].tolist() == [1, 2]
    begins, after = go_on(4, "sgd", {**choice, "two_level": False}, before)
    assert begins[1]["share"].tolist() == [0, 1]
    check_mass(choice, [s["worker"] for s in before], begins)
    check_equal(after)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda states: states[:1], None),
        (lambda states: [states[0], states[0]], "worker 0 was given twice"),
        (lambda states: [(1, states[1][1])], "workers .1. were given"),
        (
            lambda states: [
                (0, {**states[0][1], "compensation": {**states[0][1]["compensation"],
                     "residual": {"other": torch.zeros(3)}}})
            ],
            "residual is of other",
        ),
    ],
)  # fmt: skip
def test_states_that_do_not_belong_together_are_refused_on_all_ranks(change, complaint):
    _, before = go_on(2, "sgd", DEFAULT)

    def work(job):
        given = change([(n, copy.deepcopy(s["worker"])) for n, s in enumerate(before)])
        mine = given if job.comm.rank == 0 else []
        if complaint is None:
            job.optimizer.load_worker_states(mine)
            return
        kept = copy.deepcopy(job.optimizer.worker_state_dict())
        with pytest.raises(ValueError, match=complaint):
            job.optimizer.load_worker_states(mine)
        assert_equal(job.optimizer.worker_state_dict(), kept)

    run_jobs(2, "sgd", DEFAULT, work)
