"""Cases of path "tiles" for its tiles' edges, its order of rows and its number formats, and how one is checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from mixce_kernels import fused_linear_mixce_loss
from mixce_kernels.backends.results import Results
from mixce_kernels.linear import tiles as linear_tiles
from mixce_kernels.linear import tiles_launch
from mixce_kernels.mixture import Mixture
from support.cases import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from support.linear_cases import LinearCase, LinearInputs, _case, build_linear, check_linear
from support.numerics import accumulate_dtype, assert_accurate
from support.oracle import Options

EVERY = Options(label_smoothing=0.1, z_loss=1e-3, softcap=6.0, logit_scale=0.7)
PER_TOKEN = {"reduction": "none", "upstream": "per_token", "eta": "per_token"}
# One below, at and one above a tile's 128 (64, 32) rows, columns and elements of depth; whole vectors and not.
RAGGED = [
    _case(f"tile_{n}_{v}_{d}", d, shape=(n, v), dtype=dtype, bias="random", **PER_TOKEN)
    for n, v, d in ((127, 129, 63), (128, 128, 64), (129, 257, 72), (65, 63, 1), (17, 1, 40), (1, 300, 129))
    for dtype in (FLOAT32, BFLOAT16, FLOAT16)
] + [
    _case(f"tile_{n}_{v}_{d}", d, shape=(n, v), dtype=FLOAT64, options=EVERY, **PER_TOKEN)
    for n, v, d in ((33, 65, 17), (32, 64, 32))
]
# Several tiles a split, several spans and partial gradients, in the sizes of `small_launches`.
SPLITS = [
    _case(f"splits_{index}", 48, shape=(70, 700), dtype=dtype, options=options, bias=bias, **PER_TOKEN)
    for index, (options, bias) in enumerate(((Options(), "none"), (EVERY, "random"), (Options(), "masked")))
    for dtype in (FLOAT32, BFLOAT16, FLOAT16)
] + [
    _case(f"splits_all_ignored_{dtype}", 48, shape=(70, 300), dtype=dtype, ignored="all", bias="random", **PER_TOKEN)
    for dtype in (FLOAT32, BFLOAT16)
]
TILES = RAGGED + SPLITS


def run(inputs: LinearInputs) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients by the public function."""
    bias = inputs.leaves[2] if len(inputs.leaves) > 2 else None
    tokens = inputs.tokens
    loss = fused_linear_mixce_loss(
        inputs.hidden, inputs.weight, tokens.targets, tokens.eta, bias=bias, path="tiles", **inputs.keywords
    )
    return loss.detach(), list(torch.autograd.grad(loss, inputs.leaves, tokens.upstream))


def check_case(case: LinearCase, extra_ulps: int = 0) -> list[Tensor]:
    """Holds a case to the accuracy rule; returns what was found."""
    inputs = build_linear(case)
    with small_launches() if case.plain.name.startswith("splits") else contextlib.nullcontext():
        loss, grads = run(inputs)
    check_linear(inputs, loss, grads, extra_ulps)
    return [loss, *grads]


@contextlib.contextmanager
def small_launches() -> Iterator[None]:
    """Splits of several tiles, several spans, and partial gradients, for a small vocabulary."""
    with mock.patch.multiple(tiles_launch, _WAVES=0, _SPLIT_TILES=2, _SCRATCH_BYTES=0, _MIN_SPAN=256):
        yield


def check_tiny_upstream(upstream: float, values: str = "random", eta: str = "0.3") -> None:
    """float16 with upstream gradients that it cannot hold: float32 gradients are as exact as those of upstream 1."""
    case = _case("tiny", 40, shape=(66, 300), dtype=FLOAT16, values=values, eta=eta, upstream="1", reduction="none")
    inputs = build_linear(case)
    tokens = inputs.tokens
    keywords = {name: value for name, value in inputs.keywords.items() if name not in ("reduction", "max_chunk_bytes")}
    options = linear_tiles.TokenOptions(**{name: keywords[name] for name in linear_tiles.TokenOptions._fields})
    hidden, weight, n_rows = inputs.hidden.detach(), inputs.weight.detach(), len(tokens.targets)
    loss, state = torch.empty(n_rows), torch.empty(5, n_rows)
    results = Results(loss, None, state, None, None, loss)
    linear_tiles.forward(hidden, weight, None, tokens.targets, Mixture(eta_value=float(tokens.eta)), options, results)
    grads = [torch.empty(hidden.shape), torch.empty(weight.shape)]
    linear_tiles.grad(
        hidden, weight, None, tokens.targets, state, torch.full((n_rows,), upstream), options, *grads, None
    )
    expected, expected_grads = inputs.oracle()
    _, plain = inputs.plain()
    largest = float(abs(expected_grads[0]).max()), float(abs(expected_grads[1]).max())
    for name, grad, want, measure, size in zip(
        ("grad_hidden", "grad_weight"), grads, expected_grads, plain, largest, strict=True
    ):
        # As of a gradient near 1, where float16 has all its digits: what is compared is relative to the largest.
        unit = 1.0 / size
        rounded = (grad.double() / upstream * unit).to(FLOAT16)
        assert_accurate(name, rounded, want * unit, (measure.double() * unit).to(FLOAT16), 0.0)
    assert accumulate_dtype(FLOAT16) == loss.dtype
    assert expected.loss.shape == loss.shape
