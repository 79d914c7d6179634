"""How much memory a process takes from the system (Linux)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

# With these settings glibc gives freed memory back to the system at once.
RETURNS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def resident(field: str) -> int:
    """Return bytes of this process: "VmRSS", what it takes now, or "VmHWM", the peak of that."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", text)[1])


def forget_peak() -> None:
    """Let VmHWM be the peak from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def spawn_peak(name: str) -> int:
    """Run this script again with `--peak-of name`, in a process that gives freed memory back at
    once; return the bytes that it prints last."""
    words = [sys.executable, *sys.argv, "--peak-of", name]
    done = subprocess.run(words, env=os.environ | RETURNS_FREED, check=True, stdout=subprocess.PIPE)
    return int(done.stdout.split()[-1])
