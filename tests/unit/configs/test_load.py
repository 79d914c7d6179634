from pathlib import Path

import numpy
import pytest
import torch

from configs import load
from engine.filling import fill_in

ROOT = Path(__file__).parents[3]
DIGITS, WM5 = ROOT / "configs/digits/resnet20.py", ROOT / "configs/dgc/wm5.py"
ALL = sorted(p for p in (ROOT / "configs").rglob("*/*.py") if p.name != "__init__.py")


def build(files=(DIGITS,), **overrides):
    return load.build(load.compose(files, {k.replace("__", "."): v for k, v in overrides.items()}))


NEEDS = {"dgc": "imagenet/resnet18", "optim": "imagenet/resnet18", "softmax": "text/lstm"}


def test_every_config_of_the_project_builds_with_a_model_of_its_kind():
    for path in ALL:
        first = NEEDS.get(path.parent.name)
        first = {"cosine.py": "imagenet/resnet18", "shards.py": "text/lstm"}.get(path.name, first)
        run = build([*([ROOT / f"configs/{first}.py"] if first else []), path])
        with torch.device("meta"):  # some have 300 million parameters
            model = fill_in(run.model, {"num_words": 267_735})()
        assert isinstance(model, torch.nn.Module)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/optim").glob("[a-z]*.py")), ids=str)
def test_every_optimizer_of_the_project_steps(path):
    run = build([DIGITS, path])
    parameter = torch.nn.Parameter(torch.zeros(100, 50))
    optimizer = run.train.optimizer([parameter])
    parameter.grad = torch.randn(100, 50, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert bool((parameter != 0).all())


def test_the_short_names_mean_what_they_meant_to_the_predecessors():
    def compression(*names):
        return build([DIGITS, *(ROOT / f"configs/dgc/{name}.py" for name in names)]).dgc

    assert build().dgc is None
    assert compression("wm0").density_warmup_epochs == 0
    assert compression("wm5").density_at(0) == pytest.approx(0.001 ** (1 / 6))
    assert [compression("wm5o").density_at(e) for e in range(6)] == [1.0] * 5 + [0.001]
    assert compression("fp16").value_dtype == "float16"
    assert compression("int32").index_coding == "int32"
    assert compression("mm").mask_velocity
    assert not compression("nm").mask_velocity
    assert not compression("nm", "wm5").mask_velocity  # the folder's own settings apply only once


def test_files_compose_left_to_right_and_overrides_come_last():
    cosine, resnet = (ROOT / f"configs/imagenet/{n}.py" for n in ("cosine", "resnet50"))
    scheduler = torch.optim.lr_scheduler
    assert build([resnet]).train.scheduler.func is scheduler.MultiStepLR
    assert build([resnet, cosine]).train.scheduler.func is scheduler.CosineAnnealingLR
    assert build([resnet, cosine], train__num_epochs="500").train.num_epochs == 500


def test_the_order_of_model_and_compression_does_not_matter():
    one, other = load.compose([DIGITS, WM5], {}), load.compose([WM5, DIGITS], {})
    assert load.flatten(one) == load.flatten(other)


def test_importing_config_files_changes_nothing():
    before = load.flatten(load.compose([DIGITS], {}))
    load.compose([DIGITS, WM5], {"train.num_epochs": "3", "seed": "1"})
    assert load.flatten(load.compose([DIGITS], {})) == before


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("0.5", 0.5), ("2", 2)],
)
def test_overrides_are_read_as_python_values(text, value):
    assert build(train__optimizer__lr=text).train.optimizer.keywords["lr"] == value


def test_words_for_true_false_and_none():
    assert build(train__scheduler="none").train.scheduler is None
    assert build(train__scale_lr_by_workers="False").train.scale_lr_by_workers is False
    assert build(train__top_k="[1, 3]").train.top_k == [1, 3]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            {"train.num_epoch": "7"},
            "configs.train has no setting 'num_epoch'; did you mean 'num_ep",
        ),
        ({"trian.num_epochs": "7"}, "configs has no setting 'trian'; did you mean 'train'"),
        ({"train.optimizer.learning": "1"}, "configs.train.optimizer has no setting 'learning'"),
        ({"train.num_epochs": "x"}, r"configs.train.num_epochs is 'x' \(str\); allowed: int"),
        ({"train.num_epochs": "true"}, r"configs.train.num_epochs is True \(bool\); allowed: int"),
        ({"train.num_epochs": "0"}, "configs.train.num_epochs is 0; allowed: 1 or more"),
        ({"train.num_epochs.x": "1"}, "configs.train.num_epochs is 30 and has no setting 'x'"),
        ({"train": "3"}, "configs.train is a group of settings; set one of: num_epochs"),
        ({"dgc.density": "0.01"}, "configs.dgc is None .*; list a file of configs/dgc/"),
        ({"train.schedule_lr_per": "week"}, r"allowed: Literal\['epoch', 'step'\]"),
        ({"train.precision": "half"}, r"allowed: Literal\['float32', 'bfloat16', 'float16'\]"),
    ],
)
def test_a_wrong_setting_names_the_key_what_is_allowed_and_the_nearest(overrides, complaint):
    with pytest.raises(load.ConfigError, match=complaint):
        load.build(load.compose([DIGITS], overrides))


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("def configure(run):\n    run.seed = 7\n")
    assert load.compose(["configs/digits/resnet20.py", "~/mine.py"], {}).seed == 7


