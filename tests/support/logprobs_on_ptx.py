"""Log-probabilities by compiled kernels: what the programs that run PTX on CPU tensors check of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from support.cases import BFLOAT16, DTYPES, FLOAT32, Case
from support.figures import assert_figures
from support.logprob_cases import LogprobCase, build_logprobs, check_found, differentiated
from support.oracle import Options

_SOFTCAP = Options(softcap=6.0, logit_scale=1.3, ignore_index=7)
# Each type, capped or not, with each temperature and upstream gradient, past a block and split; and rare rows.
CASES = [
    LogprobCase(
        Case("ptx", shape=shape, dtype=dtype, options=options, kind=kind, reduction="none", mode=mode, layout=layout),
        temperature,
        upstreams=upstreams,
    )
    for dtype in DTYPES
    for shape, options, kind, mode, layout, temperature, upstreams in (
        ((3, 9001), Options(), "masked", "plain", "contiguous", "0.7", "both"),
        ((3, 9001), _SOFTCAP, "confident", "plain", "contiguous", "per_token", "both"),
        ((5, 700), Options(), "target_masked", "inplace", "contiguous", "per_token", "entropy"),
        ((5, 333), _SOFTCAP, "random", "plain", "sliced_columns", "1", "expanded"),
    )
]
CASES += [
    LogprobCase(Case("ptx_rare", shape=(12, 700), kind="nonfinite_rows", dtype=dtype, reduction="none"), "per_token")
    for dtype in (FLOAT32, BFLOAT16)
]


def check_logprobs(backend: str) -> None:
    """Every case against the float64 oracle."""
    from mixce_kernels import fused_token_logprobs

    for one in CASES:
        inputs = build_logprobs(one)
        result = fused_token_logprobs(inputs.logits, inputs.targets, backend=backend, **inputs.keywords)
        check_found(build_logprobs(one), differentiated(result, inputs))


def check_figures_of_logprobs(backend: str, vocab_size: int, counted: Callable[[], dict[str, Any]]) -> None:
    """Each pass reads each logit once, in whole vectors: `counted` has the counters of the kernel launched last."""
    from mixce_kernels import fused_token_logprobs

    logits = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    targets = torch.arange(64)
    for temperature in (0.7, torch.full((64,), 0.7)):
        logprobs, entropy = fused_token_logprobs(
            logits, targets, temperature=temperature, return_entropy=True, backend=backend
        )
        assert_figures(backend, "logprobs_forward", counted(), logits.numel())
        torch.autograd.grad(logprobs.sum() + entropy.sum(), logits, retain_graph=True)
        assert_figures(backend, "logprobs_backward", counted(), logits.numel())
        # Without an upstream gradient of the entropy it is the loss's own pass.
        torch.autograd.grad(logprobs.sum(), logits)
        assert_figures(backend, "backward", counted(), logits.numel())
