"""Where things are, and the path of a process that imports them."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
BENCHMARKS = ROOT / "benchmarks"
EXAMPLES = ROOT / "examples"
RELEASE = ROOT / "release"


def python_path(*folders: Path) -> str:
    """PYTHONPATH with these folders before those that it has already."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
