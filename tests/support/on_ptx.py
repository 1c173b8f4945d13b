"""Programs of this package that execute the compiled PTX of kernels on CPU tensors, with the folder `ptx_on_cpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import BENCHMARKS, ROOT, TESTS, python_path

FOLDER = Path(os.environ.get("PTX_ON_CPU") or ROOT.parent / "shared" / "ptx_on_cpu")
needs_ptx_on_cpu = pytest.mark.skipif(
    not (FOLDER / "ptx_on_cpu").is_dir(), reason=f"no ptx_on_cpu in {FOLDER} (PTX_ON_CPU names it)"
)


def run_on_ptx(module: str, *folders: Path) -> str:
    """Runs the module as a program, with these folders before all others on its path, and returns what it prints."""
    foreign = ("TRITON_INTERPRET", "MIXCE_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    paths = python_path(*folders, FOLDER, BENCHMARKS)
    environment |= {"MIXCE_CPU_TENSORS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-m", module], cwd=TESTS, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    return run.stdout
