"""launch/gpu_proof.sh, rehearsed where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import jobs

ROOT = Path(__file__).parents[2]


@pytest.mark.integration
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_stage_of_the_proof_rehearses(tmp_path):
    words = [ROOT / "launch/gpu_proof.sh", tmp_path, "--rehearse"]
    environment = {**os.environ, "PARSIMONY_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    table = (tmp_path / "table.md").read_text()
    stages = [line for line in table.splitlines() if line.count("|") == 5 and "---" not in line]
    ended = {line.split(" | ")[0].strip("| "): line.split(" | ")[2] for line in stages[1:]}
    without_horovod = {} if jobs.HAS_HOROVOD else {"4h": "skipped: Horovod is not installed"}
    assert ended == dict.fromkeys(["1", "2", "3", "4t", "4h", "5"], "passed") | without_horovod
    figures = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in figures} == ended.keys() - without_horovod.keys()
    assert all(row["goal"][1] for row in figures if row["stage"] in ("4t", "4h"))
    sketched = next(row for row in figures if row["what"] == "CMS, beta1 = 0, 1000 of 64")
    assert 1 <= sketched["launches"] <= 12  # under the emulator, of all 20 tensors
    assert (tmp_path / "timeline.json.gz").stat().st_size < 10 * 2**20
    assert len(list(tmp_path.iterdir())) <= 8
