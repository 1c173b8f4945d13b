"""What a caller may ask for, checked once: every argument of the public functions passes through here."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGET_DTYPES = (torch.int64, torch.int32)
REDUCTIONS = ("none", "mean", "sum")
PATHS = ("chunks", "tiles")
# A schedule computed in floating point ends this far outside of [0, 1] at most.
ETA_ROUNDING = 1e-6


class TokenOptions(NamedTuple):
    """The options that change a token's own numbers: the kernels know these and no others."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of arithmetic, loss and statistics for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_token_options(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, logit_scale: float
) -> TokenOptions:
    """The options as exact Python numbers.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is outside its range.
    """
    if not isinstance(ignore_index, numbers.Integral):
        raise TypeError(f"expected ignore_index to be an int, got {_describe(ignore_index)}")
    ignore_index = concrete(int(ignore_index))
    _check_int64("ignore_index", ignore_index)
    label_smoothing = _number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"expected label_smoothing in [0, 1], got {label_smoothing}")
    z_loss = _number("z_loss", z_loss)
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"expected z_loss to be finite and not negative, got {z_loss}")
    if softcap is not None:
        softcap = _number("softcap", softcap)
        if not 0.0 < softcap < math.inf:
            raise ValueError(f"expected softcap to be None or a positive finite number, got {softcap}")
    logit_scale = _number("logit_scale", logit_scale)
    if not 0.0 < logit_scale < math.inf:
        raise ValueError(f"expected logit_scale to be a positive finite number, got {logit_scale}")
    return TokenOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)


def concrete(number: Any) -> Any:
    """The Python number itself, where a compiler traces it as a symbol: another number compiles anew.

    As an argument of an operator a symbol is baked into the compiled code without a guard, and later calls get the
    result of an earlier number (seen with torch 2.13; torch.nn.functional.cross_entropy's label_smoothing, too).
    """
    return guard_scalar(number) if torch.compiler.is_compiling() else number


def has_dtensor(*values: object) -> bool:
    """Whether a value is a tensor distributed over a mesh of devices."""
    if all(type(value) in (Tensor, Parameter, float, int, type(None)) for value in values):
        return False
    try:
        from torch.distributed.tensor import DTensor
    except ImportError:  # torch 2.4, or built without torch.distributed
        return False
    return any(isinstance(value, DTensor) for value in values)


def check_tensors(logits: Tensor, targets: Tensor) -> None:
    """Raises TypeError or ValueError unless logits [..., V] and targets [...] fit together."""
    _check_values_tensor("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"expected logits of shape [..., V] with V >= 1, got {list(logits.shape)}")
    _check_targets("logits", logits, targets)


def check_shard_tensors(logits_shard: Tensor, targets: Tensor) -> None:
    """Raises TypeError or ValueError unless logits [..., columns], of any number, and targets [...] fit together."""
    if has_dtensor(logits_shard, targets):
        raise TypeError("expected a rank's own columns as a plain tensor, got a DTensor, which fused_mixce_loss takes")
    _check_values_tensor("logits_shard", logits_shard)
    if logits_shard.dim() == 0:
        raise ValueError("expected logits_shard of shape [..., columns], got []")
    _check_targets("logits_shard", logits_shard, targets)


def check_sharded_call(group: object, vocab_start: int | None, vocab_size: int | None) -> None:
    """Raises ValueError where what describes a shard of the weight comes without its group, or the reverse."""
    if group is None:
        for name, value in (("vocab_start", vocab_start), ("vocab_size", vocab_size)):
            if value is not None:
                raise ValueError(f"expected group with {name}={value!r}, got None (a whole weight has no {name})")
    elif vocab_start is None:
        raise ValueError("expected vocab_start, the first of the rank's columns, with group, got None")


def check_shard_range(vocab_start: int, vocab_size: int | None) -> None:
    """Raises TypeError unless these are ints, ValueError unless a vocabulary has a column."""
    for name, value in (("vocab_start", vocab_start), ("vocab_size", vocab_size)):
        if (value is not None or name == "vocab_start") and not _is_integer(value):
            raise TypeError(f"expected {name} to be an int, got {_describe(value)}")
        if value is not None:
            _check_int64(name, value)
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"expected vocab_size to be positive, got {vocab_size}")


