"""Whether the tests find faults: each mutant is one, put into a copy of the source.

    python tests/mutants.py                    all of tests/mutants.toml
    python tests/mutants.py merge-order ...    some of them
    python tests/mutants.py --list             what there is, and where it goes in; no test runs
    python tests/mutants.py -j 2               two at a time
    python tests/mutants.py --unchecked        without the check that the tests pass without a fault
    python tests/mutants.py --all-tests        launch/test.sh, instead of the tests that are named

Prints a line for each mutant: the first test that fails, or NOT CAUGHT. Before that, each test file
must pass on a copy without a fault. Neither the checkout nor the cache of compiled kernels changes.
Exit status: 0 if all are caught; 1 if some are not; 2 if a mutant's text is not in the source once.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_SOURCE = ("tests", "benchmarks", "examples", "docs")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".sh")
LONGEST = 1800  # seconds for the tests of one mutant
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
NOT_COMPILED = "Install g++ or clang++"  # parsimony_kernels/runtime/build.py says so
ALL_TESTS = ["launch/test.sh"]


class MutantError(Exception):
    """A mutant that cannot be tried: the list is to be corrected."""


@dataclass(frozen=True)
class Mutant:
    """See tests/mutants.toml."""

    name: str
    old: str
    new: str
    tests: str


@dataclass(frozen=True)
class Outcome:
    """caught_by: the first test that failed; None if all passed."""

    caught_by: str | None
    seconds: float


def tracked_files() -> list[str]:
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in found.split("\0") if name and (ROOT / name).is_file()]


def place_of(mutant: Mutant, files: Sequence[str]) -> tuple[str, str]:
    """Return the one source file that has the mutant's text, and its text with the fault in it."""
    pattern = re.compile(r"\s+".join(map(re.escape, mutant.old.split())))
    found = []
    for name in files:
        if name.endswith(SUFFIXES) and not name.startswith(NOT_SOURCE):
            text = (ROOT / name).read_text()
            found += [(name, text, match) for match in pattern.finditer(text)]
    if len(found) != 1:
        where = ", ".join(name for name, _, _ in found) or "no file"
        raise MutantError(f"{mutant.name}: its text is in {where}; it must be in one place")
    ((name, text, match),) = found
    return name, text[: match.start()] + mutant.new + text[match.end() :]


def command_of(asked: str, files: Sequence[str]) -> list[str]:
    """Return pytest's arguments for "test_a.py folder/test_b.py -k words"."""
    words = shlex.split(asked)
    names = words[: words.index("-k")] if "-k" in words else words
    paths = []
    for name in names:
        found = [f for f in files if f.startswith("tests/") and f"/{f}".endswith(f"/{name}")]
        if not found:
            raise MutantError(f"{name} is nowhere under tests/")
        paths += found
    return [*paths, *words[len(names) :]]


