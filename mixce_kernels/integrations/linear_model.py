"""The class of a causal language model whose loss comes from hidden states: `mixce_loss` computes it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor


@functools.cache
def class_with_linear_loss(base: Any) -> Any:
    """The subclass of a causal language model's class whose forward computes its loss without logits."""

    # Wrapped, since Trainer reads off the signature which columns of a data set the model takes.
    @functools.wraps(base.forward)
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        ignore_index: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None and shift_labels is None:
            if num_items_in_batch is not None:
                raise ValueError(
                    "expected labels with num_items_in_batch, got none: Trainer takes them away for "
                    "label_smoothing_factor and compute_loss_func (label_smoothing is an option of this loss)"
                )
            if args and "labels" in inspect.signature(base.forward).bind_partial(self, input_ids, *args).arguments:
                raise ValueError("expected arguments besides input_ids by name, together with labels")
            if return_dict is not None:
                kwargs["return_dict"] = return_dict
            return base.forward(self, input_ids, *args, **kwargs)
        if args:
            raise ValueError("expected arguments besides input_ids by name, together with labels")
        if self.mixce_loss is None:
            raise ValueError("expected a model that with_linear_mixce_loss returned, got one that its class loaded")
        for name in ("logits_to_keep", "num_logits_to_keep"):
            kept = kwargs.pop(name, 0)
            if isinstance(kept, Tensor) or kept:
                raise ValueError(f"expected no {name} together with labels, since the loss is that of all positions")
        asked = kwargs.get("output_router_logits")
        if asked is None:
            configs = (self.config, self.config.get_text_config())
            asked = any(getattr(config, "output_router_logits", False) for config in configs)
        if asked:
            raise ValueError("expected output_router_logits=False, since the router's loss is not computed here")
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        backbone = self.get_submodule(self.mixce_loss.head.backbone)
        outputs = backbone(input_ids=input_ids, **{**self.mixce_loss.defaults, **kwargs, "return_dict": True})
        result = self.mixce_loss(self, outputs, labels, num_items_in_batch, ignore_index, shift_labels)
        return result if return_dict else result.to_tuple()

    # Pickled by what it was made of, since its name is that of the model's own class.
    def reduce(self: Any, protocol: Any) -> Any:
        return _unfinished, (base,), self.__dict__

    # Trainer is to pass num_items_in_batch whatever the signature says. Name and module are the model's own, which
    # save_pretrained writes into the configuration.
    attributes = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "accepts_loss_kwargs": True,
        "mixce_loss": None,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base)(base.__name__, (base,), attributes)


def _unfinished(base: Any) -> Any:
    """An instance of the subclass that has no attributes yet."""
    linear = class_with_linear_loss(base)
    return linear.__new__(linear)
