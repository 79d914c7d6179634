"""How the parts of a run are put together: what they tell each other, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import memory
from assembly import data, parts
from configs import load
from dgc.comm.local import run_local
from engine.report import SilentReporter

ROOT = Path(__file__).parents[3]
DIGITS = ROOT / "configs/digits/resnet20.py"
WM0 = ROOT / "configs/dgc/wm0.py"


def trainer_of(comm, folder, overrides):
    config = load.compose([DIGITS], overrides)
    run, flat = load.build(config), load.flatten(config)
    return parts.build_trainer(run, comm, torch.device("cpu"), folder, flat, SilentReporter())


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"train.best_metric": "acc/test_top3"}, "configs.train.best_metric is 'acc/test_top3'; "
         "allowed: loss/test, acc/test_top1, acc/test_top5"),
        ({"train.batch_size_per_rank": "2000"}, "lower configs.train.batch_size_per_rank"),
        ({"data.samples_per_epoch": "10"}, "raise configs.data.samples_per_epoch"),
        ({"model.in_channels": "x"}, "configs.model"),
    ],
)  # fmt: skip
def test_what_a_part_refuses_is_told_with_the_setting(tmp_path, overrides, complaint):
    with pytest.raises(load.ConfigError, match=complaint):
        run_local(1, lambda comm: trainer_of(comm, tmp_path, overrides))


class Sized(nn.Module):
    """Asks for what the dataset knows."""

    def __init__(self, num_words, width=4):
        super().__init__()
        self.layer = nn.Linear(num_words, width)


class Knowing(TensorDataset):
    facts = {"num_words": 7, "word_counts": torch.arange(7)}  # noqa: RUF012


def test_a_model_is_told_what_the_dataset_knows_unless_it_is_set():
    splits = {"train": Knowing(torch.zeros(1))}
    run = load.build(load.compose([DIGITS], {}))
    run.model = Sized
    assert parts.build_model(run, splits).layer.in_features == 7
    run.model = parts.fill_in(Sized, {"num_words": 5})
    assert parts.build_model(run, splits).layer.in_features == 5


def test_ranks_whose_vocabularies_differ_are_stopped(tmp_path):
    def work(comm):
        run = load.build(load.compose([DIGITS], {}))
        split = Knowing(torch.zeros(4))
        split.facts = {"word_counts": torch.arange(7) + comm.rank}
        run.dataset = lambda: {"train": split}
        with pytest.raises(SystemExit, match="rank 0 and rank 1 differ:\n  word_counts to train"):
            data.build_splits(run, comm)

    run_local(2, work)


def test_a_dense_step_is_clipped_by_the_norm_of_the_mean_gradient(tmp_path):
    def work(comm):
        bound = {"train.clip_norm": "0.01", "train.scale_lr_by_workers": "false",
                 "train.lr_warmup_epochs": "0", "train.optimizer.weight_decay": "0"}  # fmt: skip
        trainer = trainer_of(comm, tmp_path, bound)
        before = [p.detach().clone() for p in trainer.state.model.parameters()]
        trainer.train_step(trainer.batches["train"].start(0, 0, {}))
        after = trainer.state.model.parameters()
        moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
        lr = trainer.state.optimizer.param_groups[0]["lr"]
        return (moved.norm() / lr).item()

    assert run_local(2, work) == pytest.approx([0.01, 0.01], rel=1e-3)


def test_a_sparse_exchange_clips_as_the_run_does_unless_it_says_otherwise():
    def clip_norm(overrides):
        run = load.build(load.compose([DIGITS, WM0], overrides))
        return parts.compression_of(run).clip_norm

    assert clip_norm({}) is None
    assert clip_norm({"train.clip_norm": "0.5"}) == 0.5
    assert clip_norm({"train.clip_norm": "0.5", "dgc.clip_norm": "2.0"}) == 2.0


def test_parameters_are_grouped_by_the_first_pattern_that_matches_their_name():
    model = nn.ModuleDict({n: nn.Linear(2, 2) for n in ("one", "two")} | {"norm": nn.LayerNorm(2)})
    run = load.build(load.compose([DIGITS], {"train.weight_decay_on_batch_norm": "false"}))
    run.train.param_groups = {"two.w*": {"lr": 1.0}, "t*": {"lr": 2.0}}
    groups = parts.parameter_groups(run.train, model)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [({names[id(p)] for p in group.pop("params")}, group) for group in groups]
    assert found == [
        ({"one.weight", "one.bias"}, {}),
        ({"two.weight"}, {"lr": 1.0}),
        ({"two.bias"}, {"lr": 2.0}),
        ({"norm.weight", "norm.bias"}, {"weight_decay": 0.0}),
    ]
    run.train.param_groups = {"three*": {}}
    with pytest.raises(load.ConfigError, match="by 'three\\*'; parameters are: one.weight"):
        parts.parameter_groups(run.train, model)


def test_a_misspelt_setting_of_a_group_is_refused():
    run = load.build(load.compose([DIGITS], {}))
    run.train.param_groups = {"*": {"momentm": 0.5}}
    with pytest.raises(load.ConfigError, match="SGD has no setting 'momentm', given for '.'"):
        parts.build_inner_optimizer(run.train, nn.Linear(2, 2))


def test_switches_of_language_models_leave_the_rest_of_a_run_alone():
    files = ["text/lstm", "optim/sketch_adam", "softmax/sampled", "optim/words_only"]
    run = load.build(load.compose([ROOT / f"configs/{file}.py" for file in files], {}))
    assert run.dataset.func.__name__ == "text_folder"
    assert run.train.optimizer.func.__name__ == "SketchAdam"
    assert run.model.keywords["softmax"] == "sampled"
    with pytest.raises(load.ConfigError, match="changes 'model', which no file before it sets"):
        load.compose([ROOT / "configs/softmax/sampled.py"], {})


def test_the_memory_reports_recommended_method_is_that_of_the_configs():
    files = [DIGITS, ROOT / "configs/optim/parsimony.py"]
    run = load.build(load.compose(files, {}))
    assert run.dgc == memory.RECOMMENDED
