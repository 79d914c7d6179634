import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy
import pytest
import torch

from dgc.comm.local import run_local
from engine import checkpoint, manifest, reading
from engine.checkpoint import CheckpointError, CheckpointFolder
from engine.parts import assign
from engine.writing import write_atomically


def save(folder, steps, num_ranks=2, best=(), keep=2, shared=None):
    def work(comm):
        checkpoints = CheckpointFolder(folder, comm, keep)
        for step in steps:
            worker = {"mine": torch.full((3,), comm.rank + 10.0 * step)}
            checkpoints.save(step, shared or {"step": step}, worker, is_best=step in best)

    run_local(num_ranks, work)


def load(folder, num_ranks=2):
    return run_local(num_ranks, lambda comm: CheckpointFolder(folder, comm).load_latest())


def test_each_rank_gets_the_shared_part_and_its_own_of_the_newest(tmp_path):
    save(tmp_path, [1, 2])
    for rank, loaded in enumerate(load(tmp_path)):
        assert loaded.shared == {"step": 2}
        assert loaded.mine["mine"].tolist() == [20.0 + rank] * 3


def test_an_empty_folder_is_a_new_run(tmp_path):
    assert load(tmp_path / "new") == [None, None]


def test_old_ones_go_and_the_best_stays(tmp_path):
    save(tmp_path, [1, 2, 3, 4], best=[2])
    names = sorted(path.name for path in tmp_path.iterdir())
    manifests = [name for name in names if name.endswith(".json")]
    assert manifests == ["step-00000003.json", "step-00000004.json"]
    assert "step-00000002.shared.pt" in names
    assert len(names) == 2 + 2 * 3 + 1
    best = run_local(2, lambda comm: CheckpointFolder(tmp_path, comm).load_best())
    assert best == [{"step": 2}] * 2


def test_the_best_is_remembered_across_a_restart(tmp_path):
    save(tmp_path, [1, 2], best=[1])

    def go_on(comm):
        checkpoints = CheckpointFolder(tmp_path, comm)
        checkpoints.load_latest()
        for step in (3, 4, 5):
            checkpoints.save(step, {"step": step}, {}, is_best=False)
        return checkpoints.load_best()

    assert run_local(2, go_on) == [{"step": 1}] * 2


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.unlink()])
@pytest.mark.parametrize("part", ["shared", "rank-0001-of-0002"])
def test_damage_on_any_rank_makes_all_take_the_one_before(tmp_path, damage, part):
    save(tmp_path, [1, 2])
    damage(tmp_path / f"step-00000002.{part}.pt")
    assert [loaded.shared for loaded in load(tmp_path)] == [{"step": 1}] * 2
    damage(tmp_path / f"step-00000001.{part}.pt")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        load(tmp_path)


def test_a_part_that_the_reader_refuses_gives_way_to_the_one_before(tmp_path, monkeypatch, capsys):
    save(tmp_path, [1])
    monkeypatch.setattr(checkpoint, "plain", lambda value, path: value)  # as it was written before
    save(tmp_path, [2], shared={"rate": numpy.float64(1)})
    assert [loaded.shared for loaded in load(tmp_path)] == [{"step": 1}] * 2
    told = capsys.readouterr().out
    assert re.search("skipped a damaged checkpoint: .*00000002.shared.pt cannot be read", told)


