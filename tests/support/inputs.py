"""The tensors of a case, and what the oracle makes of them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from support.cases import BFLOAT16, FLOAT64, MODES, Case
from support.numerics import accumulate_dtype, to_numpy
from support.oracle import TokenResults, np, token_results
from support.weightings import of_tokens, oracle_of, parameters_of_tokens, plain_of


@dataclass
class Inputs:
    """The tensors of a case, and what the oracle and the rule need to know of them."""

    case: Case
    logits: Tensor  # [..., V], requires grad, and no leaf: it may be overwritten
    memory: Tensor  # in which the logits lie
    targets: Tensor  # [...]
    eta: float | Tensor
    upstream: Tensor | None  # of the loss's shape
    keywords: dict[str, Any]
    parameters: Tensor  # [...] of a weighting that has one for each token
    factors: Tensor = field(init=False)  # [N], of a token's loss in the result
    token_upstream: Tensor = field(init=False)  # [N], of the result's shape or its one entry, for each token

    def __post_init__(self) -> None:
        valid = self.flat_targets != self.case.options.ignore_index
        weights = self.keywords.get("token_weights")
        weights = torch.ones_like(valid, dtype=FLOAT64) if weights is None else weights.reshape(-1).double()
        weights = torch.where(valid, weights, 0.0)
        divisor = 1.0
        if self.case.reduction == "mean":
            divisor = float(self.keywords.get("num_items_in_batch", weights.sum())) or 1.0
        self.factors = weights / divisor
        self.token_upstream = self.upstream.double().expand(self.targets.shape).reshape(-1)

    @property
    def flat_logits(self) -> Tensor:
        """The logits as [N, V], detached."""
        return self.logits.detach().reshape(-1, self.logits.shape[-1])

    @property
    def flat_targets(self) -> Tensor:
        """The targets as [N]."""
        return self.targets.reshape(-1)

    @property
    def flat_eta(self) -> Tensor:
        """Eta of each token, [N] float64."""
        return torch.as_tensor(self.eta, dtype=FLOAT64).expand(self.targets.shape).reshape(-1)

    def to(self, device: str) -> Inputs:
        """The same on another device."""
        if device == "cpu":
            return self
        memory = self.memory.to(device)
        logits = memory.as_strided(self.logits.shape, self.logits.stride(), self.logits.storage_offset())
        moved = {name: move(value, device) for name, value in self.keywords.items()}
        if "weighting" in moved:
            moved["weighting"] = of_tokens(self.case.weighting, self.parameters.to(device))
        return Inputs(
            self.case, computed(logits), memory, move(self.targets, device), move(self.eta, device),
            move(self.upstream, device), moved, self.parameters,
        )  # fmt: skip

    def oracle(self) -> TokenResults:
        """Each token's results: in float64, for float64 logits in the longest type there is."""
        dtype = np.dtype(np.longdouble if self.case.dtype == FLOAT64 else np.float64)
        targets = self.flat_targets.cpu().numpy()
        return token_results(
            to_numpy(self.flat_logits, dtype), targets, to_numpy(self.flat_eta, dtype), self.case.options,
            self.oracle_weighting(),
        )  # fmt: skip

    def oracle_weighting(self) -> Any:
        """The f of the tokens in NumPy."""
        return oracle_of(self.case.weighting, self.parameters)

    def plain_weighting(self) -> Any:
        """The f of the tokens as one would write it in PyTorch."""
        return plain_of(self.case.weighting, self.parameters)


def move(value: Any, device: str) -> Any:
    """A tensor on another device; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


class _Computed(torch.autograd.Function):
    """A tensor of the graph that is no leaf, and lies where another tensor does."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, values: Tensor) -> Tensor:
        return values.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def computed(values: Tensor) -> Tensor:
    """The values where they lie, as if a model had computed them: they have a gradient, and may be overwritten."""
    return _Computed.apply(torch.zeros((), device=values.device, requires_grad=True), values)


