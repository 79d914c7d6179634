import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "mutants.py"


def test_each_mutants_text_is_in_the_source_once():
    """Whether the tests catch them takes half an hour, and is asked by hand."""
    listed = subprocess.run([sys.executable, SCRIPT, "--list"], capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr[-2000:]
