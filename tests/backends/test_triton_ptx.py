"""The compiled kernels themselves, executed: with the folder `ptx_on_cpu` at hand no GPU is needed."""

from __future__ import annotations

import pytest

from support.on_ptx import needs_ptx_on_cpu, run_on_ptx

pytest.importorskip("triton")


@needs_ptx_on_cpu
@pytest.mark.slow
def test_compiled_kernels_on_cpu_tensors() -> None:
    assert run_on_ptx("support.triton_on_ptx").startswith("ran ")