def one_by_one(command: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a command's files each in a command of its own: many mutants ask the same file."""
    num_files = command.index("-k") if "-k" in command else len(command)
    return [(file, *command[num_files:]) for file in command[:num_files]]


@contextmanager
def copied(files: Sequence[str]) -> Iterator[Path]:
    """Copy the files as they are in the working tree to a folder that is then removed."""
    with tempfile.TemporaryDirectory(prefix="mutant.", ignore_cleanup_errors=True) as name:
        folder = Path(name) / "parsimony"
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
        (folder / ".venv").symlink_to((ROOT / ".venv").resolve())
        yield folder


@contextmanager
def kernels_cache() -> Iterator[Path]:
    """Make a cache of compiled kernels that begins as the user's and may be filled with others."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with tempfile.TemporaryDirectory(prefix="mutants-cache.", ignore_cleanup_errors=True) as name:
        if (home / "parsimony").is_dir():
            shutil.copytree(home / "parsimony", Path(name) / "parsimony")
        yield Path(name)


def run_tests(folder: Path, cache: Path, arguments: Sequence[str]) -> Outcome:
    """Run tests in a copy until one fails.

    Raises: MutantError if the tests cannot be run, or the fault is one that a compiler finds.
    """
    options = ["-x", "-q", "-p", "no:cacheprovider", "--timeout=240"]
    is_script = list(arguments) == ALL_TESTS
    words = [*arguments, *options] if is_script else [sys.executable, "-m", "pytest", *options]
    words += [] if is_script else arguments
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    start = time.monotonic()
    process = subprocess.Popen(
        words, cwd=folder, env=environment, start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome(f"not over after {LONGEST} s", time.monotonic() - start)
    seconds, failed = time.monotonic() - start, FAILED.findall(output)
    if process.returncode == 0:
        return Outcome(None, seconds)
    if process.returncode != 1 or NOT_COMPILED in output:
        raise MutantError(f"{shlex.join(arguments)} cannot be run:\n{output[-3000:]}")
    return Outcome(failed[0] if failed else f"a hang: ... {output[-300:]}", seconds)


def check_unmutated(cache: Path, folder: Path, arguments: Sequence[str]) -> None:
    """Raise MutantError if tests do not pass on a copy without a fault."""
    outcome = run_tests(folder, cache, arguments)
    print(f"{'without a fault':28} {outcome.seconds:6.0f} s  {shlex.join(arguments)}", flush=True)
    if outcome.caught_by is not None:
        raise MutantError(f"without a fault {outcome.caught_by} fails")


def try_mutant(
    mutant: Mutant, cache: Path, files: Sequence[str], arguments: Sequence[str]
) -> str | None:
    """Run tests on a copy with the fault, print what came of it, and return who caught it."""
    name, text = place_of(mutant, files)
    with copied(files) as folder:
        (folder / name).write_text(text)
        try:
            outcome = run_tests(folder, cache, arguments)
        except MutantError as error:
            print(f"{mutant.name:28} CANNOT BE TRIED: {error}", flush=True)
            return None
    caught_by = outcome.caught_by or "NOT CAUGHT"
    print(f"{mutant.name:28} {outcome.seconds:6.0f} s  {caught_by}", flush=True)
    return outcome.caught_by


def chosen(names: Sequence[str]) -> list[Mutant]:
    """Return the mutants of these names; all, if there are no names."""
    listed = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    known = {name: Mutant(name, **parts) for name, parts in listed.items()}
    if unknown := sorted(set(names) - known.keys()):
        raise MutantError(f"there is no mutant {', '.join(unknown)}; see --list")
    return [known[name] for name in names or known]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants; none: all")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="mutants tried side by side")
    parser.add_argument("--list", action="store_true", help="list the mutants; run nothing")
    parser.add_argument("--unchecked", action="store_true", help="trust that the tests pass")
    parser.add_argument("--all-tests", action="store_true", help="run launch/test.sh for each")
    options = parser.parse_args()
    mutants, files = chosen(options.names), tracked_files()
    places = [place_of(mutant, files)[0] for mutant in mutants]
    commands = [ALL_TESTS if options.all_tests else command_of(m.tests, files) for m in mutants]
    if options.list:
        for mutant, place in zip(mutants, places, strict=True):
            print(f"{mutant.name:28} {place:40} {mutant.tests}")
        return 0
    with kernels_cache() as cache, ThreadPoolExecutor(options.jobs) as pool:
        checks = dict.fromkeys(part for command in commands for part in one_by_one(command))
        with copied(files) as folder:
            checks = () if options.unchecked else checks
            list(pool.map(lambda part: check_unmutated(cache, folder, part), checks))
        tries = [
            pool.submit(try_mutant, mutant, cache, files, command)
            for mutant, command in zip(mutants, commands, strict=True)
        ]
        caught = [attempt.result() is not None for attempt in tries]
    print(f"caught: {sum(caught)} of {len(caught)}")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MutantError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
