"""Tests once more, in a process for which other packages stand before those of the virtual environment.

`make test-rest` installs these into folders of the environment, since they do not fit beside what it has.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.paths import TESTS, python_path


def folder_of(*names: str) -> Path:
    """The folder of these packages; the test skips where it is not installed."""
    folder = Path(sys.prefix).joinpath(*names)
    if not folder.is_dir():
        pytest.skip(f"needs {folder.relative_to(sys.prefix)}, which `make test-rest` installs")
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, and the folder first on its path."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = python_path(folder)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=1500)


def passed(folder: Path, files: Sequence[str]) -> int:
    """How many tests of these files pass with the folder; none may fail."""
    ran = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    found = re.search(r"(\d+) passed", ran.stdout)
    assert found is not None
    return int(found.group(1))
