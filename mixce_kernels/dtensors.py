"""The losses of `DTensor` arguments: each rank's part by the functions of plain tensors, the placements by PyTorch.

Logits [..., V] may be sharded over one dimension of the mesh by the vocabulary, and over others by their leading
dimensions. Whatever else is a tensor has one entry a token and is placed as the tokens are: a plain tensor is taken to
be the same, whole tensor on every rank. The loss is a `DTensor`: replicated, or with "none" placed as the tokens are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from mixce_kernels import backends
from mixce_kernels.autocast import autocast_dtype
from mixce_kernels.checks import check_linear_tensors, check_targets_in_range, check_tensors, check_values
from mixce_kernels.linear import loss as linear_loss
from mixce_kernels.logits import loss as logits_loss
from mixce_kernels.logits.overwriting import check_overwritable
from mixce_kernels.mixture import check_weighting
from mixce_kernels.options import LinearOptions, LossOptions, check_eta
from mixce_kernels.parallel import loss as parallel_loss
from mixce_kernels.parallel.collectives import sum_over, total
from mixce_kernels.parallel.shard import Sharding
from mixce_kernels.stats import MixCEStats
from mixce_kernels.weightings import is_built_in


def mixce_loss(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    eta: float | Tensor,
    options: LossOptions,
) -> Any:
    """`fused_mixce_loss` of logits that are a DTensor."""
    options.for_tokens()
    if options.inplace_backward:
        check_overwritable(logits)
    if not isinstance(logits, DTensor):
        raise TypeError("expected logits to be a DTensor where targets, eta or token_weights are, got a plain tensor")
    check_tensors(logits, targets)
    split = _Split.of("logits", logits.device_mesh, logits.placements, logits.dim())
    tokens = _Tokens(split, logits.shape[:-1])
    tokens.check_values(targets, eta, options, logits.shape[-1], logits.to_local())
    eta, options = tokens.local_options(targets, eta, options)
    overwrites = options.inplace_backward and not torch.compiler.is_compiling()
    local = _Overwritable.apply(logits) if overwrites else logits.to_local()
    version = local._version if overwrites else 0
    if split.vocab is None:
        found = logits_loss.mixce_loss(local, tokens.local(targets), eta, options)
    else:
        sharding = split.sharding(logits.shape[-1], local.shape[-1])
        found = parallel_loss.mixce_loss(local, tokens.local(targets), eta, options, sharding)
    if overwrites and local._version != version:
        increment_version(logits)
    return tokens.result(found, options)


def linear_mixce_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...]
    eta: float | Tensor,
    options: LossOptions,
    linear: LinearOptions,
) -> Any:
    """`fused_linear_mixce_loss` of hidden states and a weight that are DTensors."""
    options.for_tokens()
    hidden, weight, *others = distributed = _distributed(hidden=hidden, weight=weight, bias=bias)
    mesh = hidden.device_mesh
    # Of the whole tensors: what does not fit must not show on some ranks alone, whom the others would wait for.
    check_linear_tensors(hidden, weight, bias, targets, autocast_dtype(hidden))
    held = _Split.of("weight", mesh, weight.placements, 2, vocab_dim=0)
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
    split = _Split.of("hidden", mesh, placements, hidden.dim())
    if split.vocab is not None:
        raise ValueError(f"expected hidden states whose last dimension is whole, got {_shown(placements)}")
    tokens = _Tokens(split, hidden.shape[:-1])
    tokens.check_values(targets, eta, options, weight.shape[0], hidden.to_local())
    eta, options = tokens.local_options(targets, eta, options)
    # Ranks with other tokens have other parts of the weight's gradient.
    grad_placements = [Partial() if dim in split.leading else one for dim, one in enumerate(weight.placements)]
    local_weight, *local_bias = (
        one.redistribute(placements=one.placements).to_local(grad_placements=grad_placements) for one in distributed[1:]
    )
    tensors = (hidden.to_local(), local_weight, local_bias[0] if local_bias else None, tokens.local(targets))
    if held.vocab is None:
        found = linear_loss.linear_mixce_loss(*tensors, eta, options, linear)
    else:
        sharding = held.sharding(weight.shape[0], local_weight.shape[0])
        found = parallel_loss.linear_mixce_loss(*tensors, eta, options, linear, sharding)
    return tokens.result(found, options)


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


class _Split(NamedTuple):
    """Which dimension of the mesh splits the vocabulary, and which split leading dimensions of the tokens."""

    mesh: DeviceMesh
    vocab: int | None
    leading: dict[int, int]  # of the mesh -> of the tensor

    @classmethod
    def of(cls, name: str, mesh: DeviceMesh, placements: Any, n_dims: int, vocab_dim: int = -1) -> _Split:
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


class _Tokens:
    """Tensors with one entry a token: from the whole to the rank's part, and back."""

    def __init__(self, split: _Split, shape: torch.Size) -> None:
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

    def check_values(
        self, targets: Tensor, eta: float | Tensor, options: LossOptions, vocab_size: int, like_logits: Tensor
    ) -> None:
        """Checks the values of all tokens where one process does: no rank may raise alone, awaited by the others."""
        if not self.split.leading or torch.compiler.is_compiling():
            return
        targets = targets.full_tensor() if isinstance(targets, DTensor) else targets
        eta = eta.full_tensor() if isinstance(eta, DTensor) else eta
        if options.validate:
            check_values(targets, eta, options.weighting, options.ignore_index, vocab_size)
        elif like_logits.device.type == "cpu" and backends.checks_targets(
            backends.resolve(options.backend, like_logits)
        ):
            check_targets_in_range(targets, options.ignore_index, vocab_size)

    def local_options(
        self, targets: Tensor, eta: float | Tensor, options: LossOptions
    ) -> tuple[float | Tensor, LossOptions]:
        """Eta and the options for this rank's part: what "mean" divides by is that of all tokens."""
        if isinstance(eta, DTensor) and eta.shape != targets.shape:
            # A DTensor does not broadcast a dimension that is sharded.
            eta = eta.redistribute(placements=[Replicate()] * eta.device_mesh.ndim)
        eta = check_eta(eta, targets)
        weighting = check_weighting(options.weighting, targets)
        if is_built_in(weighting):
            weighting = weighting.on_tokens(targets, self.local)
        options.check_reduction(targets)
        weights, divisor = options.token_weights, options.num_items_in_batch
        weights = None if weights is None else self.local(weights.detach())
        if isinstance(divisor, DTensor):
            divisor = divisor.full_tensor()
        elif options.reduction == "mean" and divisor is None and self.split.leading:
            valid = self.local(targets) != options.ignore_index
            divisor = torch.where(valid, 1.0 if weights is None else weights, 0.0).sum(dtype=torch.float64)
            for dim in self.split.leading:
                divisor = total(divisor, self.split.mesh.get_group(dim))
        options = options._replace(token_weights=weights, num_items_in_batch=divisor, weighting=weighting)
        return self.local(eta) if isinstance(eta, Tensor) else eta, options

    def result(self, found: Any, options: LossOptions) -> Any:
        """What a function returned for this rank's part, as DTensors of the whole."""
        loss, stats = found if options.return_stats else (found, None)
        mesh = self.split.mesh
        if options.reduction == "none":
            loss = self._whole(loss)
        else:
            for dim in self.split.leading:
                loss = sum_over(mesh.get_group(dim), loss)
            loss = DTensor.from_local(loss, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return loss if stats is None else (loss, MixCEStats(*map(self._whole, stats)))

    def _whole(self, local: Tensor) -> DTensor:
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