def check_linear_tensors(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    autocast_dtype: torch.dtype | None,
    *,
    sharded: bool = False,
) -> torch.dtype:
    """The type of the products' operands: that of all tensors, or autocast's where it is active.

    A sharded weight may have no rows.

    Raises:
        TypeError, ValueError: hidden [..., D], weight [V, D], bias [V] and targets [...] do not fit together.
    """
    _check_values_tensor("hidden", hidden)
    _check_values_tensor("weight", weight)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"expected hidden of shape [..., D] with D >= 1, got {list(hidden.shape)}")
    hidden_size = hidden.shape[-1]
    if weight.dim() != 2 or (weight.shape[0] == 0 and not sharded) or weight.shape[1] != hidden_size:
        raise ValueError(
            f"expected weight of shape [V, D] = [V, {hidden_size}] for hidden of shape {list(hidden.shape)}, "
            f"got {list(weight.shape)}"
        )
    others = {"weight": weight}
    if bias is not None:
        _check_values_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"expected bias of shape [V] = {list(weight.shape[:1])} for weight of shape {list(weight.shape)}, "
                f"got {list(bias.shape)}"
            )
        others["bias"] = bias
    # As torch.nn.functional.linear does, which leaves float64 alone.
    all_dtypes = {hidden.dtype, *(other.dtype for other in others.values())}
    autocast = autocast_dtype is not None and torch.float64 not in all_dtypes
    for name, other in others.items():
        if other.device != hidden.device:
            raise ValueError(f"expected {name} on {hidden.device} with the hidden states, got {other.device}")
        if other.dtype != hidden.dtype and not autocast:
            raise TypeError(
                f"expected {name} of hidden's {hidden.dtype} (or autocast and no float64), got {other.dtype}"
            )
    _check_targets("hidden", hidden, targets)
    return autocast_dtype if autocast and autocast_dtype is not None else hidden.dtype


def check_linear_options(max_chunk_bytes: int | None, path: str, backend: str | None, *, sharded: bool = False) -> None:
    """Raises TypeError or ValueError unless the linear loss knows the path and the budget is a positive int."""
    if max_chunk_bytes is not None:
        if not _is_integer(max_chunk_bytes):
            raise TypeError(f"expected max_chunk_bytes to be None or an int, got {_describe(max_chunk_bytes)}")
        if max_chunk_bytes <= 0:
            raise ValueError(f"expected max_chunk_bytes to be positive, got {max_chunk_bytes}")
        _check_int64("max_chunk_bytes", max_chunk_bytes)
    if path not in PATHS:
        raise ValueError(f"expected path 'chunks' or 'tiles', got {path!r}")
    if path == "tiles" and backend not in (None, "triton"):
        raise ValueError(f"expected backend 'triton' or None with path='tiles', got {backend!r}")
    if path == "tiles" and sharded:
        raise ValueError("expected path 'chunks' with a sharded weight, got 'tiles'")


def check_eta_number(eta: float) -> float:
    """Eta as a Python float; the end of [0, 1] that it misses by a rounding.

    Raises:
        TypeError: it is not a number.
        ValueError: it is outside [0, 1] by more than a rounding, or NaN.
    """
    eta = _float("eta", eta)
    if not -ETA_ROUNDING <= eta <= 1.0 + ETA_ROUNDING:
        raise ValueError(f"expected eta in [0, 1], got {eta}")
    if eta < 0.0:
        return 0.0
    return 1.0 if eta > 1.0 else eta


def check_eta(eta: float | Tensor, targets: Tensor) -> float | Tensor:
    """Eta as a Python float, or as a floating tensor of targets' shape [...] that later writes to eta do not change.

    Where a compiler traces the call a number becomes a tensor, too: data of the graph, which a schedule may change at
    every step.

    Raises:
        TypeError: eta is neither a number nor a floating tensor.
        ValueError: a number outside [0, 1], or a tensor that requires grad, lies elsewhere or does not broadcast.
    """
    if not isinstance(eta, Tensor):
        eta = check_eta_number(eta)
        if not torch.compiler.is_compiling():
            return eta
        # As a sum: `torch.full` would bake a number in that the compiler traces as a symbol.
        return (torch.zeros((), dtype=torch.float64, device=targets.device) + eta).expand(targets.shape)
    if not eta.is_floating_point():
        raise TypeError(f"expected eta to be a number or a floating tensor, got a tensor of {eta.dtype}")
    _check_constant("eta", eta)
    if eta.device != targets.device:
        raise ValueError(f"expected eta on {targets.device} with the logits, got {eta.device}")
    try:
        # A copy: the forward's weights count, also where eta is overwritten before backward.
        return (eta.clone() if torch.is_grad_enabled() else eta).expand(targets.shape)
    except RuntimeError:
        raise ValueError(
            f"expected eta to broadcast to targets of shape {list(targets.shape)}, got shape {list(eta.shape)}"
        ) from None


