"""What the compiler makes of the CUDA kernels for an H100: registers, spills, occupancy, widths.

    python benchmarks/kernel_report.py --json benchmarks/results/kernels.json \\
        --markdown benchmarks/results/kernels.md

Needs nvcc, but no GPU. Registers, spilled bytes, stack and shared memory are ptxas's; widths and
atomics are counted in the machine code where nvdisasm is found (--nvdisasm FILE; it is in the wheel
nvidia-cuda-nvdisasm). Occupancy is computed from them, for thread blocks of 256. `TRAFFIC` says by
hand what hot kernels must move for an element. The share of a copy's bandwidth is what Little's law
lets one expect, not a measurement: see `expected_share`. tests/unit compares registers and spills
with the table in benchmarks/results.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from parsimony_kernels.runtime.launch import OPTIONS, THREADS, source

ARCHITECTURE = "sm_90"
# Of a multiprocessor of sm_90.
REGISTERS, MOST_THREADS, MOST_BLOCKS, SHARED_BYTES = 65_536, 2048, 32, 233_472
REGISTERS_BY, SHARED_BY_SYSTEM = 8, 1024  # registers of a thread come in eights
BANDWIDTH, LATENCY = 3.35e12 / 132, 700e-9  # of an H100 SXM's memory, for each of them; seconds
BEST = 0.92  # of a copy's bandwidth: turns of unequal length, atomics, the last wave


class Traffic(NamedTuple):
    """Bytes that a kernel must read and write for an element, and how many a thread has at once."""

    read: float
    written: float
    elements: int


_BYTES = {"float32": 4, "f32": 4, "bfloat16": 2, "bf16": 2, "f16": 2, "blocks": 1 + 4 / 256}


def _traffic() -> dict[str, Traffic]:
    found = {}
    for grad in ("float32", "bfloat16"):
        g = _BYTES[grad]
        for kept in ("float32", "bfloat16", "blocks"):
            k = _BYTES[kept]
            name = f"accumulate_select_{grad}_{kept}"
            found[name] = Traffic(g + k, k, 8)
            found[f"{name}_velocity"] = Traffic(g + 2 * k, 2 * k, 8)
        found[f"accumulate_lagging_{grad}"] = Traffic(g + 8, 8, 8)
    for parameter in ("f32", "bf16", "f16"):
        p = _BYTES[parameter]
        for first, m in (("", 0), ("first_", 4)):
            found[f"step_flat_{first}{parameter}"] = Traffic(2 * p + m + 4, p + m + 4, 4)
            found[f"step_cover_{first}{parameter}"] = Traffic(2 * p + m, p + m, 4)
            found[f"step_factored_{first}{parameter}"] = Traffic(2 * p + m, p + m, 4)
        found[f"factored_sums_{parameter}"] = Traffic(p, 0, 4)
        found[f"observe_flat_{parameter}"] = Traffic(p + 4, 4, 4)
    return found


TRAFFIC = _traffic()


def main() -> None:
    options = parse()
    rows = report(options.nvdisasm)
    tables.print_table(rows, COLUMNS)
    tables.write_json(rows, options.json)
    if options.markdown:
        options.markdown.write_text(markdown(rows))


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__)
    parser.add_argument("--markdown", type=tables.path, help="write the table here")
    parser.add_argument("--nvdisasm", type=tables.path, default=shutil.which("nvdisasm"))
    return parser.parse_args()


# ---- compiling -----------------------------------------------------------------------------------


def compiler_version() -> str | None:
    """Return nvcc's version, such as 13.0, or None where there is none."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\S+),", text)[1]


def report(nvdisasm: Path | None = None) -> list[dict[str, Any]]:
    """Compile all kernels as NVRTC is told to, and return a row for each, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path, code = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
        path.write_text(source())
        words = ["nvcc", f"-arch={ARCHITECTURE}", "-cubin", "-Xptxas", "-v", *OPTIONS]
        command = [*words, "-o", str(code), str(path)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        resources = resources_in(log)
        widths = accesses_in(disassembled(nvdisasm, code)) if nvdisasm else {}
    return [_row(name, resources[name], widths.get(name)) for name in sorted(resources)]


def disassembled(nvdisasm: Path, code: Path) -> str:
    command = [str(nvdisasm), "-c", str(code)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources_in(log: str) -> dict[str, dict[str, int]]:
    """Read what `ptxas -v` says of each kernel."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        figures = {
            "stack_bytes": r"(\d+) bytes stack frame",
            "spill_store_bytes": r"(\d+) bytes spill stores",
            "spill_load_bytes": r"(\d+) bytes spill loads",
            "registers": r"Used (\d+) registers",
            "shared_bytes": r"(\d+) bytes smem",
        }
        matches = {name: re.search(pattern, part) for name, pattern in figures.items()}
        found[part.split("'")[0]] = {n: int(m[1]) if m else 0 for n, m in matches.items()}
    return found


# LD and ST: the compiler does not know that a pointer which was itself read is to global memory.
_ACCESS = re.compile(r"\b(LDG?|STG?|ATOMG?|REDG?|ATOMS)\b(\.[.\w]*)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def accesses_in(code: str) -> dict[str, dict[str, Any]]:
    """Count the loads and stores of global memory by bytes a lane, and the atomics."""
    found: dict[str, dict[str, Any]] = {}
    for line in code.splitlines():
        if start := re.match(r"\.text\.(\w+):", line):
            found[start[1]] = {"loads": Counter(), "stores": Counter(), "atomics": Counter()}
        access = _ACCESS.search(line)
        if not access or not found:
            continue
        kernel, kind = found[list(found)[-1]], access[1]
        parts = access[2].split(".")
        width = next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4)
        if kind[:2] in ("LD", "ST"):
            kernel["loads" if kind[:2] == "LD" else "stores"][width] += 1
        else:
            kernel["atomics"]["shared" if kind == "ATOMS" else "global"] += 1
    return found