def build(case: Case) -> Inputs:
    """The tensors of a case, the same on every call."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    *leading, _ = case.shape
    targets = _targets(case, generator)
    values = _logits(case, targets, generator)
    accumulate = accumulate_dtype(case.dtype)
    keywords: dict[str, Any] = {**case.options._asdict(), **MODES[case.mode], "reduction": case.reduction}
    if case.token_weights:
        weights = torch.rand(leading, generator=generator) * 2
        # What stands at an ignored token must not matter.
        keywords["token_weights"] = torch.where(targets == case.options.ignore_index, torch.nan, weights)
    count = float(targets.numel()) + 0.5
    numbers = {"int": int(count), "float": count, "tensor": torch.tensor(count), "int_tensor": torch.tensor(int(count))}
    if case.num_items != "none":
        keywords["num_items_in_batch"] = numbers[case.num_items]
    shape = leading if case.reduction == "none" else []
    upstreams = {
        "per_token": lambda: torch.randn(leading, generator=generator).to(accumulate) * 3,
        "expanded": lambda: torch.tensor(-1.3, dtype=accumulate).expand(leading),
    }
    upstream = upstreams.get(case.upstream, lambda: torch.full(shape, float(case.upstream), dtype=accumulate))()
    logits, memory = _laid_out(values, case.layout)
    eta = _eta(case.eta, leading, generator)
    parameters = parameters_of_tokens(leading, generator)
    if case.weighting != "probability":
        keywords["weighting"] = of_tokens(case.weighting, parameters)
    return Inputs(case, computed(logits), memory, targets, eta, upstream, keywords, parameters)


def _targets(case: Case, generator: torch.Generator) -> Tensor:
    *leading, vocab_size = case.shape
    targets = torch.randint(vocab_size, leading, generator=generator, dtype=torch.int64)
    if case.ignored == "all":
        targets.fill_(case.options.ignore_index)
    elif case.ignored == "some" and targets.numel() > 2:
        targets.view(-1)[1::4] = case.options.ignore_index
    return targets.to(case.target_dtype)


def _logits(case: Case, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Values of the case's kind, in its type; rows of ignored tokens hold NaN, which nobody may read."""
    *_, vocab_size = case.shape
    values = torch.randn(case.shape, generator=generator, dtype=torch.float64) * 2
    valid = targets != case.options.ignore_index
    index = torch.where(valid, targets, 0).long().unsqueeze(-1)
    if case.kind == "confident":
        # From q = 0.5 to 1 - 1e-13: where p - 1 has fewer and fewer digits, and then none.
        height = torch.linspace(4, 30, max(targets.numel(), 1), dtype=torch.float64).reshape(targets.shape)
        values = (values * 0.1).scatter(-1, index, height.unsqueeze(-1))
    elif case.kind in ("masked", "first_block_masked"):
        masked = torch.rand(case.shape, generator=generator) < 0.2
        if case.kind == "first_block_masked":
            masked[..., : vocab_size - vocab_size // 5] = True
        # The target keeps its logit.
        values = values.masked_fill(masked.scatter(-1, index, False), -torch.inf)
    elif case.kind == "target_masked":
        height = torch.where(torch.arange(targets.numel()).reshape(targets.shape) % 2 == 0, -torch.inf, 1.0).double()
        values = values.scatter(-1, index, height.unsqueeze(-1))
    elif case.kind == "shifted":
        values = values + 1e5
    elif case.kind == "ties":
        values = torch.full_like(values, 1.25)
    elif case.kind == "flat":
        values = values * 1e-3
    elif case.kind == "wide":
        values = values * 100
    elif case.kind == "nonfinite_rows":
        # One row each: all -inf; a NaN or +inf in the first block, in a later one, at the end.
        values.view(-1, vocab_size)[0] = -torch.inf
        for row, column, value in (
            (2, 1, torch.nan), (3, vocab_size // 2, torch.nan), (4, vocab_size - 1, torch.nan),
            (6, 1, torch.inf), (7, vocab_size // 2, torch.inf), (8, vocab_size - 1, torch.inf),
        ):  # fmt: skip
            values.view(-1, vocab_size)[row, column] = value
    values = values.to(case.dtype)
    return values.masked_fill(~valid.unsqueeze(-1), torch.nan)


def _laid_out(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The values in memory as `layout` says: a view, and the memory around it, which holds NaN beside the values."""
    *leading, vocab_size = values.shape
    nan = torch.nan
    if layout == "contiguous":
        memory = view = torch.empty_like(values)
    elif layout == "sliced":
        memory = values.new_full((leading[0], leading[1] + 1, vocab_size), nan)
        view = memory[:, :-1]
    elif layout == "transposed":
        memory = values.new_full((leading[1], leading[0], vocab_size), nan)
        view = memory.transpose(0, 1)
    elif layout == "sliced_columns":
        # Rows start at odd addresses and end inside the row of the memory.
        memory = values.new_full((*leading, vocab_size + 3), nan)
        view = memory[..., 1:-2]
    elif layout == "every_other_column":
        memory = values.new_full((*leading, 2 * vocab_size), nan)
        view = memory[..., ::2]
    elif layout == "unaligned":
        memory = values.new_full((values.numel() + 1,), nan)
        view = memory[1:].view(values.shape)
    elif layout == "scattered":
        # No two strides reach these rows.
        memory = values.new_full((leading[0], 2 * leading[1], 2 * leading[2], vocab_size), nan)
        view = memory[:, ::2, 1::2]
    else:
        raise ValueError(layout)
    return view.copy_(values).detach(), memory


def _eta(eta: str, leading: list[int], generator: torch.Generator) -> float | Tensor:
    """A number, or a tensor: 0-d, one entry a token, or one a row of tokens."""
    if eta == "0d":
        return torch.tensor(0.3)
    if eta == "0d_bfloat16":
        return torch.tensor(0.01, dtype=BFLOAT16)
    if eta == "0d_float64":
        return torch.tensor(0.3, dtype=FLOAT64)
    if eta == "per_token":
        return torch.rand(leading, generator=generator)
    if eta == "column":
        return torch.rand((*leading[:-1], 1), generator=generator)
    return float(eta)