def test_a_missing_file_and_a_missing_model_say_what_to_do():
    with pytest.raises(load.ConfigError, match=r"did you mean '.*resnet20.py'"):
        build([DIGITS.with_name("resnet2.py")])
    with pytest.raises(load.ConfigError, match="configs.model is not set"):
        build([WM5])


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1", "defines no function configure"),
        ("def configure(run): run.train.num_epoch = 3", "did you mean 'num_epochs'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, source, complaint):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(load.ConfigError, match=complaint) as caught:
        build([DIGITS, path])
    assert str(path) in str(caught.value)


def test_the_last_warmup_listed_counts():
    def compression(*names):
        return build([DIGITS, *(ROOT / f"configs/dgc/{name}.py" for name in names)]).dgc

    assert compression("wm5o", "wm5").density_at(0) < 1
    assert compression("wm5o", "wm0").density_at(0) == 0.001


def test_a_file_may_define_classes_of_its_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Mine:\n    size: int = 3\n"
        "def configure(run): run.seed = Mine().size\n"
    )
    assert build([DIGITS, path]).seed == 3


def test_values_without_a_lasting_name_are_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def configure(run): run.train.scheduler.eta_min = object()\n")
    with pytest.raises(load.ConfigError):
        load.flatten(load.compose([DIGITS, path], {}))


def test_moving_the_data_is_no_change_of_the_run():
    one = load.flatten(load.compose([ROOT / "configs/cifar/resnet20.py"], {}))
    other = one | {"configs.dataset.root": "/elsewhere", "configs.checkpoint.keep": 5}
    assert load.changes(one, other) == []
    assert load.changes(one, other | {"configs.seed": 1}) == ["configs.seed: 42 against 1"]


def test_differences_name_the_settings():
    one, other = load.compose([DIGITS], {}), load.compose([DIGITS], {"seed": "1"})
    assert load.differences(load.flatten(one), load.flatten(other)) == [
        "configs.seed: 42 against 1"
    ]


def test_the_folder_of_a_run_is_named_after_its_files():
    files = ["configs/cifar/resnet20.py", "configs/dgc/wm5.py"]
    assert load.run_name(files, ".e500") == "cifar.resnet20+dgc.wm5.e500"
    assert load.run_name(["/elsewhere/mine.py"]) == "mine"


def test_a_setting_that_came_later_and_is_off_is_no_change_of_the_run():
    now = {"configs.train.polyak_decay": None, "configs.seed": 42}
    assert load.changes({"configs.seed": 42}, now) == []
    assert load.changes({"configs.seed": 42}, {**now, "configs.train.polyak_decay": 0.9})


def test_a_checkpoint_from_before_a_setting_goes_on_under_what_was_then_done():
    now = load.flatten(load.compose([DIGITS, WM5], {}))
    later = ("precision", "residual_dtype", "velocity_dtype", "preconditioning", "select_by",
             "share_statistics", "clip_scope", ".momentum")  # fmt: skip
    then = {path: value for path, value in now.items() if not path.endswith(later)}
    then["configs.train.optimizer.momentum"] = now["configs.train.optimizer.momentum"]
    assert load.changes(then, now) == []
    assert load.changes(load.flatten(load.compose([DIGITS], {})), {**then, **now})
    for path, value in (("configs.train.precision", "float16"), ("configs.dgc.select_by", "x")):
        (line,) = load.changes(then, now | {path: value})
        assert line == f"{path}: {now[path]!r} against {value!r}"


def test_numpys_scalars_are_settings_like_any(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy as np\n"
        "def configure(run):\n"
        "    run.train.optimizer.lr = np.logspace(-3, -1, 5)[2]\n"
        "    run.train.num_epochs, run.train.top_k = np.int64(3), (np.int32(1), 5)\n"
        "    run.train.param_groups = {'*': {'momentum': np.float32(0.5)}}\n"
    )
    run = build([DIGITS, path])
    settings = [run.train.optimizer.keywords["lr"], run.train.num_epochs, run.train.top_k[0],
                run.train.param_groups["*"]["momentum"]]  # fmt: skip
    assert settings == [0.01, 3, 1, 0.5]
    assert [type(value) for value in settings] == [float, int, int, float]


def test_arrays_and_tensors_are_compared_by_all_their_values():
    texts = [
        load._text(make(values))
        for make in (torch.tensor, numpy.array)
        for values in (0.001, 0.00100001, [0.0] * 2000, [0.0] * 1000 + [1e-9] + [0.0] * 999)
    ]
    assert len(set(texts)) == len(texts)
    assert texts[0] == "torch.float32(0.0010000000474974513)"
