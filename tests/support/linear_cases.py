"""The table of the linear loss: cases of hidden states, weight, bias and options, their tensors, and their oracle.

The logits of a case are those of a plain case of `cases`: one row of targets, eta, weights and upstream gradients.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from support.cases import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, Case
from support.inputs import Inputs, build
from support.numerics import accumulate_dtype, assert_accurate, plain_losses, to_numpy
from support.oracle import Options, TokenResults, np, token_results
from support.weightings import WEIGHTINGS

LINEAR_OPERATORS = ("linear_forward", "linear_grad", "linear_forward_with_grad")


@dataclass(frozen=True)
class LinearCase:
    """One call: `plain` says what tokens there are, the other fields what their logits are made of."""

    plain: Case
    hidden_size: int = 24
    bias: str = "none"  # none, random, or masked: -inf for some
    hidden_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    chunk_rows: int | None = 3  # as many rows fit the budget; None: the default budget
    values: str = "random"  # or confident: from q = 0.5 to q near 1, or large: logits of some tens

    def __str__(self) -> str:
        return str(self.plain)

    def at(self, **changes: Any) -> LinearCase:
        """The case with some fields of the plain case changed."""
        return replace(self, plain=self.plain.at(**changes))


def _case(name: str, hidden_size: int = 24, **changes: Any) -> LinearCase:
    own = ("bias", "hidden_layout", "weight_layout", "chunk_rows", "values")
    fields = {key: changes.pop(key) for key in own if key in changes}
    plain = {"shape": (3, 4, 131), "reduction": "mean", "upstream": "3.7", **changes}
    return LinearCase(Case(name, **plain), hidden_size, **fields)


_EVERY = Options(ignore_index=0, label_smoothing=0.2, z_loss=1e-2, softcap=4.0, logit_scale=1.3)
_OPTIONS = {
    "default": Options(),
    "smoothing": Options(label_smoothing=0.1),
    "smoothing_1": Options(label_smoothing=1.0),
    "z_loss": Options(z_loss=1e-3),
    "softcap": Options(softcap=3.0),
    "scale": Options(logit_scale=1.7),
    "ignore_7": Options(ignore_index=7),
    "all": _EVERY,
}

LINEAR = [
    _case(name, options=options, dtype=dtype, reduction=reduction, bias="random")
    for name, options in _OPTIONS.items()
    for dtype in DTYPES
    for reduction in ("mean", "none")
]
LINEAR += [
    _case(f"{values}_eta{eta}", values=values, dtype=dtype, eta=eta, reduction="none", upstream="per_token")
    for values in ("confident", "large")
    for eta in ("0", "0.3", "1")
    for dtype in DTYPES
    # Of a loss of 1e-20 every digit is that of the products' rounding, and the plain formula may be the luckier.
    if (values, eta, dtype) != ("large", "0", FLOAT64)
]
LINEAR += [
    _case(f"weighting_{weighting}_{reduction}", weighting=weighting, dtype=dtype, reduction=reduction, values=values)
    for weighting in WEIGHTINGS
    for reduction, dtype, values in (
        ("mean", FLOAT32, "random"), ("none", FLOAT32, "confident"), ("sum", BFLOAT16, "random"),
        ("mean", FLOAT64, "confident"),
    )
]  # fmt: skip
LINEAR += [_case("masked", bias="masked", dtype=dtype, reduction=red) for dtype in DTYPES for red in ("sum", "none")]
LINEAR += [
    _case(f"eta_{eta}", eta=eta, dtype=dtype, bias="random")
    for eta in ("0", "1", "0d", "per_token", "column")
    for dtype in (FLOAT32, BFLOAT16)
]
LINEAR += [
    _case(f"{reduction}_{num_items}{'_weighted' if weighted else ''}_upstream_{upstream}", reduction=reduction,
          num_items=num_items, token_weights=weighted, upstream=upstream, dtype=dtype)
    for reduction, num_items, upstreams in (
        ("none", "none", ("per_token", "expanded", "0", "-2")), ("sum", "none", ("1", "-2")),
        ("mean", "none", ("1", "3.7", "0")), ("mean", "int", ("1",)), ("mean", "tensor", ("1",)),
    )
    for weighted in (False, True)
    for upstream in upstreams
    for dtype in (FLOAT32, BFLOAT16)
]  # fmt: skip
# In float16 a gradient of 1e-7 for each token must come out of sums whose terms float16 does not hold.
LINEAR += [_case("tiny_upstream", upstream="1e-4", reduction="mean", num_items="int", dtype=FLOAT16, shape=(12, 515))]
# Chunks of one row, of all rows, with a rest; one row, one column, one hidden number; tiles of the weight and a rest.
LINEAR += [
    _case(f"chunks_of_{rows}", chunk_rows=rows, dtype=dtype, reduction=reduction, bias="random")
    for rows in (1, 5, 12, None)
    for dtype in (FLOAT32, BFLOAT16)
    for reduction in ("mean", "none")
]
LINEAR += [
    _case(f"n{shape[0]}_v{shape[-1]}_d{hidden_size}", hidden_size, shape=shape, dtype=dtype, bias="random",
          ignored="none" if shape[0] == 1 else "some", values=values)
    for shape, hidden_size, values in (
        ((1, 131), 24, "random"), ((12, 1), 24, "random"), ((12, 131), 1, "random"), ((12, 2049), 8, "random"),
        ((12, 6200), 40, "random"), ((40, 515), 768, "random"), ((131,), 5, "random"), ((0, 9), 4, "random"),
        ((2, 0, 9), 4, "random"), ((4, 50257), 64, "random"),
    )
    for dtype in (FLOAT32, FLOAT64, BFLOAT16)
]  # fmt: skip
LINEAR += [
    _case(f"all_ignored_{reduction}", ignored="all", reduction=reduction, dtype=dtype, bias="random")
    for reduction in ("mean", "sum", "none")
    for dtype in (FLOAT32, BFLOAT16)
]
LINEAR += [_case("none_ignored", ignored="none", dtype=dtype) for dtype in (FLOAT32, BFLOAT16)]
LINEAR += [
    _case(f"hidden_{hidden}_weight_{weight}", hidden_layout=hidden, weight_layout=weight, dtype=dtype,
          target_dtype=torch.int32)
    for hidden, weight in (
        ("sliced", "contiguous"), ("transposed", "transposed"), ("every_other", "every_other"), ("expanded", "sliced"),
    )
    for dtype in (FLOAT32, BFLOAT16)
]  # fmt: skip


@dataclass
class LinearInputs:
    """The tensors of a case: leaves `hidden`, `weight` and `bias`, and what else the call takes."""

    case: LinearCase
    tokens: Inputs  # of the plain case: targets, eta, keywords, upstream gradient
    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    keywords: dict[str, Any]

    @property
    def leaves(self) -> list[Tensor]:
        """Those with a gradient."""
        return [one for one in (self.hidden, self.weight, self.bias) if one is not None]

    @property
    def flat_hidden(self) -> Tensor:
        """Hidden states [N, D], of zeros where the token is ignored."""
        valid = self.tokens.flat_targets != self.case.plain.options.ignore_index
        flat = self.hidden.detach().reshape(-1, self.case.hidden_size)
        return torch.where(valid.unsqueeze(-1), flat, 0.0)

    def oracle(self) -> tuple[TokenResults, list[np.ndarray]]:
        """Each token's results, and the gradients of the leaves, in float64 or longer."""
        wide = np.dtype(np.longdouble if self.case.plain.dtype == FLOAT64 else np.float64)
        hidden, weight = (to_numpy(one, wide) for one in (self.flat_hidden, self.weight))
        logits = hidden @ weight.T
        if self.bias is not None:
            logits = logits + to_numpy(self.bias, wide)
        targets = self.tokens.flat_targets.cpu().numpy()
        results = token_results(
            logits, targets, to_numpy(self.tokens.flat_eta, wide), self.case.plain.options,
            self.tokens.oracle_weighting(),
        )  # fmt: skip
        upstream = (self.tokens.factors * self.tokens.token_upstream).numpy().astype(wide)
        grad_logits = np.where(upstream[:, None] == 0, 0, results.grad * upstream[:, None])
        return results, [grad_logits @ weight, grad_logits.T @ hidden, grad_logits.sum(0)][: len(self.leaves)]

    def plain(self) -> tuple[Tensor, list[Tensor]]:
        """The plain formula in float32 or float64 of the same tensors: losses [N], and the leaves' gradients."""
        dtype = accumulate_dtype(self.case.plain.dtype)
        leaves = [one.detach().to(dtype).requires_grad_() for one in (self.flat_hidden, *self.leaves[1:])]
        logits = F.linear(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None)
        losses = plain_losses(
            logits, self.tokens.flat_targets, self.tokens.flat_eta.to(dtype), self.case.plain.options,
            self.tokens.plain_weighting(),
        )  # fmt: skip
        upstream = (self.tokens.factors * self.tokens.token_upstream).to(dtype)
        grads = torch.autograd.grad(losses, leaves, upstream)
        return losses.detach(), [grad.to(self.case.plain.dtype) for grad in grads]


