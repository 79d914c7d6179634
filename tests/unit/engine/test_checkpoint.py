import hashlib
import json
import re
from pathlib import Path

import numpy
import pytest
import torch

from dgc.comm.local import run_local
from engine import checkpoint
from engine.checkpoint import CheckpointError, CheckpointFolder, write_atomically
from engine.parts import assign


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
    again, read, _, above = costs(checkpoints.read, name, part)
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
    assert path.read_bytes() == b"old"
