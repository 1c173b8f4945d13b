"""Machine code of the loops over a row's logits, against benchmarks/results/hot_loops.csv: none may have grown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_kernels.counts import BACKENDS, TARGETS
from gpu_kernels.hot_loops import WHOLE_ROW, HotLoop, cuda_hot_loops, find_cuobjdump, grown, read_hot_loops_csv
from mixce_kernels.backends import native
from support.paths import BENCHMARKS, TESTS, python_path
from support.triton_releases import environment_with

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

AGAIN = "; after a change that is worth it, run benchmarks/count_kernels.py and commit its results"


def recorded(backend: str) -> list[HotLoop]:
    """The committed loops of a backend."""
    return [loop for loop in read_hot_loops_csv(BENCHMARKS / "results" / "hot_loops.csv") if loop.backend == backend]


def test_the_record_has_every_step_type_and_architecture() -> None:
    cuda, triton = (recorded(backend) for backend in BACKENDS)
    plain = {"cuda": "", "triton": "V = 50257"}
    for loops, backend in ((cuda, "cuda"), (triton, "triton")):
        names = {(one.kernel, one.part, one.target, one.dtype) for one in loops if one.variant == plain[backend]}
        for target in TARGETS:
            for dtype in ("bfloat16", "float32"):
                assert ("forward_kernel", "statistics", target, dtype) in names
                assert ("logits_grad_kernel", "gradient", target, dtype) in names
        # An exponential a logit and pass, two or three with the softcap's tanh, and few more.
        for one in loops:
            least, most = (
                (2.0, 2.5) if one.part == WHOLE_ROW else (2.0, 3.1) if "softcap" in one.variant else (1.0, 1.1)
            )
            assert least <= one.kinds["special"] / one.logits <= most, one


@pytest.mark.skipif(not native.HAS_CUDA, reason="the extension was built without CUDA")
def test_no_cuda_loop_has_grown() -> None:
    sentences = grown(recorded("cuda"), cuda_hot_loops(find_cuobjdump(), Path(native._C.__file__)))
    assert not sentences, "\n".join(sentences) + AGAIN


def test_no_triton_loop_has_grown(tmp_path: Path) -> None:
    environment = environment_with("installed", TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=python_path(BENCHMARKS))
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "support.triton_hot_loops"]
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    compiled = [HotLoop(**loop) for line in run.stdout.splitlines() for loop in json.loads(line)["loops"]]
    sentences = grown(recorded("triton"), compiled)
    assert not sentences, "\n".join(sentences) + AGAIN
