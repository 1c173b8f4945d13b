"""The loss for Hugging Face Transformers: of a causal language model's logits, or without logits.

`MixCEForCausalLMLoss` is the callable for `model.loss_function` and for `Trainer(compute_loss_func=...)`.
`with_linear_mixce_loss` gives a model whose loss comes straight from its hidden states.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mixce_kernels.functional import linear_mixce_loss, mixce_loss
from mixce_kernels.integrations.causal_lm import CausalLMHead, next_token_targets, without_cache
from mixce_kernels.integrations.linear_model import class_with_linear_loss
from mixce_kernels.integrations.metrics import TokenMetrics
from mixce_kernels.integrations.output_embeddings import is_own_forward, output_embeddings, weight_and_bias
from mixce_kernels.integrations.versions import require
from mixce_kernels.mixture import check_is_weighting
from mixce_kernels.options import LinearOptions, LossOptions, check_eta_number
from mixce_kernels.parallel.shard import Sharding
from mixce_kernels.weightings import PROBABILITY, CustomWeighting, is_built_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# 4.49 is the first release in which most models take another loss by assignment.
OLDEST_TRANSFORMERS, BELOW_TRANSFORMERS = "4.49", "6"
transformers = require("transformers", OLDEST_TRANSFORMERS, BELOW_TRANSFORMERS)


# The losses are no nn.Modules: assigned to `model.loss_function`, one would become a submodule of that name, and the
# property of that name would still give the model's own loss.
class _CausalLMLoss:
    """The state that both losses keep over a training run."""

    def __init__(self, eta: float | Tensor, options: LossOptions, metrics: TokenMetrics | None) -> None:
        options.for_tokens()
        check_is_weighting(options.weighting)
        self.weighting = options.weighting
        self.eta = eta if isinstance(eta, Tensor) else check_eta_number(eta)
        if not isinstance(metrics, (TokenMetrics, type(None))):
            raise TypeError(f"expected metrics to be a TokenMetrics or None, got {type(metrics).__name__}")
        self.options = options._replace(return_stats=metrics is not None)
        self.metrics = metrics

    def _for_batch(
        self, values: Tensor, num_items_in_batch: float | Tensor | None, ignore_index: int | None
    ) -> tuple[float | Tensor, LossOptions]:
        """Eta and the options for a batch of logits or hidden states."""
        # The last of a model's devices need not be the one that tensors were made for.
        eta = self.eta.to(values.device, non_blocking=True) if isinstance(self.eta, Tensor) else self.eta
        weighting = self.weighting
        weighting = weighting.to(values.device) if is_built_in(weighting) else weighting
        options = self.options._replace(num_items_in_batch=num_items_in_batch, weighting=weighting)
        return eta, options if ignore_index is None else options._replace(ignore_index=ignore_index)

    def _measured(self, result: Any, targets: Tensor, ignore_index: int) -> Tensor:
        """The loss alone; its statistics go to the metrics."""
        if self.metrics is None:
            return result
        loss, stats = result
        self.metrics.update(stats, targets, ignore_index)
        return loss


class MixCEForCausalLMLoss(_CausalLMLoss):
    """`fused_mixce_loss` in the place of Transformers' `ForCausalLMLoss`.

    Both of these train with it:

        model.loss_function = MixCEForCausalLMLoss(eta=0.5)      # then model(input_ids, labels=labels).loss
        Trainer(model, ..., compute_loss_func=MixCEForCausalLMLoss(eta=0.5))

    Logits are read in their own type, without a float32 copy, and where they lie: the labels are shifted.
    Source: Zhang et al., "MixCE", ACL 2023 (arXiv 2305.16958).

    Attributes:
        eta: mixing ratio, to be scheduled: assign a number, or write to a tensor, for which `torch.compile` does not
            compile again.
        weighting: what the weight is made from; assign another.
        metrics: the `TokenMetrics` that every call's tokens are added to, or None.
    """

    def __init__(
        self,
        eta: float | Tensor = 0.5,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        weighting: CustomWeighting = PROBABILITY,
        inplace_backward: bool = False,
        grad_in_forward: bool = False,
        metrics: TokenMetrics | None = None,
        validate: bool = False,
        backend: str | None = None,
    ) -> None:
        """Takes the options of `fused_mixce_loss`.

        Args:
            eta: mixing ratio in [0, 1]: a number, or a floating tensor that broadcasts to the labels' shape.
            ignore_index: the label of tokens without a loss, unless the call says another.
            label_smoothing, z_loss, weighting, inplace_backward, grad_in_forward, validate, backend: as in
                `fused_mixce_loss`.
            softcap, logit_scale: likewise, and after those of the model, whose logits are capped and scaled already.
            metrics: what collects nll, q, entropy, accuracy, ... of each call from the same pass.

        Raises:
            TypeError: an option is not a number, or the weighting no function.
            ValueError: an option is outside its range.
        """
        options = LossOptions(
            ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            logit_scale=logit_scale, weighting=weighting, inplace_backward=inplace_backward,
            grad_in_forward=grad_in_forward, validate=validate, backend=backend,
        )  # fmt: skip
        super().__init__(eta, options, metrics)

    def __call__(
        self,
        logits: Any,  # [..., T, V], or a model's outputs with such logits
        labels: Tensor | None,  # [..., T]
        vocab_size: int | None = None,
        num_items_in_batch: float | Tensor | None = None,
        ignore_index: int | None = None,
        shift_labels: Tensor | None = None,  # [..., T]
        token_weights: Tensor | None = None,  # [..., T]
        **kwargs: Any,
    ) -> Tensor:
        """The loss of a batch, as models and `Trainer` call it.

        Args:
            logits: [..., T, V] of each position, float32, bfloat16, float16 or float64; or the model's outputs (a
                mapping, an object with `logits`, or a tuple whose first entry they are), as `compute_loss_func` gets
                them.
            labels: [..., T], integers: the tokens themselves. Position t is trained on the label of t + 1.
            vocab_size: V, which models pass; checked.
            num_items_in_batch: the divisor of the sum of the tokens' losses: the number of tokens of all micro-batches,
                which `Trainer` counts. None: the number of this batch's.
            ignore_index: replaces the constructor's.
            shift_labels: [..., T], labels that are shifted already, in place of `labels`.
            token_weights: [..., T], a factor for the loss of each position; with `num_items_in_batch` the divisor is
                that.
            **kwargs: what a model hands on besides; not used.

        Returns:
            The loss: a float32 (float64 for float64 logits) scalar.

        Raises:
            TypeError: there are no labels or no logits.
            ValueError: labels do not fit the logits, as where one of them is shifted already; or the vocabulary has
                another size.
            IndexError, RuntimeError: as `fused_mixce_loss`.
        """
        logits = logits_of(logits)
        if vocab_size is not None and logits.shape[-1:] != (vocab_size,):
            raise ValueError(f"expected logits of shape [..., T, {vocab_size}], got {list(logits.shape)}")
        eta, options = self._for_batch(logits, num_items_in_batch, ignore_index)
        options = options._replace(token_weights=token_weights)
        targets = next_token_targets(logits, labels, shift_labels, options.ignore_index, "logits")
        return self._measured(mixce_loss(logits, targets, eta, options), targets, options.ignore_index)


class LinearMixCEForCausalLMLoss(_CausalLMLoss):
    """`fused_linear_mixce_loss` of a causal language model's last hidden states, for `with_linear_mixce_loss`.

    Attributes:
        head: how the model's logits come from its hidden states.
        defaults: what the backbone is called with unless the caller says otherwise.
        eta, weighting, metrics: as in `MixCEForCausalLMLoss`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eta: float | Tensor,
        options: LossOptions,
        linear: LinearOptions,
        metrics: TokenMetrics | None,
    ) -> None:
        """Takes the arguments of `with_linear_mixce_loss` in records, and raises as that does."""
        self.head = CausalLMHead.of(model)
        self.defaults = without_cache(model.get_submodule(self.head.backbone))
        linear.check(options.backend)
        self.linear = linear
        options = options._replace(logit_scale=self.head.logit_scale, softcap=self.head.softcap)
        super().__init__(eta, options, metrics)

    def __call__(
        self,
        model: PreTrainedModel,
        outputs: Any,
        labels: Tensor | None,  # [..., T]
        num_items_in_batch: float | Tensor | None = None,
        ignore_index: int | None = None,
        shift_labels: Tensor | None = None,  # [..., T]
    ) -> Any:
        """The outputs with a batch's loss, of the backbone's outputs; arguments and errors as in the other loss."""
        weight, bias = weight_and_bias(output_embeddings(model))
        # The backbone may end on another device.
        hidden = outputs.last_hidden_state.to(weight.device)
        eta, options = self._for_batch(hidden, num_items_in_batch, ignore_index)
        targets = next_token_targets(hidden, labels, shift_labels, options.ignore_index, "hidden states")
        result = linear_mixce_loss(hidden, weight, bias, targets, eta, options, self.linear, Sharding())
        return transformers.modeling_outputs.CausalLMOutput(
            loss=self._measured(result, targets, options.ignore_index),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


def with_linear_mixce_loss(
    model: PreTrainedModel,
    eta: float | Tensor = 0.5,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weighting: CustomWeighting = PROBABILITY,
    max_chunk_bytes: int | None = None,
    path: str = "chunks",
    metrics: TokenMetrics | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> PreTrainedModel:
    """A causal language model that computes its loss without logits, sharing `model`'s weights.

    Called with labels it runs the base model and gives hidden states and output embeddings to
    `fused_linear_mixce_loss`; its outputs hold `loss`, and `logits` is None. Called without labels, as by `generate`,
    it is `model`. It is a model of `model`'s class, for `Trainer`, `save_pretrained`, `torch.compile`, DDP, FSDP2 or
    PEFT. Its attribute `mixce_loss` holds `eta`, to be scheduled, `weighting` and `metrics`; a `loss_function` is not
    used.

    `model` and its class keep their loss. Weights, submodules and hooks are those of both. Losses that a model adds by
    itself, as of a router, are refused.

    The output embeddings are not called. Each call of the model reads their weight and bias, which a parametrization
    (`torch.nn.utils.parametrize`) may compute; of a layer that PEFT trains copies of (`modules_to_save`) these are the
    active copy's. Hooks on the output embeddings, and so pruning and `torch.nn.utils.weight_norm`, adapters on them and
    quantized weights are refused, also at a call if they came after the model was made.

    A factor or a cap of the model's logits (Gemma's, Cohere's, Granite's, ...) is taken over: the model is made to
    compute the logits of made-up hidden states once, and the numbers in its configuration that explain these are used.
    Source: Zhang et al., "MixCE", ACL 2023 (arXiv 2305.16958).

    Args:
        model: a causal language model of Transformers whose output embeddings are a `torch.nn.Linear`, tied or not. It
            is not yet wrapped by DDP or PEFT; of a `PeftModel` it is the inner model.
        eta: mixing ratio in [0, 1]: a number, or a floating tensor that broadcasts to the labels' shape.
        ignore_index, label_smoothing, z_loss, weighting, max_chunk_bytes, path, validate, backend: as in
            `fused_linear_mixce_loss`.
        metrics: what collects nll, q, entropy, accuracy, ... of each call from the same pass.

    Returns:
        The model. Its call takes what `model`'s takes, and `shift_labels`, `num_items_in_batch` and `ignore_index` as
        `MixCEForCausalLMLoss` does.

    Raises:
        TypeError: `model` is no `transformers.PreTrainedModel`, or an option is not a number.
        ValueError: the model has no output embeddings, they are refused as said above, or its logits are not a scaled
            and capped product of these and its last hidden states; its `forward` was replaced; or an option is outside
            its range. Of a call: labels do not fit; the output embeddings are refused; logits or a router's loss were
            asked for together with labels.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"expected model to be a transformers.PreTrainedModel, got {type(model).__name__}")
    # accelerate's, where a device_map spreads the model over devices: it brings inputs to these.
    hook = vars(model).get("_hf_hook")
    if "forward" in vars(model) and hook is None and not is_own_forward(vars(model)["forward"], type(model).forward):
        raise ValueError(
            f"expected a model with the forward of its class, got {type(model).__name__} with another "
            "(accelerator.unwrap_model(model, keep_fp32_wrapper=False) takes off that of mixed precision)"
        )
    options = LossOptions(
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, weighting=weighting,
        validate=validate, backend=backend,
    )  # fmt: skip
    linear_options = LinearOptions(max_chunk_bytes=max_chunk_bytes, path=path)
    loss = LinearMixCEForCausalLMLoss(model, eta, options, linear_options, metrics)
    # A shallow copy: its own attributes, but the same submodules and weights.
    linear = copy.copy(model)
    linear.__class__ = class_with_linear_loss(model.__class__)
    linear.mixce_loss = loss
    for name in ("forward", "_old_forward", "_hf_hook"):
        vars(linear).pop(name, None)
    if hook is not None:
        importlib.import_module("accelerate.hooks").add_hook_to_module(linear, hook)
    return linear


def logits_of(outputs: Any) -> Tensor:
    """The logits [..., T, V] of a model's outputs, or these themselves; raises TypeError where there are none."""
    logits = outputs
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    elif isinstance(outputs, tuple) and outputs:
        logits = outputs[0]
    elif not isinstance(outputs, Tensor):
        logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"expected logits, or a model's outputs with logits, got {type(outputs).__name__} without")
    return logits
