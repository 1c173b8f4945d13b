"""The compiled kernels themselves, executed: with the folder `ptx_on_cpu` at hand no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("PTX_ON_CPU") or HERE.parents[1] / "shared" / "ptx_on_cpu")
needs_ptx_on_cpu = pytest.mark.skipif(
    not (FOLDER / "ptx_on_cpu").is_dir(), reason=f"no ptx_on_cpu in {FOLDER} (PTX_ON_CPU names it)"
)


@needs_ptx_on_cpu
@pytest.mark.slow
def test_compiled_kernels_on_cpu_tensors() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"MIXCE_CPU_TENSORS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "triton_on_ptx.py"), str(FOLDER)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    assert run.stdout.startswith("ran "), run.stdout
