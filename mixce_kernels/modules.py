"""`MixCELoss`: the loss as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mixce_kernels.functional import fused_mixce_loss
from mixce_kernels.options import check_eta_number, check_reduction_name, check_token_options
from mixce_kernels.stats import MixCEStats


class MixCELoss(nn.Module):
    """`fused_mixce_loss` as an `nn.Module` in the manner of `torch.nn.CrossEntropyLoss`.

    The constructor takes what stays the same over a training run, the call what belongs to a batch. `eta` is a plain
    attribute: assign a number or a tensor to schedule it.
    """

    def __init__(
        self,
        eta: float | Tensor = 0.5,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        inplace_backward: bool = False,
        grad_in_forward: bool = False,
        return_stats: bool = False,
        validate: bool = False,
        backend: str | None = None,
    ) -> None:
        """Takes the options of `fused_mixce_loss`.

        Raises:
            TypeError: an option is not a number.
            ValueError: an option is outside its range.
        """
        super().__init__()
        check_token_options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
        check_reduction_name(reduction)
        self.eta = eta if isinstance(eta, Tensor) else check_eta_number(eta)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "inplace_backward": inplace_backward,
            "grad_in_forward": grad_in_forward,
            "return_stats": return_stats,
            "validate": validate,
            "backend": backend,
        }

    def forward(
        self,
        logits: Tensor,  # [..., V]
        targets: Tensor,  # [...]
        *,
        token_weights: Tensor | None = None,  # [...]
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MixCEStats]:
        """The loss of a batch: arguments, results and errors of `fused_mixce_loss`."""
        return fused_mixce_loss(
            logits,
            targets,
            self.eta,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )

    def extra_repr(self) -> str:
        defaults = fused_mixce_loss.__kwdefaults__ or {}
        changed = {name: value for name, value in self.options.items() if value != defaults[name]}
        return ", ".join(f"{name}={value}" for name, value in {"eta": self.eta, **changed}.items())
