"""Trainers that do not install beside the others: their own interfaces, each in a process of its own.

The folders have the trainer and of what it requires that without which its interface cannot be imported.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
import types

import pytest

from support.installed import folder_of, passed
from support.paths import ROOT, TESTS

TRAINERS = ("axolotl", "ms_swift", "nemo_automodel")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_trainer_passes_its_tests(trainer: str) -> None:
    """None of them is skipped."""
    file = f"integrations/test_{trainer}.py"
    functions = [node for node in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(node, ast.FunctionDef)]
    assert passed(folder_of("trainers", trainer), [file]) >= sum(one.name.startswith("test_") for one in functions)


MODULES = {"axolotl": ("axolotl", "axolotl"), "ms_swift": ("swift", "ms-swift"),
           "nemo_automodel": ("nemo_automodel", "nemo-automodel")}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_missing_trainer_is_answered_with_the_command(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, package = MODULES[trainer]
    monkeypatch.delitem(sys.modules, f"mixce_kernels.integrations.{trainer}", raising=False)
    with pytest.raises(ImportError, match=rf"expected {module} >= .*, which is not installed: pip install {package}$"):
        importlib.import_module(f"mixce_kernels.integrations.{trainer}")


@pytest.mark.parametrize("version", ["0.0.1", "99.0", "unknown"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_unsupported_version_is_answered_with_a_sentence(
    trainer: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType(MODULES[trainer][0])
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, f"mixce_kernels.integrations.{trainer}", raising=False)
    with pytest.raises(ImportError, match=rf"expected {module.__name__} >= [\d.]+, < \d+, got {re.escape(version)}"):
        importlib.import_module(f"mixce_kernels.integrations.{trainer}")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_documented_ranges_are_those_of_the_integration(trainer: str) -> None:
    source = (ROOT / "mixce_kernels" / "integrations" / f"{trainer}.py").read_text()
    (bounds,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
    )
    page = (ROOT / "docs" / "integrations.md").read_text()
    name = {"axolotl": "Axolotl", "ms_swift": "ms-swift", "nemo_automodel": "NeMo Automodel"}[trainer]
    assert f"{name} {bounds[0]} and newer, below {bounds[1]}" in " ".join(page.split())
