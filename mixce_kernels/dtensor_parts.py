"""The parts of `DTensor` arguments that a rank holds, and `DTensor`s of what it makes of them.

Logits [..., V] may be sharded over one dimension of the mesh by the vocabulary, and over others by their leading
dimensions. Whatever else is a tensor has one entry a token and is placed as the tokens are: a plain tensor is taken to
be the same, whole tensor on every rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from mixce_kernels.autocast import autocast_dtype
from mixce_kernels.checks import check_linear_tensors, check_tensors
from mixce_kernels.parallel.shard import Sharding


class LogitsParts(NamedTuple):
    """A rank's part of logits that are a DTensor."""

    logits: Tensor
    tokens: Tokens
    sharding: Sharding | None  # None: the rank has every column of its tokens
    version: int | None  # of the part, which may be overwritten; None: it is not

    def tell_overwritten(self, logits: Tensor) -> None:
        """Tells autograd that the whole logits have changed, where their part has since it was taken."""
        if self.version is not None and self.logits._version != self.version:
            increment_version(logits)


class LinearParts(NamedTuple):
    """A rank's parts of hidden states and a weight that are DTensors."""

    tensors: tuple[Tensor, Tensor, Tensor | None]  # hidden states, weight, bias
    tokens: Tokens
    sharding: Sharding | None  # None: the rank has the whole weight


def parts_of_logits(logits: Any, targets: Tensor, named: str, *, inplace_backward: bool) -> LogitsParts:
    """The rank's part of logits [..., V] that are a DTensor; `named` are the arguments that may be one beside them."""
    if not isinstance(logits, DTensor):
        raise TypeError(f"expected logits to be a DTensor where {named} are, got a plain tensor")
    check_tensors(logits, targets)
    split = Split.of("logits", logits.device_mesh, logits.placements, logits.dim())
    overwrites = inplace_backward and not torch.compiler.is_compiling()
    local = _Overwritable.apply(logits) if overwrites else logits.to_local()
    sharding = None if split.vocab is None else split.sharding(logits.shape[-1], local.shape[-1])
    return LogitsParts(local, Tokens(split, logits.shape[:-1]), sharding, local._version if overwrites else None)


def parts_of_hidden(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
) -> LinearParts:
    """The rank's parts of hidden states, weight and bias, all DTensors."""
    hidden, weight, *others = tensors = _distributed(hidden=hidden, weight=weight, bias=bias)
    mesh = hidden.device_mesh
    # Of the whole tensors: what does not fit must not show on some ranks alone, whom the others would wait for.
    check_linear_tensors(hidden, weight, bias, targets, autocast_dtype(hidden))
    held = Split.of("weight", mesh, weight.placements, 2, vocab_dim=0)
    if held.leading:
        raise ValueError(f"expected a weight that is sharded by its rows alone, got {_shown(weight.placements)}")
    for one in others:
        if one.placements != weight.placements:
            shown = f"{_shown(weight.placements)}, got {_shown(one.placements)}"
            raise ValueError(f"expected bias placed as weight, {shown}")
    placements = list(hidden.placements)
    if held.vocab is not None:
        # Each rank of the group multiplies all of its hidden states; their gradient goes back as they came.
        placements[held.vocab] = Replicate()
        hidden = hidden.redistribute(placements=placements)
    split = Split.of("hidden", mesh, placements, hidden.dim())
    if split.vocab is not None:
        raise ValueError(f"expected hidden states whose last dimension is whole, got {_shown(placements)}")
    # Ranks with other tokens have other parts of the weight's gradient.
    grad_placements = [Partial() if dim in split.leading else one for dim, one in enumerate(weight.placements)]
    local_weight, *local_bias = (
        one.redistribute(placements=one.placements).to_local(grad_placements=grad_placements) for one in tensors[1:]
    )
    sharding = None if held.vocab is None else held.sharding(weight.shape[0], local_weight.shape[0])
    local = (hidden.to_local(), local_weight, local_bias[0] if local_bias else None)
    return LinearParts(local, Tokens(split, hidden.shape[:-1]), sharding)


