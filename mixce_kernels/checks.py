"""The checks of tensors, and of the values in them: every argument of the public functions passes through here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mixce_kernels.options import ETA_ROUNDING, LOGITS_DTYPES
from mixce_kernels.values import describe
from mixce_kernels.weightings import CustomWeighting, is_built_in

TARGET_DTYPES = (torch.int64, torch.int32)
_PLAIN = frozenset((Tensor, Parameter, float, int, type(None)))


def is_unwrapped(*values: object) -> bool:
    """Whether no value is a tensor of a class of its own, which may wrap another."""
    return _PLAIN.issuperset(map(type, values))


def has_dtensor(*values: object) -> bool:
    """Whether a value is a tensor distributed over a mesh of devices."""
    if is_unwrapped(*values):
        return False
    try:
        from torch.distributed.tensor import DTensor
    except ImportError:  # built without torch.distributed
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


def check_values(
    targets: Tensor, eta: float | Tensor, weighting: CustomWeighting, ignore_index: int, vocab_size: int
) -> None:
    """Reads targets, eta and the weighting's parameters (a host synchronisation on a GPU).

    Raises:
        IndexError: a target is neither in [0, vocab_size) nor ignore_index; names the first such row and its value.
        ValueError: an entry of eta is outside [0, 1] or NaN, or one of a parameter is out of range; or `torch.vmap`
            batches the tensors.
    """
    _check_readable(targets, eta)
    check_targets_in_range(targets, ignore_index, vocab_size)
    if isinstance(eta, Tensor) and not ((eta >= -ETA_ROUNDING) & (eta <= 1 + ETA_ROUNDING)).all():
        raise ValueError("expected every entry of eta in [0, 1], got one outside")
    if is_built_in(weighting):
        weighting.check_values()


def check_logprob_values(
    targets: Tensor, temperature: Tensor | None, ignore_index: int, vocab_size: int | None
) -> None:
    """Reads targets, unless there is no `vocab_size`, and temperature (a host synchronisation on a GPU).

    Raises:
        IndexError: a target is neither in [0, vocab_size) nor ignore_index; names the first such row and its value.
        ValueError: a token that is not ignored has a temperature that is not positive and finite; or `torch.vmap`
            batches the tensors.
    """
    _check_readable(targets, temperature)
    if vocab_size is not None:
        check_targets_in_range(targets, ignore_index, vocab_size)
    if temperature is None:
        return
    served = (targets == ignore_index) | ((temperature > 0) & temperature.isfinite())
    if not served.all():
        raise ValueError("expected every entry of temperature to be positive and finite, got one that is not")


def _check_readable(*values: object) -> None:
    if any(isinstance(value, Tensor) and is_batched(value) for value in values):
        raise ValueError("expected validate=False under torch.vmap, got True")


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
        raise TypeError(f"expected {name} to be a tensor, got {describe(values)}")
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
        raise TypeError(f"expected targets to be a tensor, got {describe(targets)}")
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(f"expected targets of {_names(TARGET_DTYPES)}, got {targets.dtype}")
    if targets.shape != values.shape[:-1]:
        raise ValueError(
            f"expected targets of shape {list(values.shape[:-1])} for {name} of shape {list(values.shape)}, "
            f"got {list(targets.shape)}"
        )
    if targets.device != values.device:
        raise ValueError(f"expected targets on {values.device} with the {name}, got {targets.device}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