def build_linear(case: LinearCase) -> LinearInputs:
    """The tensors of a case, the same on every call."""
    tokens = build(case.plain)
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()) + 1)
    *leading, vocab_size = case.plain.shape
    size, dtype = case.hidden_size, case.plain.dtype
    hidden = torch.randn((*leading, size), generator=generator, dtype=torch.float64)
    weight = torch.randn((vocab_size, size), generator=generator, dtype=torch.float64) * (2 / size**0.5)
    flat_targets = tokens.flat_targets.long()
    valid = flat_targets != case.plain.options.ignore_index
    if case.values == "large":
        weight = weight * 10
    elif case.values == "confident":
        # Towards its target's row of the weight, from a little to so far that q is 1 but for 1e-13.
        rows = weight[torch.where(valid, flat_targets, 0)]
        height = torch.linspace(4, 30, max(len(rows), 1), dtype=torch.float64)[: len(rows)].unsqueeze(-1)
        hidden = (rows / rows.square().sum(-1, keepdim=True) * height).reshape(hidden.shape)
    if case.hidden_layout == "expanded":
        hidden = hidden[:1].expand(hidden.shape)
    hidden = hidden.to(dtype)
    if case.hidden_layout != "expanded":
        # What stands at an ignored token must not matter.
        hidden = torch.where(valid.reshape(*leading, 1), hidden, torch.nan)
    bias = None
    if case.bias != "none":
        bias = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
        if case.bias == "masked":
            masked = torch.rand(vocab_size, generator=generator) < 0.3
            masked[flat_targets[valid]] = False
            bias = bias.masked_fill(masked, -torch.inf)
        bias = bias.to(dtype).requires_grad_()
    keywords = {name: value for name, value in tokens.keywords.items() if "grad" not in name and "inplace" not in name}
    if case.chunk_rows is not None:
        keywords["max_chunk_bytes"] = case.chunk_rows * max(vocab_size, 1) * accumulate_dtype(dtype).itemsize
    return LinearInputs(
        case, tokens, _laid_out(hidden, case.hidden_layout).requires_grad_(),
        _laid_out(weight.to(dtype), case.weight_layout).requires_grad_(), bias, keywords,
    )  # fmt: skip


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """The values in memory as `layout` says, beside NaN."""
    *leading, rows, columns = (1, *values.shape) if values.dim() == 1 else values.shape
    nan = torch.nan
    if layout in ("contiguous", "expanded"):
        view = values.new_empty(values.shape) if layout == "contiguous" else values
    elif layout == "sliced":
        view = values.new_full((*leading, rows + 1, columns), nan)[..., :-1, :]
    elif layout == "transposed":
        view = values.new_full((*leading, columns, rows), nan).transpose(-1, -2)
    elif layout == "every_other":
        view = values.new_full((*leading, rows, 2 * columns), nan)[..., ::2]
    else:
        raise ValueError(layout)
    return view.detach() if layout == "expanded" else view.copy_(values).detach()


