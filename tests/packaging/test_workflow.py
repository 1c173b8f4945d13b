"""The workflow for GitHub does nothing that the Makefile does not do."""

from __future__ import annotations

import re

import pytest

from support.paths import ROOT


def test_workflow_calls_the_makefile_alone() -> None:
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if not workflow.exists():
        pytest.skip("this copy of the sources has no workflow")
    commands = re.findall(r"run: (.+)", workflow.read_text())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"lint", "test", "test-rest", "wheels"} <= targets
    for command in commands:
        make, target, *variables = command.split()
        assert make == "make"
        assert target in targets
        assert all("=" in variable for variable in variables)
    assert {command.split()[1] for command in commands} == {"lint", "test", "test-rest", "wheels"}
