"""The table of calls of log-probabilities: their tensors, and what the oracle and the rule make of them."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.cases import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, Case
from support.inputs import build, computed, move
from support.numerics import accumulate_dtype, assert_accurate, to_numpy
from support.oracle import Options, np


@dataclass(frozen=True)
class LogprobCase:
    """One call: logits, targets and options as those of `case`, whose losses and modes but "inplace" do not matter."""

    case: Case
    temperature: str = "1"  # a number, or as the etas of `Case`
    entropy: bool = True
    upstreams: str = "both"  # which results have one

    def __str__(self) -> str:
        return f"{self.case}-T{self.temperature}-{self.upstreams if self.entropy else 'logprobs'}"


def _case(name: str, **changes: Any) -> Case:
    return Case(name, reduction="none", upstream="per_token", **changes)


_OPTIONS = {
    "scale": Options(logit_scale=1.7),
    "softcap": Options(softcap=3.0),
    "softcap_scale": Options(softcap=5.0, logit_scale=0.5),
    "ignore_7": Options(ignore_index=7),
}
_ALL = Options(ignore_index=0, softcap=4.0, logit_scale=1.3)

SIZES = [
    LogprobCase(_case(f"v{size}", shape=(5, size), dtype=dtype), temperature="0.7")
    for size in (1, 2, 7, 255, 2047, 2049, 6145)
    for dtype in DTYPES
]
SIZES += [LogprobCase(_case("v50257", shape=(3, 50257), dtype=dtype)) for dtype in DTYPES]
SIZES += [LogprobCase(_case("v1000000", shape=(1, 1_000_000), dtype=dtype)) for dtype in (FLOAT32, BFLOAT16)]
SIZES += [LogprobCase(_case("rows", shape=(200, 515), dtype=dtype)) for dtype in (FLOAT32, BFLOAT16)]
SIZES += [
    LogprobCase(_case("no_rows", shape=(2, 0, 9)), temperature="per_token"),
    LogprobCase(_case("one_dimension", shape=(1000,)), temperature="0d"),
]
# "confident" has entropies near 0, "ties" and "flat" near log V.
KINDS = [
    LogprobCase(_case(kind, shape=(12, 2500), kind=kind, dtype=dtype), temperature, upstreams=upstreams)
    for kind in ("confident", "masked", "first_block_masked", "target_masked", "ties", "flat", "wide", "nonfinite_rows")
    for temperature, upstreams in (("1", "both"), ("0.6", "entropy"), ("per_token", "both"))
    for dtype in DTYPES
]
KINDS += [
    LogprobCase(_case("shifted", shape=(12, 2500), kind="shifted", dtype=dtype), temperature)
    for temperature in ("1", "per_token")
    for dtype in (FLOAT32, FLOAT64)
]
OPTIONS = [
    LogprobCase(_case(name, options=options, dtype=dtype), temperature)
    for name, options in (*_OPTIONS.items(), ("all", _ALL))
    for temperature in ("1", "1.4", "per_token")
    for dtype in DTYPES
]
OPTIONS += [
    LogprobCase(_case(f"temperature_{temperature}", shape=(4, 3, 77), dtype=dtype), temperature)
    for temperature in ("1.4", "0d", "0d_bfloat16", "0d_float64", "per_token", "column")
    for dtype in DTYPES
]
LAYOUTS = [
    LogprobCase(_case(f"{layout}_{mode}", shape=shape, layout=layout, dtype=dtype, mode=mode), "per_token")
    for layout, shape in (
        ("sliced", (3, 4, 1025)), ("transposed", (3, 4, 1025)), ("sliced_columns", (5, 1023)), ("unaligned", (5, 1000)),
        ("every_other_column", (5, 100)), ("scattered", (2, 3, 2, 515)),
    )
    for mode in ("plain", "inplace")
    for dtype in (FLOAT32, BFLOAT16)
]  # fmt: skip
UPSTREAMS = [
    LogprobCase(_case(f"{mode}", mode=mode, dtype=dtype), entropy=entropy, upstreams=upstreams)
    for mode in ("plain", "inplace")
    for entropy, upstreams in (
        (False, "logprobs"), (True, "logprobs"), (True, "entropy"), (True, "both"), (True, "expanded"),
    )
    for dtype in (FLOAT32, BFLOAT16, FLOAT16, FLOAT64)
]  # fmt: skip
UPSTREAMS += [LogprobCase(_case("all_ignored", ignored="all", dtype=dtype)) for dtype in (FLOAT32, BFLOAT16)]


def _random_case(seed: int) -> LogprobCase:
    draw = random.Random(seed)
    options = Options(
        ignore_index=draw.choice((-100, 0, 3)),
        softcap=draw.choice((None, None, 2.5, 30.0)),
        logit_scale=draw.choice((1.0, 0.3, 2.2)),
    )
    case = _case(
        f"random_{seed}",
        shape=(draw.randint(1, 4), draw.randint(1, 4), draw.choice((3, 17, 333, 2050, 4111))),
        dtype=draw.choice(DTYPES),
        kind=draw.choice(("random", "confident", "masked", "ties", "wide", "flat")),
        layout=draw.choice(("contiguous", "sliced", "transposed", "sliced_columns", "unaligned")),
        target_dtype=draw.choice((torch.int64, torch.int32)),
        mode=draw.choice(("plain", "inplace")),
        options=options,
    )
    temperature = draw.choice(("1", "0.5", "2.5", "0d", "per_token", "column"))
    return LogprobCase(case, temperature, upstreams=draw.choice(("both", "both", "entropy", "expanded")))


ALL = SIZES + KINDS + OPTIONS + LAYOUTS + UPSTREAMS + [_random_case(seed) for seed in range(40)]


class LogprobInputs(NamedTuple):
    """The tensors of a call."""

    one: LogprobCase
    logits: Tensor  # [..., V], requires grad, and no leaf: it may be overwritten
    targets: Tensor  # [...]
    temperature: float | Tensor
    grad_logprobs: Tensor | None  # [...]
    grad_entropy: Tensor | None  # [...]

    @property
    def keywords(self) -> dict[str, Any]:
        """The options of the public function."""
        options = self.one.case.options
        return {
            "temperature": self.temperature, "ignore_index": options.ignore_index, "softcap": options.softcap,
            "logit_scale": options.logit_scale, "return_entropy": self.one.entropy,
            "inplace_backward": self.one.case.mode == "inplace",
        }  # fmt: skip

    def to(self, device: str) -> LogprobInputs:
        """The same on another device; logits are laid out alike."""
        if device == "cpu":
            return self
        memory = self.logits.untyped_storage()
        whole = torch.empty(0, dtype=self.logits.dtype).set_(memory).to(device)
        logits = whole.as_strided(self.logits.shape, self.logits.stride(), self.logits.storage_offset())
        others = (move(one, device) for one in self[2:])
        return LogprobInputs(self.one, computed(logits), *others)


def build_logprobs(one: LogprobCase) -> LogprobInputs:
    """The tensors of a call, the same on every call."""
    inputs = build(one.case)
    generator = torch.Generator().manual_seed(zlib.crc32(str(one).encode()))
    *leading, _ = one.case.shape
    accumulate = accumulate_dtype(one.case.dtype)
    numbers = {"0d": FLOAT32, "0d_bfloat16": BFLOAT16, "0d_float64": FLOAT64}
    temperature: float | Tensor
    if one.temperature in numbers:
        temperature = torch.tensor(0.75, dtype=numbers[one.temperature])
    elif one.temperature in ("per_token", "column"):
        shape = leading if one.temperature == "per_token" else [*leading[:-1], 1]
        temperature = torch.rand(shape, generator=generator) * 1.5 + 0.3
        # What stands at an ignored token must not matter.
        if one.temperature == "per_token":
            temperature = torch.where(inputs.targets == one.case.options.ignore_index, torch.nan, temperature)
    else:
        temperature = float(one.temperature)
    grads = [torch.randn(leading, generator=generator).to(accumulate) * 2 for _ in range(2)]
    if one.upstreams == "expanded":
        grads = [torch.tensor(value, dtype=accumulate).expand(leading) for value in (-1.3, 0.4)]
    wanted = [one.upstreams != "entropy", one.entropy and one.upstreams != "logprobs"]
    given = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return LogprobInputs(one, inputs.logits, inputs.targets, temperature, *given)


class Expected(NamedTuple):
    """What a call should give, by token [N]: log-probabilities, entropies and their gradient [N, V]."""

    logprobs: Any
    entropy: Any
    grad: Any


def oracle(inputs: LogprobInputs) -> Expected:
    """In float64, for float64 logits in the longest type there is."""
    case = inputs.one.case
    wide = np.dtype(np.longdouble if case.dtype == FLOAT64 else np.float64)
    vocab_size = inputs.logits.shape[-1]
    x = to_numpy(inputs.logits.detach().reshape(-1, vocab_size), wide)
    targets = inputs.targets.reshape(-1).cpu().numpy()
    temperature, g, h = (to_numpy(one, wide)[:, None] for one in _of_tokens(inputs))
    options, rows = case.options, np.arange(len(targets))
    valid = targets != options.ignore_index
    y = np.where(valid, targets, 0).astype(np.int64)
    with np.errstate(all="ignore"):
        x, temperature = np.where(valid[:, None], x, 0), np.where(valid[:, None], temperature, 1)
        scale, slope = wide.type(options.logit_scale), np.ones_like(x)
        if options.softcap is None:
            d = scale * (x - x.max(-1, keepdims=True))
        else:
            tanh = np.tanh(scale * x / wide.type(options.softcap))
            d, slope = options.softcap * (tanh - tanh.max(-1, keepdims=True)), (1 - tanh) * (1 + tanh)
        d = d / temperature
        s = np.log(np.exp(d).sum(-1, keepdims=True))
        log_p = d - s
        p = np.exp(log_p)
        mean = np.where(p == 0, 0, p * d).sum(-1, keepdims=True)
        entropy = np.where(np.isnan(s), s, s - mean)
        by_entropy = np.where(p == 0, 0, p * (d - mean))
        grad = -g * p - h * by_entropy
        grad[rows, y] = g[:, 0] * -np.expm1(log_p[rows, y]) - h[:, 0] * by_entropy[rows, y]
        grad = np.where(np.isnan(s), s, grad * slope * scale / temperature)
    logprobs = np.where(valid, log_p[rows, y], 0)
    return Expected(logprobs, np.where(valid, entropy[:, 0], 0), np.where(valid[:, None], grad, 0))


def plain(inputs: LogprobInputs) -> tuple[Tensor, Tensor, Tensor]:
    """What one would write in PyTorch, in float32 or float64: results [N], and the gradient rounded to logits' type."""
    case = inputs.one.case
    dtype = accumulate_dtype(case.dtype)
    leaf = inputs.logits.detach().reshape(-1, inputs.logits.shape[-1]).to(dtype).requires_grad_()
    targets, options = inputs.targets.reshape(-1), case.options
    temperature, g, h = (one.to(dtype) for one in _of_tokens(inputs))
    valid = targets != options.ignore_index
    z, scale = leaf, options.logit_scale
    if options.softcap is not None:
        z, scale = options.softcap * torch.tanh(options.logit_scale * leaf / options.softcap), 1.0
    z = scale * (z - z.detach().amax(-1, keepdim=True)) / temperature.unsqueeze(-1)
    log_p = torch.log_softmax(z, -1)
    logprobs = log_p.gather(-1, torch.where(valid, targets, 0).long().unsqueeze(-1)).squeeze(-1)
    p = log_p.exp()
    entropy = -(p * torch.where(p == 0, 0.0, log_p)).sum(-1)
    logprobs, entropy = (torch.where(valid, one, 0.0) for one in (logprobs, entropy))
    (grad,) = torch.autograd.grad((logprobs * g + entropy * h).sum(), leaf)
    return logprobs.detach(), entropy.detach(), grad.to(case.dtype)