def check_reduction_name(reduction: str) -> None:
    """Raises ValueError unless the reduction is one of REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"expected reduction 'none', 'mean' or 'sum', got {reduction!r}")


def check_reduction(
    reduction: str, targets: Tensor, token_weights: Tensor | None, num_items_in_batch: float | Tensor | None
) -> None:
    """Raises TypeError or ValueError unless the reduction, its weights and its divisor fit together."""
    check_reduction_name(reduction)
    if token_weights is not None:
        if not isinstance(token_weights, Tensor) or not token_weights.is_floating_point():
            raise TypeError(f"expected token_weights to be a floating tensor, got {_describe(token_weights)}")
        _check_constant("token_weights", token_weights)
        if token_weights.shape != targets.shape:
            raise ValueError(
                f"expected token_weights of targets' shape {list(targets.shape)}, got {list(token_weights.shape)}"
            )
        if token_weights.device != targets.device:
            raise ValueError(f"expected token_weights on {targets.device} with the logits, got {token_weights.device}")
    if num_items_in_batch is None:
        return
    if reduction != "mean":
        raise ValueError(f"expected num_items_in_batch with reduction='mean' alone, got reduction={reduction!r}")
    if isinstance(num_items_in_batch, Tensor):
        _check_constant("num_items_in_batch", num_items_in_batch)
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                "expected num_items_in_batch to be a number or a tensor of one element, got a tensor of shape "
                f"{list(num_items_in_batch.shape)}"
            )
    elif not 0.0 <= _float("num_items_in_batch", num_items_in_batch) < math.inf:
        raise ValueError(f"expected num_items_in_batch to be finite and not negative, got {num_items_in_batch}")


def check_values(targets: Tensor, eta: float | Tensor, ignore_index: int, vocab_size: int) -> None:
    """Reads targets and eta (a host synchronisation on a GPU).

    Raises:
        IndexError: a target is neither in [0, vocab_size) nor ignore_index; names the first such row and its value.
        ValueError: an entry of eta is outside [0, 1] or NaN; or `torch.vmap` batches the tensors.
    """
    if is_batched(targets) or (isinstance(eta, Tensor) and is_batched(eta)):
        raise ValueError("expected validate=False under torch.vmap, got True")
    check_targets_in_range(targets, ignore_index, vocab_size)
    if isinstance(eta, Tensor) and not ((eta >= -ETA_ROUNDING) & (eta <= 1 + ETA_ROUNDING)).all():
        raise ValueError("expected every entry of eta in [0, 1], got one outside")


def is_batched(tensor: Tensor) -> bool:
    """Whether the tensor is a batch of `torch.vmap`, whose values no single call can read."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def check_targets_in_range(targets: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Reads the targets; raises IndexError for the first that is neither in [0, vocab_size) nor ignore_index."""
    bad = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if bad.any():
        raise_bad_target(int(bad.flatten().nonzero()[0]), targets, ignore_index, vocab_size)


def raise_bad_target(row: int, targets: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Raises the IndexError that names `row` (counted over the flattened targets) and its target."""
    value = int(targets.flatten()[row])
    raise IndexError(f"expected targets in [0, {vocab_size}) or ignore_index={ignore_index}, got {value} in row {row}")


def _check_values_tensor(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {_describe(values)}")
    if values.dtype not in LOGITS_DTYPES:
        raise TypeError(f"expected {name} of {_names(LOGITS_DTYPES)}, got {values.dtype}")
    if type(values) in (Tensor, Parameter) or torch.compiler.is_compiling():
        return
    # A quantized tensor gives the dtype of what it stands for.
    if is_traceable_wrapper_subclass(values):
        for attribute in values.__tensor_flatten__()[0]:
            held = getattr(values, attribute)
            if isinstance(held, Tensor) and held.dtype != values.dtype:
                kind = f"{type(values).__name__} of {held.dtype}"
                raise TypeError(f"expected {name} that holds its numbers as {values.dtype}, got {kind}")


def _check_targets(name: str, values: Tensor, targets: Tensor) -> None:
    if not isinstance(targets, Tensor):
        raise TypeError(f"expected targets to be a tensor, got {_describe(targets)}")
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(f"expected targets of {_names(TARGET_DTYPES)}, got {targets.dtype}")
    if targets.shape != values.shape[:-1]:
        raise ValueError(
            f"expected targets of shape {list(values.shape[:-1])} for {name} of shape {list(values.shape)}, "
            f"got {list(targets.shape)}"
        )
    if targets.device != values.device:
        raise ValueError(f"expected targets on {values.device} with the {name}, got {targets.device}")


def _check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(
            f"expected {name} without requires_grad, since the loss is not differentiated by it, got one with"
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_int64(name: str, value: int) -> None:
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"expected {name} to be an int of 64 bits, got {value}")


def _number(name: str, value: object) -> float:
    """An option as a Python float that an operator may have."""
    return float(concrete(_float(name, value)))


def _float(name: str, value: object) -> float:
    if type(value) is float:
        return value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number, got {_describe(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"expected {name} to be a number that a float holds, got {value}") from None


def _describe(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