class _Overwritable(torch.autograd.Function):
    """A rank's part of logits, as a tensor that may be written to: autograd is then told that the logits have changed.

    It refuses writing to what `DTensor.to_local` returns, and a part has other versions than its whole.
    """

    @staticmethod
    def forward(ctx: Any, logits: DTensor) -> Tensor:
        local = logits.to_local().data
        ctx.logits = logits
        # Not the result itself, which refers to this node: no one would free the two.
        ctx.same_version, ctx.version = local.detach(), local._version
        return local

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> DTensor:
        logits = ctx.logits
        if ctx.same_version._version != ctx.version:
            increment_version(logits)
        return DTensor.from_local(
            grad, logits.device_mesh, logits.placements, run_check=False, shape=logits.shape, stride=logits.stride()
        )


class Split(NamedTuple):
    """Which dimension of the mesh splits the vocabulary, and which split leading dimensions of the tokens."""

    mesh: DeviceMesh
    vocab: int | None
    leading: dict[int, int]  # of the mesh -> of the tensor

    @classmethod
    def of(cls, name: str, mesh: DeviceMesh, placements: Any, n_dims: int, vocab_dim: int = -1) -> Split:
        """From the placements of a tensor whose dimension `vocab_dim` is the vocabulary."""
        vocab, leading = None, {}
        for dim, placement in enumerate(placements):
            if type(placement) is Replicate:
                continue
            if type(placement) is not Shard:
                raise ValueError(f"expected {name} that are replicated or sharded, got {_shown(placements)}")
            if placement.dim % n_dims != vocab_dim % n_dims:
                leading[dim] = placement.dim % n_dims
            elif vocab is None:
                vocab = dim
            else:
                raise ValueError(
                    f"expected {name} whose vocabulary is sharded over one dimension of the mesh, "
                    f"got {_shown(placements)}"
                )
        return cls(mesh, vocab, leading)

    def sharding(self, vocab_size: int, columns: int) -> Sharding:
        """The columns of this rank, so many of the vocabulary's: DTensor splits as `torch.chunk` does.

        Raises:
            ValueError: the rank has another number of columns than that, and so has one rank more at least.
        """
        assert self.vocab is not None
        chunk = -(-vocab_size // self.mesh.size(self.vocab))
        start = min(self.mesh.get_local_rank(self.vocab) * chunk, vocab_size)
        expected = min(chunk, vocab_size - start)
        if columns != expected:
            raise ValueError(f"expected {expected} of {vocab_size} columns here, as DTensor splits them, got {columns}")
        return Sharding(self.mesh.get_group(self.vocab), start, vocab_size, check_group=False)


class Tokens:
    """Tensors with one entry a token: from the whole to the rank's part, and back."""

    def __init__(self, split: Split, shape: torch.Size) -> None:
        self.split = split
        self.shape = shape
        self.placements: list[Placement] = [Replicate()] * split.mesh.ndim
        for dim, tensor_dim in split.leading.items():
            self.placements[dim] = Shard(tensor_dim)

    def local(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the tokens' shape [...] that belongs to this rank."""
        mesh = self.split.mesh
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        elif tensor.device_mesh != mesh:
            raise ValueError(f"expected all DTensors on one mesh, {mesh}, got {tensor.device_mesh}")
        return tensor.redistribute(placements=self.placements).to_local()

    def whole(self, local: Tensor) -> DTensor:
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.split.mesh, self.placements, run_check=False, shape=self.shape, stride=stride
        )


def _distributed(**named: Tensor | None) -> list[DTensor]:
    """Those that are not None; raises unless all are DTensors on one mesh."""
    found: list[DTensor] = []
    for name, one in named.items():
        if one is None:
            continue
        if not isinstance(one, DTensor):
            raise TypeError(
                f"expected {', '.join(named)} to be all DTensors or all plain tensors, got a plain {name} (the "
                "parameters of a module under FSDP are plain within its forward)"
            )
        if found and one.device_mesh != found[0].device_mesh:
            raise ValueError(f"expected {name} on the mesh {found[0].device_mesh}, got {one.device_mesh}")
        found.append(one)
    return found


def _shown(placements: Any) -> str:
    return ", ".join(map(str, placements))
