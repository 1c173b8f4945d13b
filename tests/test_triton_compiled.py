"""The Triton kernels as compiled for GPUs that need not be there: what the interpreter accepts, ptxas may not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_no_spills_and_whole_vectors(name: str, tmp_path: Path) -> None:
    """In a process of its own, since an interpreted kernel cannot be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    program = Path(__file__).with_name("triton_compile.py")
    run = subprocess.run([sys.executable, str(program), name], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["kernel"] for row in compiled} == {"forward", "logits_grad", "scale_rows"}
    assert {row["target"] for row in compiled} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert {row["dtype"] for row in compiled} == {"fp32", "bf16", "fp16", "fp64"}
    for row in compiled:
        assert row["spills"] == 0, row
        writes = row["kernel"] != "forward" or row["flags"][-1]
        assert row["wide_stores"] > 0 or not writes, row
        # A gradient row that lies otherwise than its row of logits has whole vectors to store, not to load.
        assert row["wide_loads"] > 0 or not row["same_window"], row
