"""Config files as modules: names, neighbours, and processes that import them again."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from configs import load, modules

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def new_run():
    modules.forget_labels()


def write(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


def named(path):
    """Return the module of a file that defines f, and how f is written in a configuration."""
    module = modules.import_file(path)
    return module, load._text(module.f)


def test_a_config_imports_its_neighbours_and_its_folder(tmp_path):
    write(tmp_path / "exp/__init__.py", "WIDTH = 3\n")
    write(tmp_path / "exp/common.py", "EPOCHS = 7\n")
    write(tmp_path / "exp/deep/__init__.py", "def configure(run): run.seed = 5\n")
    source = (
        "from . import configure as folders\nfrom .. import WIDTH\nfrom ..common import EPOCHS\n"
        "def configure(run):\n"
        "    assert run.seed == 5\n"
        "    run.seed = WIDTH\n    run.train.num_epochs = EPOCHS\n"
    )
    path = write(tmp_path / "exp/deep/net.py", source)
    run = load.compose([ROOT / "configs/digits/resnet20.py", path], {})
    assert (run.seed, run.train.num_epochs) == (3, 7)


def test_neighbours_are_found_in_a_folder_that_is_no_package(tmp_path):
    write(tmp_path / "common.py", "def f(): ...\n")
    module = modules.import_file(write(tmp_path / "2-level.py", "from .common import f\n"))
    assert load._text(module.f) == f"_config_{tmp_path.name}_common.f"


@pytest.mark.parametrize("name", ["a-b.py", "2level.py", "v1.5.py", "a b.py", "config"])
def test_any_file_name_will_do(tmp_path, name):
    path = write(tmp_path / "x.1" / name, "from .common import g\ndef f(): ...\n")
    write(tmp_path / "x.1/__init__.py", "")
    write(tmp_path / "x.1/common.py", "def g(): ...\n")
    module, text = named(path)
    assert text == f"_config_x.1_{Path(name).stem}.f"
    assert modules.import_file(path) is module


def test_files_of_one_name_in_folders_of_one_name_do_not_collide(tmp_path):
    paths = [write(tmp_path / f"{k}/exp/net.py", f"def f(): return {k}\n") for k in (1, 2)]
    (one, its_text), (other, others_text) = [named(path) for path in paths]
    assert (one.f(), other.f()) == (1, 2)
    assert (its_text, others_text) == ("_config_exp_net.f", "_config_2_exp_net.f")


def test_a_file_may_lie_beside_a_folder_of_its_name(tmp_path):
    for path in ("exp/__init__.py", "exp/net/__init__.py", "exp/net.py", "exp/net/small.py"):
        write(tmp_path / path, f"def f(): return {path!r}\n")
    texts = []
    for path in ("exp/net.py", "exp/net/small.py", "exp/net/__init__.py"):
        module, text = named(tmp_path / path)
        assert module.f() == path
        texts.append(text)
    assert texts == ["_config_exp_net.f", "_config_net_small.f", "_config_net___init__.f"]


def test_a_file_is_executed_once_also_where_python_finds_it_by_itself(tmp_path, monkeypatch):
    log = tmp_path / "log"
    source = f"open({str(log)!r}, 'a').write('x')\ndef f(): ...\ndef configure(run): ...\n"
    path = write(tmp_path / "own_package/exp.py", source)
    write(tmp_path / "own_package/__init__.py", "")
    user = write(tmp_path / "user.py", "from own_package.exp import f\ndef configure(run): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    files = [ROOT / "configs/digits/resnet20.py", path, user]
    for _ in range(2):
        load.compose(files, {})
    assert log.read_text() == "x"
    assert load._text(modules.import_file(user).f) == "_config_own_package_exp.f"


def test_the_projects_own_configs_have_the_names_they_had():
    files = [ROOT / "configs/digits/resnet20.py", ROOT / "tests/integration/perceptron.py"]
    flat = load.flatten(load.compose(files, {}))
    assert flat["configs.model"] == "_config_integration_perceptron.perceptron"
    assert load._text(modules.import_file(ROOT / "configs/cifar/__init__.py").configure) == (
        "_config_cifar___init__.configure"
    )


def test_another_process_imports_them_under_the_same_names(tmp_path):
    write(tmp_path / "common.py", "class Base:\n    size = 5\n")
    path = write(tmp_path / "a-b.py", "from .common import Base\nclass Mine(Base): ...\n")
    mine = modules.import_file(path).Mine()
    data = (pickle.dumps(modules.importer()), pickle.dumps(mine))
    code = f"import pickle\nfor d in {data}:\n    x = pickle.loads(d)\n    if callable(x): x()\n"
    python = [sys.executable, "-c", code + "print(x.size)"]
    done = subprocess.run(python, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "5\n", done.stderr
