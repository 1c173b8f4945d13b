"""Runs compiled GPU kernels on the CPU and counts what they do: one process of `count_kernels.py`.

Reads a job as JSON from stdin; writes a line of JSON for each step of each case. `mixce_kernels` must be a copy that
was built with CUDA kernels and the shared CUDA runtime.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gpu_kernels.counts import OPTIONS, STEPS, Case, count_of
from gpu_kernels.hot_loops import ITEMSIZES, KERNELS, HotLoop, triton_hot_loops, triton_variant
from gpu_kernels.registers import Registers


class Runtime(Protocol):
    """What stands in for a GPU's; launches are those since `begin`."""

    counts: bool

    def begin(self, tensors: list[Tensor]) -> None:
        """Forgets the launches so far; of these tensors unique bytes will be counted."""

    def launches(self) -> list[tuple[str, int, dict[str, Any]]]:
        """Names, programs and counters."""

    def registers(self, case: Case) -> list[Registers]:
        """Of kernels that were compiled instead of launched."""

    def hot_loops(self, case: Case) -> list[HotLoop]:
        """Those of the same kernels."""


class CudaRuntime:
    """A stand-in for the CUDA runtime that the extension is linked to."""

    counts = True

    def __init__(self, target: str, extension: str) -> None:
        from ptx_on_cpu import cudart

        self.runtime = cudart.Runtime(target)
        self.runtime.attach(extension)
        self.tensors: list[Tensor] = []

    def begin(self, tensors: list[Tensor]) -> None:
        self.runtime.unregister(*self.tensors)
        self.tensors = [tensor for tensor in tensors if tensor.numel() > 0]
        self.runtime.register(*self.tensors)
        self.runtime.clear()

    def launches(self) -> list[tuple[str, int, dict[str, Any]]]:
        return [(launch["kernel"], math.prod(launch["grid"]), launch["counters"]) for launch in self.runtime.launches()]

    def registers(self, case: Case) -> list[Registers]:
        return []

    def hot_loops(self, case: Case) -> list[HotLoop]:
        return []


class TritonRuntime:
    """A stand-in for Triton's driver; with `counts` off its kernels are compiled, and not run."""

    def __init__(self, counts: bool, cuobjdump: str) -> None:
        from ptx_on_cpu import triton_backend
        from triton.runtime.cache import get_cache_manager

        self.backend, self.counts, self.cuobjdump = triton_backend, counts, cuobjdump
        self.cubins = cubins = list[Path]()

        class Compiled(triton_backend.Launcher):  # type: ignore[misc]
            def __init__(self, src: Any, metadata: Any) -> None:
                super().__init__(src, metadata)
                self.cubin = Path(get_cache_manager(metadata.hash).get_file(f"{src.name[:150]}.cubin"))

            def __call__(self, x: int, y: int, z: int, *_: Any) -> None:
                m = self.metadata
                shape = (m.num_warps, m.num_ctas, m.num_stages, m.shared)
                record = triton_backend.LaunchRecord(m.name, f"sm_{m.target.arch}", (x, y, z), *shape, {}, self.ptx)
                triton_backend.launches.append(record)
                cubins.append(self.cubin)

        if not counts:
            triton_backend.Driver.launcher_cls = Compiled

    def use(self, target: str) -> None:
        self.backend.install(target)

    def begin(self, tensors: list[Tensor]) -> None:
        self.backend.clear()
        self.cubins.clear()

    def launches(self) -> list[tuple[str, int, dict[str, Any]]]:
        return [
            (launch.name, math.prod(launch.grid) * launch.num_ctas, launch.counters) for launch in self.backend.launches
        ]

    def registers(self, case: Case) -> list[Registers]:
        found = []
        for launch in self.backend.launches if not self.counts else []:
            static = launch.static
            variant = "" if case.steps == ("scale_rows",) else triton_variant(case.option, case.vocab, case.steps[0])
            variant += ", cluster" * (launch.num_ctas > 1)
            numbers = (32 * launch.num_warps, static["registers"], static["spill_bytes"], launch.smem)
            found.append(Registers("triton", case.target, launch.name, case.dtype, variant, *numbers))
        return found

    def hot_loops(self, case: Case) -> list[HotLoop]:
        if self.counts:
            return []
        return [
            loop
            for launch, cubin in zip(self.backend.launches, self.cubins, strict=True)
            if launch.name in KERNELS and case.dtype in ITEMSIZES
            for loop in triton_hot_loops(
                self.cuobjdump, cubin, case.dtype, triton_variant(case.option, case.vocab, case.steps[0])
            )
        ]


