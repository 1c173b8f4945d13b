"""The backend `cuda`: the CUDA kernels of `csrc/cuda`, on the logits' device and its current stream."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mixce_kernels.backends import cuda_shards, native
from mixce_kernels.backends.cuda_launch import (
    MAX_CLUSTER,
    VECTOR_BYTES,
    Device,
    RowLaunch,
    forward_launch,
    rows_launch,
)
from mixce_kernels.backends.devices import device_index, on_device, unsuited_to_cuda
from mixce_kernels.backends.layout import aligned_alike, reachable_layout
from mixce_kernels.backends.results import EntropyGrad, Results
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions
from mixce_kernels.reduction import Reduction

if native.HAS_CUDA:
    from mixce_kernels import _C

_MIN_ARCH = 80
# Blocks of a grid are counted in 31 bits, and a row may have several; so are columns, some past a row's end included.
_MAX_ROWS = (2**31 - 1) // MAX_CLUSTER
_MAX_VOCAB_SIZE = 2**30

checks_targets = False
shards = cuda_shards


def unavailable(logits: Tensor) -> str | None:
    """Why the CUDA kernels cannot serve these logits."""
    if native.MISSING is not None:
        return native.MISSING
    if not native.HAS_CUDA:
        return "the native extension was built without CUDA; reinstall mixce_kernels where nvcc is found"
    reason = unsuited_to_cuda(logits, "the logits") or _device_unsuited(device_index(logits))
    if reason is not None:
        return reason
    n_rows, vocab_size = logits.shape[:-1].numel(), logits.shape[-1]
    if n_rows > _MAX_ROWS or vocab_size > _MAX_VOCAB_SIZE:
        return f"it takes at most {_MAX_ROWS} rows of {_MAX_VOCAB_SIZE} logits, and these are {n_rows} of {vocab_size}"
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
    targets, results = targets.contiguous(), results.with_losses(targets)
    layout = reachable_layout(logits)
    dtype = native.DTYPES[logits.dtype]
    state_bytes = _C.cuda_state_bytes(dtype)
    device = _device(device_index(logits))
    launch = forward_launch(
        layout.number,
        logits.shape[-1] * logits.element_size(),
        state_bytes,
        # Rows are split where they are fewer than these.
        device if may_split else device._replace(multiprocessors=0),
        with_grad=grad_logits is not None,
        aligned_alike=grad_logits is not None
        and aligned_alike(logits, layout, grad_logits, reachable_layout(grad_logits), VECTOR_BYTES),
    )
    call, _kept = native.forward_call(
        logits=logits,
        targets=targets,
        mixture=mixture,
        options=options,
        reduction=reduction,
        results=results,
        token_scale=token_scale,
        grad_logits=None if launch.grad_apart else grad_logits,
        temperature=temperature,
    )
    partials = None
    if launch.n_partials > 0:
        size = launch.n_partials * _C.cuda_partial_bytes(dtype)
        partials = torch.empty(size, dtype=torch.uint8, device=logits.device)
    with on_device(logits):
        _C.cuda_forward(call, _launch(logits, launch.rows, state_bytes, partials))
    if launch.grad_apart:
        assert grad_logits is not None
        assert results.state is not None
        logits_grad(logits, targets, results.state, None, token_scale, options, grad_logits, temperature)


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
    with on_device(targets):
        _C.cuda_reduce(params, _launch(targets, RowLaunch(1), 0))


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
    with on_device(logits):
        _C.cuda_logits_grad(rows, _split_launch(logits))


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
    with on_device(grad_logits):
        _C.cuda_scale_rows(rows, _split_launch(grad_logits))


@torch.compiler.assume_constant_result
def _device_unsuited(index: int) -> str | None:
    """Why the kernels cannot run on a device; a compiler, which cannot look into the extension, takes it as it is."""
    try:
        arch, code_arch, *_ = _C.cuda_device(index)
    except RuntimeError as error:
        return str(error)
    capability = f"cuda:{index} has {arch // 10}.{arch % 10}"
    if arch < _MIN_ARCH:
        return f"it needs compute capability 8.0 or newer, and {capability}"
    if code_arch == 0:
        return f"it was built for other compute capabilities (MIXCE_CUDA_ARCHS) than {capability}"
    return None


@functools.cache
def _device(index: int) -> Device:
    _, *facts = _C.cuda_device(index)
    return Device(*facts)


def _split_launch(logits: Tensor) -> _C.CudaLaunch:
    row_bytes = logits.shape[-1] * logits.element_size()
    launch = rows_launch(reachable_layout(logits).number, row_bytes, _device(device_index(logits)))
    return _launch(logits, launch, _C.cuda_state_bytes(native.DTYPES[logits.dtype]))


def _launch(logits: Tensor, launch: RowLaunch, state_bytes: int, partials: Tensor | None = None) -> _C.CudaLaunch:
    return _C.cuda_launch(
        device=device_index(logits),
        stream=torch.cuda.current_stream(logits.device).cuda_stream if logits.is_cuda else 0,
        parts=launch.parts,
        shared_bytes=state_bytes + launch.held_bytes,
        from_shared=launch.held_bytes > 0,
        partials=0 if partials is None else partials.data_ptr(),
    )
