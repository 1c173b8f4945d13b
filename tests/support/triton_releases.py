"""Releases of Triton besides the installed one: the ends of the supported range, each in a folder by itself.

`make test-rest` installs them; a folder that stands first on the path of a process is that process's Triton.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support.paths import python_path

FOLDERS = {"installed": None, **{name: Path(sys.prefix) / "tritons" / name for name in ("newest", "oldest")}}


def environment_with(release: str, **changes: str) -> dict[str, str]:
    """The environment of a process with that release, of those in FOLDERS."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    folder = FOLDERS[release]
    if folder is not None:
        if not folder.is_dir():
            pytest.skip("needs the releases of Triton that `make test-rest` installs")
        environment["PYTHONPATH"] = python_path(folder)
    return environment | changes