def run(case: Case, runtime: Runtime) -> Iterator[dict[str, Any]]:
    """Takes the case's steps; yields the counts, or the registers and hot loops, of each."""
    from mixce_kernels import backends
    from mixce_kernels.backends import devices
    from mixce_kernels.backends.results import ENTROPY_STATE_WIDTH, STATE_WIDTH, STATS_WIDTH, EntropyGrad, Results
    from mixce_kernels.mixture import Mixture
    from mixce_kernels.options import TokenOptions, accumulate_dtype
    from mixce_kernels.reduction import NO_REDUCTION

    dtype, option = getattr(torch, case.dtype), OPTIONS[case.option]
    real, options = accumulate_dtype(dtype), TokenOptions(**dict(option.token_options))  # type: ignore[arg-type]
    n_rows = case.rows
    logits = (3 * torch.randn(n_rows, case.vocab)).to(dtype)
    targets = torch.randint(0, case.vocab, (n_rows,))
    eta = torch.rand(n_rows, dtype=real) if option.eta_tensor else None
    mixture = Mixture(eta, 0.5)
    losses, state = torch.empty(n_rows, dtype=real), torch.empty((STATE_WIDTH, n_rows), dtype=real)
    # As of the mean.
    grad_loss, factor = torch.ones((), dtype=real), torch.full((), 3.0, dtype=real)
    token_scale = torch.full((), 1 / n_rows, dtype=torch.float64)
    stats = torch.empty((STATS_WIDTH, n_rows), dtype=real) if option.stats else None
    correct = torch.empty(n_rows, dtype=torch.bool) if option.stats else None
    temperature, entropy, entropy_state = None, None, None
    if option.entropy:
        temperature, grad_entropy = torch.rand(n_rows, dtype=real) + 0.5, torch.rand(n_rows, dtype=real)
        entropy_state = torch.empty((ENTROPY_STATE_WIDTH, n_rows), dtype=real)
        entropy = EntropyGrad(grad_entropy, entropy_state)
    memory = torch.empty(logits.numel() + option.grad_offset, dtype=dtype)
    grad_logits = memory[option.grad_offset :].view_as(logits)
    maybe = (logits, targets, losses, state, stats, correct, grad_loss, factor, token_scale, memory, eta)
    tensors = [tensor for tensor in (*maybe, temperature, *(entropy or ())) if tensor is not None]
    backend, results = backends.get(case.backend), Results(losses, None, state, stats, correct, losses, entropy_state)

    def take(step: str) -> None:
        if step == "forward":
            backend.forward(
                logits, targets, mixture, options, NO_REDUCTION, results, None, None, temperature,
                may_split=not option.entropy,
            )  # fmt: skip
        elif step == "backward":
            backend.logits_grad(
                logits, targets, state, grad_loss, token_scale, options, grad_logits, temperature, entropy
            )
        elif step == "grad_in_forward":
            backend.forward(logits, targets, mixture, options, NO_REDUCTION, results, token_scale, grad_logits)
        else:
            backend.scale_rows_(grad_logits, factor, targets, options.ignore_index)

    devices.EMULATED_MULTIPROCESSORS = case.multiprocessors
    # In this order: a backward wants the state of a forward.
    for step in (step for step in STEPS if step in case.steps):
        runtime.begin(tensors)
        take(step)
        if runtime.counts:
            yield {"count": dataclasses.asdict(count_of(case, step, runtime.launches()))}
        one_step = dataclasses.replace(case, steps=(step,))
        yield from ({"registers": dataclasses.asdict(one)} for one in runtime.registers(one_step))
        yield from ({"hot_loop": dataclasses.asdict(one)} for one in runtime.hot_loops(one_step))
    if runtime.counts:
        assert losses.isfinite().all(), f"{case} has losses that are not finite"


def main() -> None:
    """Does the job."""
    job = json.load(sys.stdin)
    sys.path.insert(0, job["ptx_on_cpu"])
    torch.manual_seed(0)
    cases = [Case(**{**fields, "steps": tuple(fields["steps"])}) for fields in job["cases"]]
    # Before mixce_kernels is imported: the extension binds to the first CUDA runtime of its process.
    cuda = CudaRuntime(cases[0].target, job["extension"]) if cases[0].backend == "cuda" else None
    triton = None if cuda else TritonRuntime(job["counts"], job["cuobjdump"])
    for case in cases:
        if triton is not None:
            triton.use(case.target)
        for result in run(case, cuda or triton):  # type: ignore[arg-type]
            print(json.dumps(result), flush=True)
    if cuda is not None:
        from mixce_kernels import _C

        print(json.dumps({"state_bytes": _C.cuda_state_bytes(1)}))


if __name__ == "__main__":
    main()