def test_what_could_not_be_read_is_refused_before_any_file_changes(tmp_path):
    save(tmp_path, [1])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"shared\.path is 'x' \(pathlib"):
        save(tmp_path, [2], shared={"path": Path("x")})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_that_was_cut_short_is_as_if_it_had_not_begun(tmp_path):
    save(tmp_path, [1])
    (tmp_path / "step-00000002.shared.pt").write_bytes(b"half")
    (tmp_path / "step-00000002.rank-0001-of-0002.pt.tmp").write_bytes(b"half")
    assert [loaded.shared for loaded in load(tmp_path)] == [{"step": 1}] * 2
    save(tmp_path, [2, 3, 4])
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob("step-00000002*"))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff"])
def test_a_damaged_manifest_gives_way_to_the_one_before(tmp_path, capsys, content):
    save(tmp_path, [1, 2])
    (tmp_path / "step-00000002.json").write_bytes(content)
    assert [loaded.shared for loaded in load(tmp_path)] == [{"step": 1}] * 2
    assert "skipped a damaged checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_other_ranks_read_each_part_once(tmp_path, num_ranks):
    save(tmp_path, [1], num_ranks=3)

    def work(comm):
        loaded = CheckpointFolder(tmp_path, comm).load_latest()
        assert loaded.world_size == 3
        assert (loaded.mine is None) == (num_ranks != 3)
        return [(rank, part["mine"].tolist()) for rank, part in loaded.parts()]

    read = run_local(num_ranks, work)
    everything = sorted(part for parts in read for part in parts)
    assert everything == [(rank, [10.0 + rank] * 3) for rank in range(3)]
    assert max(map(len, read)) == -(-3 // num_ranks)


def test_damage_to_a_departed_ranks_part_makes_others_take_the_one_before(tmp_path):
    save(tmp_path, [1, 2], num_ranks=3)
    flip(tmp_path / "step-00000002.rank-0002-of-0003.pt")
    assert [loaded.shared for loaded in load(tmp_path)] == [{"step": 1}] * 2
    (tmp_path / "step-00000001.rank-0002-of-0003.pt").unlink()
    with pytest.raises(CheckpointError, match="rank-0002-of-0003.pt is not there"):
        load(tmp_path)


def test_parts_on_disks_that_are_not_shared_are_read_where_they_are():
    assert assign([[True, False, False], [False, True, True]]) == [0, 1, 1]
    assert assign([[True] * 4, [True] * 4]) == [0, 1, 0, 1]
    assert assign([[False, False, True], [False, False, True]]) == [0, 1, 0]  # two will be missed


def test_files_of_a_departed_rank_go_with_their_checkpoint(tmp_path):
    save(tmp_path, [1], num_ranks=3)
    save(tmp_path, [2, 3], num_ranks=1, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003.json", "step-00000003.rank-0000-of-0001.pt", "step-00000003.shared.pt",
    ]  # fmt: skip


def test_the_manifest_names_what_is_on_disk(tmp_path):
    save(tmp_path, [7])
    manifest = json.loads((tmp_path / "step-00000007.json").read_text())
    assert (manifest["step"], manifest["world_size"]) == (7, 2)
    for name, part in manifest["parts"].items():
        assert (tmp_path / name).stat().st_size == part["bytes"]


def used(field, path="/proc/self/status"):
    return int(re.search(rf"{field}:\s+(\d+)", Path(path).read_text())[1])


@pytest.fixture
def costs():
    """Return what a call does to the process: MiB read and written in calls of the system, and by
    how many the resident memory was higher than before."""

    def measure(call, *arguments, **settings):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
        before = used("VmRSS"), used("rchar", "/proc/self/io"), used("wchar", "/proc/self/io")
        result = call(*arguments, **settings)
        after = used("VmHWM"), used("rchar", "/proc/self/io"), used("wchar", "/proc/self/io")
        above_KiB, read, written = (b - a for a, b in zip(before, after, strict=True))
        return result, read / 2**20, written / 2**20, above_KiB / 2**10

    return measure


def test_saving_and_reading_pass_over_the_file_once_and_copy_nothing(tmp_path, costs):
    tensors = [torch.full((2**24,), float(i)) for i in range(2)]  # 64 MiB each
    content = {"whole": tensors, "part": tensors[0][5:9], "few": torch.arange(10), "step": 3}
    (checkpoints,) = run_local(1, lambda comm: CheckpointFolder(tmp_path, comm))
    _, read, written, above = costs(checkpoints.save, 1, content, {}, is_best=True)
    assert read < 1
    assert 128 <= written < 130
    assert above < 24

    name = "step-00000001.shared.pt"
    part = json.loads((tmp_path / "step-00000001.json").read_text())["parts"][name]
    assert part["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    again, read, _, above = costs(reading.read_part, tmp_path, name, part)
    assert 128 <= read < 130
    assert above < 128 + 24
    assert all(torch.equal(a, b) for a, b in zip(again["whole"], tensors, strict=True))
    assert torch.equal(again["part"], content["part"]) and again["step"] == 3


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(path, b"old")]


FIXTURE = Path(__file__).parents[2] / "fixtures/run-of-2026-11/checkpoints"


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_checkpoint_of_format_1_is_taken_up(tmp_path, num_ranks):
    folder = shutil.copytree(FIXTURE, tmp_path / "checkpoints")

    def go_on(comm):
        checkpoints = CheckpointFolder(folder, comm)
        loaded = checkpoints.load_latest()
        assert loaded.shared["progress"]["step"] == 15
        ranks = [rank for rank, _ in loaded.parts()]
        checkpoints.save(16, loaded.shared, {}, is_best=False)
        return ranks, checkpoints.load_best()["progress"]["step"]

    answers = run_local(num_ranks, go_on)
    assert sorted(rank for ranks, _ in answers for rank in ranks) == [0, 1]
    assert {best for _, best in answers} == {8}
    assert json.loads((folder / "step-00000016.json").read_text())["format"] == 2


def test_a_run_whose_manifests_are_all_damaged_does_not_start_anew(tmp_path):
    save(tmp_path, [1])
    truncate(tmp_path / "step-00000001.json")
    with pytest.raises(CheckpointError, match="all manifests, step-.*, are damaged"):
        load(tmp_path)


def rewrite(path, **values):
    """Change a manifest as somebody would who knows its hash."""
    content = json.loads(path.read_text()) | values
    content.pop("sha256", None)
    content["sha256"] = manifest._hash(content)
    path.write_text(json.dumps(content))


def test_a_later_format_is_refused_on_all_ranks(tmp_path):
    save(tmp_path, [1, 2])
    rewrite(tmp_path / "step-00000002.json", format=3)
    for call in ("load_latest", "load_best"):
        with pytest.raises(CheckpointError, match=r"later version of Parsimony \(format 3; here 2"):
            run_local(2, lambda comm, call=call: getattr(CheckpointFolder(tmp_path, comm), call)())


@pytest.mark.parametrize("name", ["../other.pt", "/tmp/other.pt", "step-00000001.shared.pt"])
def test_a_manifest_that_names_other_files_is_refused(tmp_path, capsys, name):
    save(tmp_path / "run", [1, 2])
    path = tmp_path / "run/step-00000002.json"
    parts = json.loads(path.read_text())["parts"]
    (tmp_path / "other.pt").write_bytes((tmp_path / "run/step-00000002.shared.pt").read_bytes())
    parts[name] = parts.pop("step-00000002.shared.pt")
    rewrite(path, parts=parts)
    assert load(tmp_path / "run")[0].shared == {"step": 1}
    assert f"it names a part {name!r}; allowed: names of step 2" in capsys.readouterr().out


def test_a_best_that_is_a_path_or_a_link_that_leads_out_is_refused(tmp_path):
    save(tmp_path / "run", [1], best=[1])
    path, part = tmp_path / "run/step-00000001.json", tmp_path / "run/step-00000001.shared.pt"
    part.rename(tmp_path / "other.pt")
    part.symlink_to("../other.pt")
    for call in ("load_latest", "load_best"):
        with pytest.raises(CheckpointError, match="is a link that leads out of the folder"):
            run_local(1, lambda c, call=call: getattr(CheckpointFolder(path.parent, c), call)())
    best = json.loads(path.read_text())["best"]
    rewrite(path, best={"../other.pt": best["step-00000001.shared.pt"]})
    with pytest.raises(CheckpointError, match="no best checkpoint to evaluate"):
        run_local(1, lambda comm: CheckpointFolder(path.parent, comm).load_best())


def test_any_other_value_in_a_manifest_is_noticed(tmp_path, capsys):
    save(tmp_path, [1, 2], best=[1])
    path = tmp_path / "step-00000002.json"
    path.write_text(path.read_text().replace('"best": {', '"best": {}, "worst": {'))
    assert load(tmp_path)[0].shared == {"step": 1}
    assert "its own SHA-256 differs" in capsys.readouterr().out


def test_later_checkpoints_that_could_not_be_read_do_not_crowd_out_new_ones(tmp_path):
    save(tmp_path, [1, 5])
    flip(tmp_path / "step-00000005.shared.pt")
    assert load(tmp_path)[0].shared == {"step": 1}
    save(tmp_path, [2], keep=1)
    assert load(tmp_path)[0].shared == {"step": 2}
    assert not list(tmp_path.glob("step-00000005*"))
