"""What the ranks of a job must have been given alike: refuse a job in which they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs import load
from dgc.comm import Comm
from engine import report


def check_job(comm: Comm, flat_config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse ranks with different settings, command-line options or versions. A collective."""
    options = {f"--{option}": value for option, value in options.items()}
    versions = {f"version of {name}": value for name, value in report.versions().items()}
    refuse_differences(comm, {**flat_config, **options, **versions})


def refuse_differences(comm: Comm, mine: Mapping[str, Any]) -> None:
    """Stop the job, on every rank, if this mapping differs between ranks. A collective."""
    everyone = comm.all_gather_object(mine)
    for rank, theirs in enumerate(everyone):
        different = load.differences(everyone[0], theirs)
        if different:
            raise SystemExit(f"rank 0 and rank {rank} differ:\n  " + "\n  ".join(different))
