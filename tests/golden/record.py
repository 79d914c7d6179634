"""Record the golden curves of this kind of machine: `python -m tests.golden.record`.

It writes tests/golden/curves/<kind>/<run>.json. A commit that changes a curve gives the reason.
"""

import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from tests import jobs

HERE = Path(__file__).parent
COMMAND = "python -m tests.golden.record"
NUM_RANKS = (1, 2)
PATIENCE = 240.0  # seconds for a job: the first on a machine compiles the kernels

ARITHMETIC = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE",
              "OMP_NUM_THREADS": "1", "PARSIMONY_KERNELS": "native"}  # fmt: skip
"""Environment that makes the runs independent of the processor. By themselves torch and MKL order
their sums by the vector instructions that they find. Our compiled kernels give the same bits for
any instructions; the reference kernels sum factored means in another order."""

Curves = dict[str, dict[str, Any]]
"""By run, then by "ranks: 1" or "ranks: 2": each rank's losses and digests."""


def kind() -> str:
    """Name what the arithmetic depends on: the processor's architecture, and torch's version."""
    return f"{platform.machine()}-torch-{version('torch')}"


def folder() -> Path:
    """Return where the curves of this kind of machine are, or would be."""
    return HERE / "curves" / kind()


def compute() -> Curves:
    """Run all trainings now: a job of one rank, then one of two."""
    curves: Curves = {}
    for num_ranks in NUM_RANKS:
        with tempfile.TemporaryDirectory() as written:
            program = [str(HERE / "runs.py"), written]
            with mock.patch.dict(os.environ, ARITHMETIC):
                outcome = jobs.run("mpirun", num_ranks, program, Path(written, "log"), PATIENCE)
            if outcome.status:
                raise RuntimeError(f"{num_ranks} ranks failed:\n{outcome.output[-5000:]}")
            ranks = [json.loads(Path(written, f"rank{rank}.json").read_text())
                     for rank in range(num_ranks)]  # fmt: skip
        for name in ranks[0]:
            curves.setdefault(name, {})[f"ranks: {num_ranks}"] = [rank[name] for rank in ranks]
    return curves


def main() -> None:
    folder().mkdir(parents=True, exist_ok=True)
    for name, curve in compute().items():
        path = folder() / f"{name}.json"
        path.write_text(json.dumps(curve, indent=1) + "\n")
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
