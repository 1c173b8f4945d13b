"""The losses in NeMo Automodel, for `loss_fn._target_` of a recipe: `MixCELoss` of logits, `LinearMixCELoss` without.

    loss_fn:
      _target_: mixce_kernels.integrations.nemo_automodel.LinearMixCELoss
      eta: 0.5

With that in the recipe's YAML file Automodel computes the loss; nothing of it is patched.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from mixce_kernels import modules
from mixce_kernels.integrations.versions import require
from mixce_kernels.weightings import PROBABILITY, CustomWeighting, parse

OLDEST_AUTOMODEL, BELOW_AUTOMODEL = "0.7", "1"
require("nemo_automodel", OLDEST_AUTOMODEL, BELOW_AUTOMODEL, install="nemo-automodel")

# Automodel asks for their types: it puts MaskedCrossEntropy in the place of any other loss of logits for models whose
# forward does not know logits_to_keep, and calls a LinearCrossEntropy with hidden states.
MaskedCrossEntropy: Any = importlib.import_module("nemo_automodel.components.loss.masked_ce").MaskedCrossEntropy
LinearCrossEntropy: Any = importlib.import_module("nemo_automodel.components.loss.linear_ce_base").LinearCrossEntropy


class MixCELoss(MaskedCrossEntropy):  # type: ignore[misc]  # Automodel's types are not followed
    """`fused_mixce_loss` in the place of Automodel's `MaskedCrossEntropy`.

    Attributes:
        mixce_loss: the module whose `eta` schedules the mixing ratio.
        ignore_index, reduction: as Automodel reads them.
    """

    def __init__(
        self,
        eta: float | Tensor = 0.5,
        *,
        ignore_index: int = -100,
        weighting: CustomWeighting | str = PROBABILITY,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        backend: str | None = None,
    ) -> None:
        """Takes options of `fused_mixce_loss`; a weighting also as `mixce_kernels.weightings.parse` reads it.

        Raises:
            TypeError: an option is not a number, or the weighting no function.
            ValueError: an option is outside its range.
        """
        super().__init__(ignore_index=ignore_index, reduction="sum")
        self.mixce_loss = modules.MixCELoss(
            eta, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing, z_loss=z_loss,
            weighting=_parsed(weighting), backend=backend,
        )  # fmt: skip

    def forward(
        self,
        logits: Tensor,  # [B, T, V]
        labels: Tensor,  # [B, T]
        mask: Tensor | None = None,  # [B, T]
        num_label_tokens: int | None = None,
        loss_weights: Tensor | None = None,  # [B, T]
    ) -> Tensor:
        """The sum of the tokens' losses over the number of tokens, as Automodel's recipes call it.

        Args:
            logits: [B, T, V]; a DTensor whose vocabulary is sharded stays so.
            labels: [B, T], shifted already.
            mask: [B, T], 0 where a token has no loss.
            num_label_tokens: the divisor: the tokens of the whole step on all ranks. None: the sum itself.
            loss_weights: [B, T], a factor for each token; the divisor stays.

        Returns:
            The loss: a float32 (float64 for float64 logits) scalar.

        Raises:
            TypeError, ValueError, IndexError: as `fused_mixce_loss`.
        """
        if mask is not None:
            labels = labels.masked_fill(mask.to(labels.device) == 0, self.ignore_index)
        total = self.mixce_loss(logits, labels.to(logits.device), token_weights=_on(logits, loss_weights))
        return _mean(total, num_label_tokens)


class LinearMixCELoss(LinearCrossEntropy):  # type: ignore[misc]  # Automodel's types are not followed
    """`fused_linear_mixce_loss` in the place of Automodel's `FusedLinearCrossEntropy`.

    With pipeline parallelism Automodel itself takes plain cross-entropy instead, and warns, where the model's stages
    cannot return hidden states.

    Attributes:
        mixce_loss: the module whose `eta` schedules the mixing ratio.
        ignore_index, reduction: as Automodel reads them.
    """

    def __init__(
        self,
        eta: float | Tensor = 0.5,
        *,
        ignore_index: int = -100,
        weighting: CustomWeighting | str = PROBABILITY,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        max_chunk_bytes: int | None = None,
        backend: str | None = None,
    ) -> None:
        """Takes options of `fused_linear_mixce_loss`; a weighting also as `mixce_kernels.weightings.parse` reads it.

        softcap and logit_scale are those of the model, whose head does not run.

        Raises:
            TypeError: an option is not a number, or the weighting no function.
            ValueError: an option is outside its range.
        """
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, "sum"
        self.mixce_loss = modules.LinearMixCELoss(
            eta, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing, z_loss=z_loss,
            softcap=softcap, logit_scale=logit_scale, weighting=_parsed(weighting), max_chunk_bytes=max_chunk_bytes,
            backend=backend,
        )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D]
        labels: Tensor,  # [B, T]
        lm_weight: Tensor,  # [V, D]
        num_label_tokens: int | None = None,
        grad_reduce_group: Any = None,
        loss_weights: Tensor | None = None,  # [B, T]
    ) -> Tensor:
        """The sum of the tokens' losses over the number of tokens, as Automodel's recipes call it.

        Args:
            hidden_states: [B, T, D], the last ones.
            labels: [B, T], shifted already.
            lm_weight: [V, D], the head's; one that FSDP has sharded is gathered.
            num_label_tokens: the divisor: the tokens of the whole step on all ranks. None: the sum itself.
            grad_reduce_group: the ranks whose gradients a gathered weight adds up.
            loss_weights: [B, T], a factor for each token; the divisor stays.

        Returns:
            The loss: a float32 (float64 for float64 hidden states) scalar.

        Raises:
            TypeError, ValueError, IndexError: as `fused_linear_mixce_loss`; a sharded weight without its group.
        """
        weight = self.materialize_lm_weight(lm_weight, grad_reduce_group=grad_reduce_group)
        labels = labels.to(hidden_states.device)
        total = self.mixce_loss(hidden_states, weight, labels, token_weights=_on(hidden_states, loss_weights))
        return _mean(total, num_label_tokens)


def _parsed(weighting: CustomWeighting | str) -> CustomWeighting:
    return parse(weighting) if isinstance(weighting, str) else weighting


def _on(values: Tensor, loss_weights: Tensor | None) -> Tensor | None:
    return None if loss_weights is None else loss_weights.to(values.device)


def _mean(total: Any, num_label_tokens: int | None) -> Any:
    """The sum over the number of tokens; where there are none on any rank, the sum is 0."""
    whole = total.full_tensor() if hasattr(total, "full_tensor") else total
    return whole / num_label_tokens if num_label_tokens else whole
