"""The loss in ms-swift, for a file that `--external_plugins` names.

    from swift.loss import loss_map
    from mixce_kernels.integrations.ms_swift import mixce_loss

    loss_map["mixce"] = mixce_loss(eta=0.5)

With that file `--loss_type mixce` trains with it; nothing of ms-swift is patched.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from mixce_kernels.integrations.transformers import MixCEForCausalLMLoss
from mixce_kernels.integrations.versions import require
from mixce_kernels.weightings import PROBABILITY, CustomWeighting, parse

OLDEST_SWIFT, BELOW_SWIFT = "4.6", "5"
require("swift", OLDEST_SWIFT, BELOW_SWIFT, install="ms-swift")

BaseLoss: Any = importlib.import_module("swift.loss").BaseLoss


def mixce_loss(
    eta: float | Tensor = 0.5, *, weighting: CustomWeighting | str = PROBABILITY, **options: Any
) -> Callable[[Any, Any], MixCELoss]:
    """What `swift.loss.loss_map` holds: makes the loss for a trainer.

    Args:
        eta: mixing ratio in [0, 1]: a number, or a floating tensor of no dimension.
        weighting: what a token's weight is made from, also as `mixce_kernels.weightings.parse` reads it.
        **options: the other options of `MixCEForCausalLMLoss`.

    Returns:
        A function of ms-swift's arguments and trainer, which gives a `MixCELoss`.

    Raises:
        TypeError: an option is not a number, or the weighting no function.
        ValueError: an option is outside its range; or the gradient would overwrite the logits in forward, of which
            ms-swift computes the accuracy after the loss.
    """
    weighting = parse(weighting) if isinstance(weighting, str) else weighting
    loss = MixCEForCausalLMLoss(eta, weighting=weighting, **options)
    if loss.options.grad_in_forward and loss.options.inplace_backward:
        raise ValueError("expected not both grad_in_forward and inplace_backward: ms-swift reads the logits afterwards")
    return partial(MixCELoss, loss=loss)


class MixCELoss(BaseLoss):  # type: ignore[misc]  # ms-swift's types are not followed
    """`MixCEForCausalLMLoss`, as ms-swift's `Seq2SeqTrainer` calls losses.

    Attributes:
        mixce_loss: the loss, whose `eta` schedules the mixing ratio: `trainer.compute_loss_func.mixce_loss.eta`.
    """

    def __init__(self, args: Any, trainer: Any, *, loss: MixCEForCausalLMLoss) -> None:
        """Made by what `mixce_loss` returns.

        Raises:
            ValueError: the trainer splits sequences or models over devices in a way that this loss does not know, or
                has another loss, which would not be used.
        """
        super().__init__(args, trainer)
        if self.is_megatron:
            raise ValueError("expected ms-swift's trainer for Transformers, got that for Megatron")
        size = trainer.template.sequence_parallel_size
        if size > 1:
            raise ValueError(f"expected sequence_parallel_size of 1 with the loss of eta, got {size}")
        if args.enable_dft_loss:
            raise ValueError("expected no enable_dft_loss beside the loss of eta, whose eta = 0 it is")
        if args.label_smoothing_factor:
            raise ValueError("expected label_smoothing as an option of mixce_loss, got label_smoothing_factor")
        self.mixce_loss = loss

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,  # [B, T]
        *,
        num_items_in_batch: float | Tensor | None = None,
        loss_scale: Tensor | None = None,  # [B T]
        **_kwargs: Any,
    ) -> Tensor:
        """The loss of a micro-batch.

        Args:
            outputs: the model's, with logits [B, T, V].
            labels: [B, T], the tokens themselves; -100 where there is no loss.
            num_items_in_batch: the divisor: the tokens of all micro-batches of a step. None: those of this one.
            loss_scale: [B T], a factor for each token, at the position that predicts it, as the trainer has it.

        Returns:
            The loss: a float32 (float64 for float64 logits) scalar.

        Raises:
            TypeError, ValueError: outputs without logits, or labels that do not fit them.
        """
        if num_items_in_batch is None:
            # By number also where tokens have factors, as ms-swift divides.
            num_items_in_batch = (labels[:, 1:] != self.mixce_loss.options.ignore_index).sum()
        weights = None if loss_scale is None else loss_scale.view(labels.shape)
        return self.mixce_loss(outputs, labels, num_items_in_batch=num_items_in_batch, token_weights=weights)
