"""The report: its numbers add up, and it is where it should be."""

import dataclasses
import json
from itertools import groupby

import pytest

from memory import RECOMMENDED, Measured, contenders, report
from memory.job import factored_adam, this_run
from memory.predict import Predictor
from memory.report import batch_table, run_table
from tests.unit.memory.small_jobs import job_of


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("report"), []
    job = job_of("perceptron")
    rivals = [each for each in contenders(job) if each.name in ("Adafactor", "recommended")]
    peak = Predictor(job)(this_run(job)).peak_bytes
    measured = Measured(2 * peak, {"parameters": 1204264, "optimizer": 2 * 2408552}, 3, "by hand")
    result = report(
        job, memory_bytes=2**24, folder=folder, say=lines.append, measured=measured, rivals=rivals
    )
    return result, folder, "\n".join(lines)


def test_totals_are_the_sums_of_the_kinds(reported):
    for row in reported[0]["predicted"]:
        assert row["kept_bytes"] == sum(row["kept"].values())
        assert row["peak_bytes"] == sum(row["peak"].values())
        assert row["peak_bytes"] == max(row["peaks"].values())


def test_the_file_holds_what_was_returned_and_a_picture_is_beside_it(reported):
    result, folder, _ = reported
    assert json.loads((folder / "memory.json").read_text()) == json.loads(json.dumps(result))
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_each_contender_has_a_largest_batch(reported):
    largest = reported[0]["largest_batch"]
    assert list(largest) == ["this run", "Adafactor", "recommended"]
    assert largest["recommended"] > largest["this run"] > 16


def test_errors_are_told_against_what_was_measured(reported):
    result, _, text = reported
    assert result["peak_error"] == pytest.approx(-0.5)
    assert "at the peak (-50.0%)" in text
    state = next(line for line in text.splitlines() if line.startswith("| all optimizer state"))
    assert state.endswith("| 4,817,104 | -50.0% |")
    parameters = next(line for line in text.splitlines() if line.startswith("| parameters"))
    assert parameters.endswith("| 1,204,264 | +0.0% |")


def test_every_row_of_a_table_has_as_many_cells_as_its_heading(reported):
    lines = reported[2].splitlines()
    blocks = groupby(lines, lambda line: line.startswith("|"))
    tables = [[line.count("|") for line in block] for is_table, block in blocks if is_table]
    assert len(tables) == 4
    assert all(len(table) > 2 and len(set(table)) == 1 for table in tables), tables
    assert "| total |" in reported[2]


def test_without_measurements_and_without_room(reported):
    job = job_of("perceptron")
    assert "%" not in run_table(Predictor(job)(this_run(job)), None)
    assert "| none |" in batch_table({"this run": None}, 2**20)


def test_the_peak_in_the_warm_up_of_the_density_is_told():
    compression = dataclasses.replace(RECOMMENDED, density_warmup_epochs=2)
    job = job_of("perceptron", compression=compression, optimizer=factored_adam)
    lines = []
    result = report(job, say=lines.append, rivals=[])
    assert result["peak_in_warm_up"] > 1.2 * result["predicted"][0]["peak_bytes"]
    assert any("of density 0.1, " in line for line in lines)