# ---- what follows --------------------------------------------------------------------------------


def occupancy(registers: int, shared_bytes: int) -> float:
    """Return the share of a multiprocessor's threads that blocks of THREADS can fill."""
    of_thread = -(-registers // REGISTERS_BY) * REGISTERS_BY
    blocks = min(
        REGISTERS // (of_thread * THREADS),
        SHARED_BYTES // (shared_bytes + SHARED_BY_SYSTEM),
        MOST_THREADS // THREADS,
        MOST_BLOCKS,
    )
    return blocks * THREADS / MOST_THREADS


def expected_share(traffic: Traffic, occupancy: float) -> float:
    """Return the share of a copy's bandwidth to expect: what is under way, of what must be.

    Little's law: a multiprocessor keeps its share of the memory busy with BANDWIDTH * LATENCY bytes
    under way. A thread has the reads of its elements under way together.
    """
    under_way = occupancy * MOST_THREADS * traffic.elements * traffic.read
    return BEST * min(1.0, under_way / (BANDWIDTH * LATENCY))


def _row(name: str, resources: dict[str, int], accesses: dict[str, Any] | None) -> dict[str, Any]:
    filled = occupancy(resources["registers"], resources["shared_bytes"])
    row: dict[str, Any] = {"kernel": name, **resources, "occupancy": filled}
    if accesses is not None:
        row["loads"] = {str(width): n for width, n in sorted(accesses["loads"].items())}
        row["stores"] = {str(width): n for width, n in sorted(accesses["stores"].items())}
        row["atomics"] = dict(accesses["atomics"])
    if name in TRAFFIC:
        traffic = TRAFFIC[name]
        row["read_bytes_an_element"], row["written_bytes_an_element"] = traffic[:2]
        row["expected_share_of_copy_bandwidth"] = expected_share(traffic, filled)
    return row | {"architecture": ARCHITECTURE, "nvcc": compiler_version()}


def worse(found: dict[str, Any], recorded: dict[str, Any], slack: int) -> list[str]:
    """Return what a kernel has more of than is recorded: any spills, or registers beyond slack."""
    limits = {
        "registers": recorded["registers"] + slack,
        **{kind: recorded[kind] for kind in ("spill_store_bytes", "spill_load_bytes")},
    }
    return [f"{found['kernel']}: {kind} {found[kind]}, at most {limit}"
            for kind, limit in limits.items() if found[kind] > limit]  # fmt: skip


# ---- the table -----------------------------------------------------------------------------------


def _widest(row: dict[str, Any], kind: str) -> str:
    return max(row.get(kind) or "-", key=lambda width: -1 if width == "-" else int(width))


def _bytes(row: dict[str, Any]) -> str:
    if "read_bytes_an_element" not in row:
        return "-"
    return f"{row['read_bytes_an_element']:.3g} + {row['written_bytes_an_element']:.3g}"


COLUMNS: tables.Columns = {
    "kernel": lambda row: f"`{row['kernel']}`",
    "registers": lambda row: str(row["registers"]),
    "spilled, stored / loaded": lambda row: (
        f"{row['spill_store_bytes']} / {row['spill_load_bytes']}"
    ),
    "stack": lambda row: str(row["stack_bytes"]),
    "shared": lambda row: str(row["shared_bytes"]),
    "occupancy": lambda row: f"{row['occupancy']:.0%}",
    "widest load": lambda row: _widest(row, "loads"),
    "widest store": lambda row: _widest(row, "stores"),
    "atomics, global / shared": lambda row: "{} / {}".format(
        *(row.get("atomics", {}).get(k, 0) for k in ("global", "shared"))
    ),
    "bytes an element": _bytes,
    "share of copy expected": lambda row: (
        f"{row['expected_share_of_copy_bandwidth']:.0%}"
        if "expected_share_of_copy_bandwidth" in row
        else "-"
    ),
}


PREFACE = f"""# The CUDA kernels as compiled for an H100

`python benchmarks/kernel_report.py --json benchmarks/results/kernels.json --markdown
benchmarks/results/kernels.md`: nvcc {{nvcc}}, {ARCHITECTURE}, the options that NVRTC is given. A
test compares registers and spills with this table. No GPU was used. Bytes an element are what a
kernel's code reads + writes (by hand; for step_flat with a second moment). Widths are bytes a lane
in the machine code; narrower accesses are there too, for tensors off boundaries of 16 bytes and
for what is left over. The share of a copy's bandwidth is what Little's law lets one expect if
nothing but memory limits (reads under way, of {BANDWIDTH * LATENCY / 1024:.0f} KiB a
multiprocessor; at most {BEST:.0%}); it is not measured.

"""


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [PREFACE.format(nvcc=rows[0]["nvcc"]), f"| {' | '.join(COLUMNS)} |"]
    lines.append("| --- " * len(COLUMNS) + "|")
    lines += [f"| {' | '.join(text(row) for text in COLUMNS.values())} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
