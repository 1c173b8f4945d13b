"""The check that another package is installed in a version that an integration supports."""

from __future__ import annotations

import importlib
import re
from typing import Any


def require(package: str, oldest: str, below: str, install: str | None = None) -> Any:
    """The module `package`; raises ImportError unless its version is at least `oldest` and below `below`.

    `install` is what pip installs where this package has no extra of that name.
    """
    wanted = f"expected {package} >= {oldest}, < {below}"
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        wanted_by_pip = install or f"'mixce_kernels[{package}]'"
        raise ImportError(f"{wanted}, which is not installed: pip install {wanted_by_pip}") from None
    installed = str(module.__version__)
    if not _release(oldest) <= _release(installed) < _release(below):
        raise ImportError(f"{wanted}, got {installed}")
    return module


def _release(version: str) -> tuple[int, ...]:
    """The numbers at the start of a version, as many as there are: (5, 0) of "5.0rc1"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found.group().split(".")) if found else ()
