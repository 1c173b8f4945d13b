"""Copies of the sources, since builds leave files behind."""

from __future__ import annotations

import shutil
from pathlib import Path

from support.paths import ROOT

FOLDERS = ("csrc", "docs", "mixce_kernels", "tests", "benchmarks", "examples", "release")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", ".clang-format")


def copy_sources(tree: Path) -> Path:
    """Makes `tree` a copy of what a clone has."""
    ignore = shutil.ignore_patterns("*.so", "*.pyc", "__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for file in FILES:
        shutil.copy(ROOT / file, tree)
    return tree
