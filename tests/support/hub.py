"""The package `kernels`, which loads what Hugging Face's hub has, in a folder where `make test-rest` installs it."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(sys.prefix) / "hub"
