"""The layer that computes logits from a model's last hidden states. The loss reads its weight and does not call it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixce_kernels.checks import has_dtensor
from mixce_kernels.options import LOGITS_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REMEDY = "MixCEForCausalLMLoss takes the model's logits"
# Attributes of a module with functions that a call runs besides its forward.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# The module that defines TRL's hooks on a head. They turn off the offloading of activations while the head runs, so a
# head that is not called does not need them.
IDLE_HOOKS = "trl.models.activation_offloading"


def output_embeddings(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that turns the model's hidden states into logits.

    Where PEFT trains a copy of the layer (`modules_to_save`), this is the layer that is active now: the copy of the
    active adapter, or the original one.

    Raises:
        ValueError: the model has no output embeddings, or to call them is more than to multiply by a weight and add a
            bias: they are of another class, or have hooks or a forward of their own.
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"expected a model with output embeddings, got {type(model).__name__}, which has none")
    layer = _active_layer(head)
    # A subclass may hold the weight in another form, or an adapter beside it.
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise ValueError(f"expected output embeddings that are a torch.nn.Linear, got {_kind(layer)}: {REMEDY}")
    _check_runs_its_class_alone(head)
    if layer is not head:
        _check_runs_its_class_alone(layer)
    return layer


def weight_and_bias(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The weight [V, D] and the bias [V] of a layer, each read once: a parametrization computes them at every access.

    Raises:
        ValueError: one of them is on the meta device, of a type that logits cannot have, or a subclass of
            `torch.Tensor` such as a quantized tensor, whose values kernels cannot read.
    """
    weight, bias = layer.weight, layer.bias
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        # A tracer's tensors stand in for those that were checked when the model was made.
        plain = type(tensor) in (Tensor, nn.Parameter) or has_dtensor(tensor) or torch.compiler.is_compiling()
        if not plain:
            raise ValueError(
                f"expected output embeddings whose {name} is a torch.nn.Parameter, got {_kind(tensor)}: {REMEDY}"
            )
        if tensor.dtype not in LOGITS_DTYPES:
            raise ValueError(
                f"expected output embeddings of float32, bfloat16, float16, float64, got a {name} of {tensor.dtype}: "
                f"{REMEDY}"
            )
        if tensor.is_meta:
            raise ValueError(
                f"expected output embeddings that are loaded, got a {name} on the meta device (MixCEForCausalLMLoss "
                "takes the logits of a model that is offloaded)"
            )
    return weight, bias


def is_own_forward(forward: Any, of_class: Any) -> bool:
    """Whether this is the class's method, or what its decorators wrap: accelerate leaves that in a module."""
    function = getattr(forward, "__func__", None)
    while of_class is not None:
        if function is of_class:
            return True
        of_class = getattr(of_class, "__wrapped__", None)
    return False


def _active_layer(head: Any) -> Any:
    """The layer that PEFT's wrapper of a module and its trained copies calls; `head` itself if it is no such wrapper.

    The wrapper is told by its attributes, which are the same in all releases of PEFT.
    """
    copies, original = (getattr(head, name, None) for name in ("modules_to_save", "original_module"))
    if not isinstance(copies, nn.ModuleDict) or not isinstance(original, nn.Module):
        return head
    # A name, or a list of at most one, depending on the release and on what set it.
    active = [head.active_adapter] if isinstance(head.active_adapter, str) else head.active_adapter
    # An adapter that has no copy of this module uses the original one.
    if head.disable_adapters or not active or active[0] not in copies:
        return original
    return copies[active[0]]


def _check_runs_its_class_alone(module: nn.Module) -> None:
    """Raises ValueError where calling the module runs hooks, or another forward than that of its class."""
    attributes = vars(module)
    for kind in HOOKS:
        for hook in attributes[kind].values():
            if getattr(hook, "__module__", None) != IDLE_HOOKS:
                name = getattr(hook, "__qualname__", type(hook).__qualname__)
                raise ValueError(
                    f"expected output embeddings without hooks, which do not run where there are no logits, got {name} "
                    f"in {kind}: {REMEDY}"
                )
    # accelerate's hooks replace the forward and keep the other: they bring inputs and weights to one device.
    forward = attributes.get("_old_forward" if "_hf_hook" in attributes else "forward")
    if forward is not None and not is_own_forward(forward, type(module).forward):
        raise ValueError(f"expected output embeddings with the forward of {_kind(module)}, got another: {REMEDY}")


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
