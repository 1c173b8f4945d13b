"""The Triton kernels as compiled for GPUs that need not be there: what the interpreter accepts, ptxas may not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.paths import TESTS
from support.triton_releases import environment_with

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# Bytes of shared memory that a block may have.
MOST_SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}


def facts(program: str, name: str, release: str, cache: Path) -> list[dict[str, Any]]:
    """What a program says of the named set, in a process of its own, since an interpreted kernel cannot be compiled."""
    environment = environment_with(release, TRITON_CACHE_DIR=str(cache))
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", f"support.{program}", name]
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


# Compilers differ from release to release: all of both sets for the one in use, a part for the ends of the range.
RELEASES = pytest.mark.parametrize(("release", "name"), [("installed", "all"), ("newest", "some"), ("oldest", "some")])


@RELEASES
def test_no_spills_and_whole_vectors(release: str, name: str, tmp_path: Path) -> None:
    compiled = facts("triton_compile", name, release, tmp_path)
    kernels = {"forward", "logits_grad", "scale_rows", "partial_stats", "merge"}
    assert {row["kernel"] for row in compiled} == kernels
    assert {row["target"] for row in compiled} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert {row["dtype"] for row in compiled} == {"fp32", "bf16", "fp16", "fp64"}
    for row in compiled:
        assert row["spills"] == 0, row
        writes = row["kernel"] in ("logits_grad", "scale_rows") or (
            row["kernel"] == "forward" and "HAS_GRAD" in row["options"]
        )
        assert row["wide_stores"] > 0 or not writes, row
        # A gradient row that lies otherwise than its row of logits has whole vectors to store, not to load.
        assert row["wide_loads"] > 0 or not row["same_window"] or row["kernel"] == "merge", row


@pytest.mark.parametrize("release", ["installed", "newest", "oldest"])
def test_kernels_of_tokens(release: str, tmp_path: Path) -> None:
    """No spills, for each type of sums, with every option and with none."""
    compiled = facts("shards_compile", "all", release, tmp_path)
    assert {row["kernel"] for row in compiled} == {"localize_targets", "write_message", "merge_messages", "reduction"}
    assert {row["target"] for row in compiled} == set(MOST_SHARED)
    assert all(row["spills"] == 0 for row in compiled), compiled


@RELEASES
def test_tiles_of_the_linear_loss(release: str, name: str, tmp_path: Path) -> None:
    """No spills, no more shared memory than there is, and operands that move in whole vectors."""
    compiled = facts("linear_compile", name, release, tmp_path)
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
