"""The loss in Axolotl: a plugin and its keys of the configuration.

    plugins:
      - mixce_kernels.integrations.axolotl.MixCEPlugin
    mixce_eta: 0.5
    mixce_weighting: Probability()
    mixce_linear: true

With that in Axolotl's YAML file its trainer has the loss; nothing of Axolotl is patched.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mixce_kernels.integrations.causal_lm import base_of
from mixce_kernels.integrations.transformers import MixCEForCausalLMLoss, with_linear_mixce_loss
from mixce_kernels.integrations.versions import require
from mixce_kernels.options import check_eta_number
from mixce_kernels.weightings import PROBABILITY, parse

OLDEST_AXOLOTL, BELOW_AXOLOTL = "0.18", "1"
require("axolotl", OLDEST_AXOLOTL, BELOW_AXOLOTL, install="axolotl")

# Axolotl brings it.
pydantic: Any = importlib.import_module("pydantic")
BasePlugin: Any = importlib.import_module("axolotl.integrations.base").BasePlugin

# Keys of the configuration that put another loss, or another training, in this one's place.
OTHER_LOSSES = (
    *("cut_cross_entropy", "chunked_cross_entropy", "liger_cross_entropy", "liger_fused_linear_cross_entropy"),
    *("use_eaft", "rl", "reward_model", "process_reward_model", "kd_trainer", "diffusion", "trainer_cls"),
    "label_smoothing_factor",
)


class MixCEArgs(pydantic.BaseModel):  # type: ignore[misc]  # pydantic's types are not followed
    """The keys of the configuration.

    Attributes:
        mixce_eta: mixing ratio in [0, 1], from 1 (cross-entropy) to 0 (its reverse approximation).
        mixce_weighting: what a token's weight is made from, as `mixce_kernels.weightings.parse` reads it:
            "Power(alpha=0.5)".
        mixce_linear: whether the loss comes from hidden states, without logits: `with_linear_mixce_loss`. Otherwise
            it is `MixCEForCausalLMLoss` of the model's logits.
    """

    mixce_eta: float = 0.5
    mixce_weighting: str = repr(PROBABILITY)
    mixce_linear: bool = True

    @pydantic.model_validator(mode="before")
    @classmethod
    def _check_no_other_loss(cls, data: Any) -> Any:
        given = data if isinstance(data, Mapping) else {}
        others = [name for name in OTHER_LOSSES if given.get(name)]
        if others:
            raise ValueError(f"expected no other loss beside MixCEPlugin, got {', '.join(others)}")
        if (given.get("context_parallel_size") or 1) > 1:
            raise ValueError(
                "expected context_parallel_size of 1 with MixCEPlugin, which shifts the labels of whole sequences, got "
                f"{given['context_parallel_size']}"
            )
        return data

    @pydantic.field_validator("mixce_eta")
    @classmethod
    def _check_eta(cls, eta: float) -> float:
        check_eta_number(eta)
        return eta

    @pydantic.field_validator("mixce_weighting")
    @classmethod
    def _check_weighting(cls, weighting: str) -> str:
        try:
            return repr(parse(weighting))
        except TypeError as error:
            # pydantic makes a sentence of ValueErrors alone.
            raise ValueError(str(error)) from None


class MixCEPlugin(BasePlugin):  # type: ignore[misc]  # Axolotl's types are not followed
    """Trains with the loss; eta is scheduled by `trainer.mixce_loss.eta`, in a callback."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the keys of the configuration."""
        return f"{__name__}.{MixCEArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Gives the trainer the loss of the configuration.

        Args:
            cfg: Axolotl's configuration.
            trainer: its trainer, which has not begun.

        Raises:
            ValueError: the trainer has a loss of its own already, or the model's head is refused by
                `with_linear_mixce_loss`.
        """
        if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
            raise ValueError("expected a trainer without a loss function or label smoothing of its own")
        weighting = parse(cfg.mixce_weighting)
        if cfg.mixce_linear:
            trainer.mixce_loss = _train_without_logits(trainer, eta=cfg.mixce_eta, weighting=weighting)
        else:
            trainer.mixce_loss = MixCEForCausalLMLoss(cfg.mixce_eta, weighting=weighting)
            trainer.compute_loss_func = trainer.mixce_loss


def _train_without_logits(trainer: Any, **options: Any) -> Any:
    """Puts a model of the same weights, whose loss needs no logits, in the place of the trainer's; returns its loss."""
    model, base = trainer.model, base_of(trainer.model)
    linear = with_linear_mixce_loss(base, **options)
    if model is base:
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = linear
    elif model.base_model is base:
        # PEFT's prompts stand before the model itself.
        model.base_model = linear
    else:
        model.base_model.model = linear
    trainer.model_accepts_loss_kwargs = True
    return linear.mixce_loss
