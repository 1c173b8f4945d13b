"""The backend `cpu`: the native kernels of `csrc/cpu`."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from mixce_kernels.backends import cpu_shards, native
from mixce_kernels.backends.results import EntropyGrad, Results
from mixce_kernels.checks import raise_bad_target
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions
from mixce_kernels.reduction import Reduction

if native.MISSING is None:
    from mixce_kernels import _C

# Below this many logits a second thread costs more than it saves.
_LOGITS_PER_THREAD = 1 << 15
# A gradient larger than this would push everything else out of the caches.
_STREAMING_STORES_BYTES = 1 << 24

checks_targets = True
shards = cpu_shards


def unavailable(logits: Tensor) -> str | None:
    """Why the native kernels cannot serve these logits."""
    if native.MISSING is not None:
        return native.MISSING
    if logits.device.type != "cpu":
        return f"it runs on CPU tensors, and the logits are on {logits.device}"
    return None


def forward(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    mixture: Mixture,
    options: TokenOptions,
    reduction: Reduction,
    results: Results,
    token_scale: Tensor | None,  # [] or [...]
    grad_logits: Tensor | None,  # [..., V]
    temperature: Tensor | None = None,  # [...]
    *,
    may_split: bool = True,
) -> None:
    """Loss, state and statistics, with the gradient where `grad_logits` is given: see `Backend`."""
    targets = targets.contiguous()
    call, _kept = native.forward_call(
        logits=logits,
        targets=targets,
        mixture=mixture,
        options=options,
        reduction=reduction,
        results=results,
        token_scale=token_scale,
        grad_logits=grad_logits,
        temperature=temperature,
    )
    bad_row = _C.cpu_forward(call, _launch(logits, grad_logits))
    if bad_row >= 0:
        raise_bad_target(bad_row, targets, options.ignore_index, logits.shape[-1])


def reduce(
    targets: Tensor,  # [...]
    ignore_index: int,
    reduction: Reduction,
    losses: Tensor | None,  # [...]
    loss: Tensor | None,  # [] or [...]
    token_scale: Tensor | None,  # [] or [...]
) -> None:
    """The loss of the tokens' losses, and their factors in it: see `Backend`."""
    targets = targets.contiguous()
    params, _kept = native.reduction_params(
        targets=targets,
        ignore_index=ignore_index,
        reduction=reduction,
        losses=losses,
        loss=loss,
        token_scale=token_scale,
    )
    _C.cpu_reduce(params)


def logits_grad(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    state: Tensor,  # [STATE_WIDTH, ...]
    grad_loss: Tensor | None,  # [] or [...]
    token_scale: Tensor | None,  # [] or [...]
    options: TokenOptions,
    grad_logits: Tensor,  # [..., V]
    temperature: Tensor | None = None,  # [...]
    entropy: EntropyGrad | None = None,
) -> None:
    """The gradient from the state of the forward: see `Backend`."""
    rows, _kept = native.grad_params(
        logits=logits,
        targets=targets,
        state=state,
        grad_loss=grad_loss,
        token_scale=token_scale,
        options=options,
        grad_logits=grad_logits,
        temperature=temperature,
        entropy=entropy,
    )
    _C.cpu_logits_grad(rows, _launch(logits, grad_logits))


def scale_rows_(
    grad_logits: Tensor,  # [..., V]
    grad_loss: Tensor,  # [] or [...]
    targets: Tensor | None,  # [...]
    ignore_index: int,
) -> None:
    """Scales the rows of a gradient in place: see `Backend`."""
    rows, _kept = native.scale_params(
        grad_logits=grad_logits, grad_loss=grad_loss, targets=targets, ignore_index=ignore_index
    )
    _C.cpu_scale_rows(rows, _launch(grad_logits, grad_logits))


def isa() -> str:
    """The instruction set in use: the best of this machine, or `MIXCE_CPU_ISA` of the environment.

    Raises:
        RuntimeError: `MIXCE_CPU_ISA` names one that this machine does not run.
    """
    # Asked twice, since a miss of `get` takes a microsecond.
    if os.environ.get("MIXCE_CPU_ISA"):
        return _checked_isa(os.environ["MIXCE_CPU_ISA"])
    return _supported_isas()[0]


@functools.cache
def _supported_isas() -> list[str]:
    return list(_C.supported_isas())


def _checked_isa(name: str) -> str:
    if name not in _supported_isas():
        raise RuntimeError(f"expected MIXCE_CPU_ISA to be one of {', '.join(_supported_isas())}, got {name!r}")
    return name


def _launch(logits: Tensor, grad_logits: Tensor | None) -> _C.CpuLaunch:
    n_logits = logits.numel()
    streaming_stores = (
        grad_logits is not None
        and grad_logits is not logits
        and n_logits * logits.element_size() > _STREAMING_STORES_BYTES
    )
    threads = n_logits // _LOGITS_PER_THREAD
    return _cpu_launch(isa(), min(torch.get_num_threads(), threads) if threads > 1 else 1, streaming_stores)


@functools.lru_cache(maxsize=1024)
def _cpu_launch(isa: str, threads: int, streaming_stores: bool) -> _C.CpuLaunch:
    return _C.cpu_launch(isa=isa, threads=threads, streaming_stores=streaming_stores)
