"""The integrations' tests once more, with the oldest releases they take: the other end of the supported range.

`make test-rest` installs these into a folder of its virtual environment, which stands before everything else there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import TESTS

OLDEST = Path(sys.prefix) / "oldest"
# Of PEFT, too, whose oldest release stands beside TRL's.
HEADS = ("transformers_heads", "transformers_refused_heads")
FILES = {
    "transformers": ("transformers", "transformers_linear", "transformers_trainer", *HEADS),
    "trl": ("trl", "trl_models", "trl_errors", *HEADS),
}
# Of their tests pass there; the others are of what is newer.
AT_LEAST = {"transformers": 185, "trl": 90}

pytestmark = pytest.mark.slow


def folder_of(package: str) -> Path:
    if not (OLDEST / package).is_dir():
        pytest.skip("needs the older releases that `make test-rest` installs")
    return OLDEST / package


def run(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(folder_of(package))
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize("package", FILES)
def test_oldest_release_passes_the_tests(package: str) -> None:
    files = [f"integrations/test_{name}.py" for name in FILES[package]]
    ran = run(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    found = re.search(r"(\d+) passed", ran.stdout)
    assert found is not None
    assert int(found.group(1)) >= AT_LEAST[package]


@pytest.mark.parametrize("package", FILES)
def test_it_is_the_oldest_that_is_taken(package: str) -> None:
    """The release in the folder is the first one of the range that the integration states."""
    code = f"""
import {package}
from mixce_kernels.integrations import {package} as integration
print({package}.__version__, integration.OLDEST_{package.upper()})
"""
    installed, oldest = run(package, "-c", code).stdout.split()
    assert installed.removesuffix(".0") == oldest.removesuffix(".0")