def check_linear(inputs: LinearInputs, loss: Tensor, grads: list[Tensor], extra_ulps: int = 0) -> None:
    """Holds loss and gradients to the accuracy rule."""
    case, tokens = inputs.case.plain, inputs.tokens
    expected, expected_grads = inputs.oracle()
    plain_loss, plain_grads = inputs.plain()
    wide = expected.loss.dtype.type
    factors = tokens.factors.numpy().astype(wide)
    slopes = np.abs(expected.weight) + 2 * case.options.z_loss * np.abs(expected.lse)
    slopes = np.where(np.isfinite(slopes), slopes, 0)
    valid = tokens.flat_targets.numpy() != case.options.ignore_index
    losses = np.where(valid, expected.loss * factors, 0)
    assert loss.dtype == accumulate_dtype(case.dtype)
    if case.reduction == "none":
        assert loss.shape == tokens.targets.shape
        scale = float((np.abs(factors) * slopes).max(initial=0))
        assert_accurate("loss", loss.reshape(-1), losses, plain_loss * tokens.factors.to(plain_loss.dtype), scale)
    else:
        # A sum may be as far off as its tokens are, whatever cancels.
        assert loss.shape == ()
        errors = np.abs(plain_loss.double().numpy() - expected.loss)
        least = float((np.abs(factors) * np.where(np.isfinite(errors), errors, 0).max(initial=0)).sum())
        plain_sum = (plain_loss * tokens.factors.to(plain_loss.dtype)).sum().reshape(1)
        scale = float((np.abs(factors) * slopes).sum())
        assert_accurate("loss", loss.reshape(1), losses.sum().reshape(1), plain_sum, scale, least_plain_error=least)
    upstream = (tokens.factors * tokens.token_upstream).abs().numpy().astype(wide)
    token_scale = float((upstream * slopes).max(initial=0))
    others = (inputs.weight, inputs.flat_hidden, torch.ones(1))
    names = ("grad_hidden", "grad_weight", "grad_bias")
    for name, leaf, grad, want, plain, other in zip(
        names, inputs.leaves, grads, expected_grads, plain_grads, others, strict=False
    ):
        assert (grad.dtype, grad.shape) == (case.dtype, leaf.shape), name
        scale = token_scale * float(other.detach().abs().max()) if other.numel() > 0 else 0.0
        assert_accurate(name, grad.reshape(want.shape), want, plain, scale, extra_ulps=extra_ulps)
