"""The Triton kernels as compiled for GPUs that need not be there: what the interpreter accepts, ptxas may not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


# Bytes of shared memory that a block may have.
MOST_SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}


def facts(program: str, name: str, cache: Path) -> list[dict[str, Any]]:
    """What a program says of the named set, in a process of its own, since an interpreted kernel cannot be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(Path(__file__).with_name(program)), name]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of compiled kernels: all of a set's larger one are in it when the smaller one's turn comes."""
    return tmp_path_factory.mktemp("triton")


@pytest.mark.parametrize("name", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_no_spills_and_whole_vectors(name: str, cache: Path) -> None:
    compiled = facts("triton_compile.py", name, cache)
    assert {row["kernel"] for row in compiled} == {"forward", "logits_grad", "scale_rows"}
    assert {row["target"] for row in compiled} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert {row["dtype"] for row in compiled} == {"fp32", "bf16", "fp16", "fp64"}
    for row in compiled:
        assert row["spills"] == 0, row
        writes = row["kernel"] != "forward" or row["flags"][-1]
        assert row["wide_stores"] > 0 or not writes, row
        # A gradient row that lies otherwise than its row of logits has whole vectors to store, not to load.
        assert row["wide_loads"] > 0 or not row["same_window"], row


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "some"])
def test_tiles_of_the_linear_loss(name: str, cache: Path) -> None:
    """No spills, no more shared memory than there is, and operands that move in whole vectors."""
    compiled = facts("linear_compile.py", name, cache)
    kernels = {"linear_forward", "linear_merge", "linear_grad_logits", "linear_grad_hidden", "linear_grad_weight"}
    assert {row["kernel"] for row in compiled} == kernels
    assert {row["target"] for row in compiled} == set(MOST_SHARED)
    assert {row["dtype"] for row in compiled} == {"fp32", "bf16", "fp16", "fp64"}
    for row in compiled:
        assert row["spills"] == 0, row
        assert row["shared"] <= MOST_SHARED[row["target"]], row
        if row["kernel"] != "linear_merge" and row["aligned"]:
            assert 16 in row["copies"] or row["wide_loads"] > 0, row
            if row["dtype"] in ("bf16", "fp16") and row["target"] != "gfx942" and row["n_rows"] > 16:
                # Pipelined: cp.async of whole vectors.
                assert row["copies"] == [16], row
        if row["kernel"].startswith("linear_grad") and row["aligned"] and row["target"] != "gfx942":
            assert row["wide_stores"] > 0, row