def _of_tokens(inputs: LogprobInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Temperature and both upstream gradients, [N] float64 each."""
    shape = inputs.targets.shape
    given = (inputs.temperature, *(0.0 if one is None else one for one in (inputs.grad_logprobs, inputs.grad_entropy)))
    temperature, g, h = (torch.as_tensor(one, dtype=FLOAT64).expand(shape).reshape(-1) for one in given)
    return temperature, g, h


class Found(NamedTuple):
    """What a call gave."""

    logprobs: Tensor  # [...]
    entropy: Tensor | None  # [...]
    grad: Tensor  # [..., V]


def differentiated(found: Any, inputs: LogprobInputs) -> Found:
    """Results of the public function, with the gradient of those that have an upstream one."""
    logprobs, entropy = found if inputs.one.entropy else (found, None)
    pairs = ((logprobs, inputs.grad_logprobs), (entropy, inputs.grad_entropy))
    results, grads = zip(*((one, grad) for one, grad in pairs if grad is not None), strict=True)
    (grad,) = torch.autograd.grad(results, inputs.logits, grads)
    return Found(logprobs, entropy, grad)


def check_found(inputs: LogprobInputs, found: Found, extra_ulps: int = 0) -> None:
    """Holds a call to the rule. `inputs` are fresh ones: the call may have overwritten its own."""
    case, shape = inputs.one.case, inputs.targets.shape
    expected = oracle(inputs)
    plain_logprobs, plain_entropy, plain_grad = plain(inputs)
    temperature, g, h = (one.numpy() for one in _of_tokens(inputs))
    results = [("log-probability", found.logprobs, expected.logprobs, plain_logprobs)]
    if found.entropy is not None:
        results.append(("entropy", found.entropy, expected.entropy, plain_entropy))
    for name, result, want, measure in results:
        assert result.dtype == accumulate_dtype(case.dtype), name
        assert result.shape == shape, name
        assert_accurate(name, result.reshape(-1), want, measure, 1.0)
    assert (found.grad.dtype, found.grad.shape) == (case.dtype, inputs.logits.shape)
    valid = inputs.targets.reshape(-1).numpy() != case.options.ignore_index
    scale = np.where(valid, (np.abs(g) + np.abs(h)) * case.options.logit_scale / temperature, 0)
    assert_accurate(
        "gradient", found.grad.reshape(expected.grad.shape), expected.grad, plain_grad, float(scale.max(initial=0)),
        extra_ulps=extra_ulps,
    )  # fmt: skip
