"""The integrations' tests once more, with the oldest releases they take: the other end of the supported range."""

from __future__ import annotations

import pytest

from support.installed import folder_of, passed, run

# Of PEFT, too, whose oldest release stands beside TRL's.
HEADS = ("transformers_heads", "transformers_refused_heads")
FILES = {
    "transformers": ("transformers", "transformers_linear", "transformers_trainer", *HEADS),
    "trl": ("trl", "trl_models", "trl_errors", *HEADS),
}
# Of their tests pass there; the others are of what is newer.
AT_LEAST = {"transformers": 185, "trl": 90}


@pytest.mark.parametrize("package", FILES)
def test_oldest_release_passes_the_tests(package: str) -> None:
    files = [f"integrations/test_{name}.py" for name in FILES[package]]
    assert passed(folder_of("oldest", package), files) >= AT_LEAST[package]


@pytest.mark.parametrize("package", FILES)
def test_it_is_the_oldest_that_is_taken(package: str) -> None:
    """The release in the folder is the first one of the range that the integration states."""
    code = f"""
import {package}
from mixce_kernels.integrations import {package} as integration
print({package}.__version__, integration.OLDEST_{package.upper()})
"""
    installed, oldest = run(folder_of("oldest", package), "-c", code).stdout.split()
    assert installed.removesuffix(".0") == oldest.removesuffix(".0")
