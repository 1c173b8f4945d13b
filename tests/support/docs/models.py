"""What the documentation's pages take for granted: a small model and its plain losses, tokens, a process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixce_kernels import mixce_loss_reference

VOCAB_SIZE = 29
WIDTH = 8


class Model(nn.Module):
    """Logits [B, T, V] of tokens [B, T], each position by itself; some targets are probable, some are not."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Embedding(VOCAB_SIZE, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.lm_head = nn.Linear(WIDTH, VOCAB_SIZE, bias=bias)
        # By a generator of its own: the same with and without a bias.
        nn.init.normal_(self.lm_head.weight, std=3.0, generator=torch.Generator().manual_seed(4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.backbone(tokens))


def new_model(dtype: torch.dtype, bias: bool = True) -> Model:
    torch.manual_seed(1)
    return Model(bias).to(dtype)


def new_tokens(rows: int = 4, length: int = 9, low: int = 0) -> Tensor:
    """[rows, length], the same every time: every other token is the one that `new_model` finds most probable."""
    tokens = torch.randint(low, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(2))
    model = new_model(torch.float64, bias=False)
    for position in range(1, length, 2):
        tokens[:, position] = model(tokens[:, position - 1])[:, low:].argmax(-1) + low
    return tokens


def new_targets(tokens: Tensor) -> Tensor:
    """The tokens, some of which are ignored: more in one row than in another."""
    targets = tokens.clone()
    targets[0, 1:] = targets[1, ::3] = -100
    return targets


@contextmanager
def group_of_one() -> Iterator[Any]:
    """A process group whose only rank is this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def shifted_loss(tokens: Tensor, eta: float = 0.5) -> Callable[[nn.Module], Tensor]:
    """The plain loss of a model's next tokens."""
    return lambda model: mixce_loss_reference(model(tokens)[:, :-1], tokens[:, 1:], eta)


def mean_of_all(tokens: list[Tensor], targets: list[Tensor], eta: float) -> Callable[[nn.Module], Tensor]:
    """One mean over the tokens of all micro-batches."""

    def loss_of(model: nn.Module) -> Tensor:
        logits = torch.cat([model(some).flatten(0, 1) for some in tokens])
        return mixce_loss_reference(logits, torch.cat([some.flatten() for some in targets]), eta)

    return loss_of


def mean_of_means(tokens: list[Tensor], targets: list[Tensor], eta: float) -> Callable[[nn.Module], Tensor]:
    """What accumulation makes of means over micro-batches of different numbers of tokens: not `mean_of_all`."""

    def loss_of(model: nn.Module) -> Tensor:
        means = [mixce_loss_reference(model(some), wanted, eta) for some, wanted in zip(tokens, targets, strict=True)]
        return torch.stack(means).mean()

    return loss_of
