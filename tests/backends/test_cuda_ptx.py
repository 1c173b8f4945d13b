"""The CUDA kernels as nvcc compiles them, executed: with nvcc and the folder `ptx_on_cpu` at hand no GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixce_kernels.backends import native
from support.on_ptx import needs_ptx_on_cpu, run_on_ptx
from support.paths import ROOT

pytest.importorskip("pybind11")


@needs_ptx_on_cpu
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_every_kernel_in_three_orders(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MIXCE_")}
    knobs = {"MIXCE_BUILD_CUDA": "1", "MIXCE_CUDA_ARCHS": "90+PTX", "MIXCE_CUDART": "shared"}
    package = tmp_path / "lib"
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path, "--build-lib", package]
    subprocess.run(build, cwd=ROOT, env=environment | knobs, check=True, capture_output=True)

    assert run_on_ptx("support.cuda_on_ptx", package).endswith("ran 91 kernels\n")


@pytest.mark.skipif(not native.HAS_CUDA, reason="the extension was built without CUDA")
def test_no_kernel_spills_on_any_architecture() -> None:
    """Neither registers nor arrays go to local memory, in any machine code of the installed extension."""
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [cuobjdump, "--dump-resource-usage", native._C.__file__]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The CUDA runtime inside has kernels of its own.
    kernels = re.findall(r"Function (_ZN5mixce\w+):\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert len(kernels) == 4 * 91
    assert {place for _, *places in kernels for place in places} == {"0"}, usage
