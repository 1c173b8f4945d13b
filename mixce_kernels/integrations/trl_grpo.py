"""Log-probabilities for TRL: `GRPOTrainer` whose log-probabilities and entropies come from hidden states.

`FusedLogprobsGRPOTrainer` takes the place of `GRPOTrainer`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from mixce_kernels import fused_linear_token_logprobs
from mixce_kernels.autocast import without_autocast
from mixce_kernels.integrations.causal_lm import CausalLMHead, base_of, next_token_targets, without_cache
from mixce_kernels.integrations.output_embeddings import output_embeddings, weight_and_bias
from mixce_kernels.integrations.transformers import transformers
from mixce_kernels.integrations.versions import require
from mixce_kernels.options import LinearOptions

# 1.16 is the first release whose trainer asks its model for log-probabilities on every device; before 1.15 it computed
# logits.
OLDEST_TRL, BELOW_TRL = "1.16.0", "2"
trl = require("trl", OLDEST_TRL, BELOW_TRL)

GRPOTrainer: Any = trl.GRPOTrainer
Trainer: Any = transformers.Trainer
# The keyword by which TRL asks a model for log-probabilities in the place of logits.
ASKED = "fused_lm_head"
IGNORED = -100
# The end of a sentence about a model's head: which loss takes its logits, or has such an option.
REMEDY = re.compile(r"(: | \()(MixCEForCausalLMLoss takes|z_loss is) .*")


class _HeadReader(Trainer):  # type: ignore[misc]  # Transformers' types are not followed
    """`Trainer` that reads how its model's logits come from hidden states.

    As a base that stands behind `GRPOTrainer` it gets the model that this has loaded and wrapped by PEFT, before
    anything else was made of it.
    """

    def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
        """Takes what `Trainer` takes; raises as `FusedLogprobsGRPOTrainer` does."""
        if getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", 0) == 3:
            raise ValueError("expected a ZeRO stage below 3, where a model's forward has the whole head, got 3")
        with _without_remedy():
            self._head = CausalLMHead.of(base_of(model))
        super().__init__(model=model, args=args, **kwargs)


class FusedLogprobsGRPOTrainer(GRPOTrainer, _HeadReader):  # type: ignore[misc]  # TRL's types are not followed
    """TRL's `GRPOTrainer` whose log-probabilities and entropies are those of `fused_linear_token_logprobs`.

        trainer = FusedLogprobsGRPOTrainer(model, reward_funcs=..., args=GRPOConfig(...), train_dataset=...)
        trainer.train()

    All else is TRL's: generation, rewards, the loss and its options, and what is logged. The policy's log-probabilities
    and entropies, the old ones and those of a reference model all come from last hidden states and output embeddings,
    without logits; of the positions of a batch only those take part whose next token belongs to a completion.

    The forward of a model is replaced, as TRL does itself, on the instance: called without TRL's `fused_lm_head=True`,
    as by `generate`, the model is as before. A model passed in as an instance keeps that forward afterwards.
    """

    def __init__(
        self, *args: Any, max_chunk_bytes: int | None = None, backend: str | None = None, **kwargs: Any
    ) -> None:
        """Takes what `GRPOTrainer` takes, and two options of `fused_linear_token_logprobs`.

        Args:
            *args, **kwargs: `model`, `reward_funcs`, `args`, `train_dataset`, ... of `GRPOTrainer`. The model is the
                name or path of a causal language model, a `transformers.PreTrainedModel`, or one wrapped by PEFT.
            max_chunk_bytes, backend: as in `fused_linear_token_logprobs`.

        Raises:
            TypeError, ValueError: `max_chunk_bytes` is no positive integer.
            ValueError: the model's logits are not those of a plain linear layer, or of a copy of it that PEFT trains;
                or they are split by ZeRO stage 3.
            RuntimeError: this release of TRL does not ask its model for log-probabilities.
        """
        LinearOptions(max_chunk_bytes=max_chunk_bytes).check(backend)
        super().__init__(*args, **kwargs)
        policy = base_of(self.model)
        if ASKED not in inspect.signature(policy.forward, follow_wrapped=False).parameters:
            raise RuntimeError(
                f"expected a release of trl that calls its model with {ASKED}, got {trl.__version__} without"
            )
        head = _FusedHead(
            head=self._head,
            temperature=self.temperature,
            in_float32=self.args.cast_lm_head_to_fp32,
            with_entropy=True,
            max_chunk_bytes=max_chunk_bytes,
            backend=backend,
        )
        head.put_on(policy)
        if self.ref_model is not None:
            # Loaded from the policy's own configuration: its head is the same.
            reference = self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False)
            head._replace(with_entropy=False).put_on(reference)


class _FusedHead(NamedTuple):
    """The log-probabilities of a model's last hidden states.

    Attributes:
        head: how logits come from hidden states.
        temperature: what logits are divided by.
        in_float32: whether hidden states and output embeddings are multiplied in float32, outside of autocast.
        with_entropy: whether the entropies are computed, too.
        max_chunk_bytes, backend: as in `fused_linear_token_logprobs`.
    """

    head: CausalLMHead
    temperature: float
    in_float32: bool
    with_entropy: bool
    max_chunk_bytes: int | None
    backend: str | None

    def put_on(self, model: Any) -> None:
        """Has `model`, called with TRL's keyword, return these log-probabilities; without it, what it did before."""
        own = model.forward

        # Wrapped, since `generate` reads off the signature what the model takes.
        @functools.wraps(type(model).forward)
        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            if not kwargs.pop(ASKED, False):
                return own(*args, **kwargs)
            return self.outputs(model, *args, **kwargs)

        model.forward = types.MethodType(forward, model)

    def outputs(
        self,
        model: Any,
        *args: Any,
        labels: Tensor | None = None,  # [B, T]
        shift_labels: Tensor | None = None,  # [B, T]
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """TRL's outputs with `log_probs` and `entropy`, each [B, T - 1], or [B, T] of `shift_labels`.

        They are 0 where the next token is not labelled. There is no `loss`, which `GRPOTrainer` does not read.
        """
        backbone = model.get_submodule(self.head.backbone)
        outputs = backbone(*args, **{**kwargs, **without_cache(backbone), "return_dict": True})
        weight, bias = weight_and_bias(self._layer(model))
        # The backbone may end on another device.
        hidden = outputs.last_hidden_state.to(weight.device)
        targets = next_token_targets(hidden, labels, shift_labels, IGNORED, "hidden states")
        if shift_labels is None:
            hidden, targets = hidden[:, :-1], targets[:, :-1]
        valid = targets != IGNORED
        log_probs, entropy = self._of_tokens(hidden[valid], weight, bias, targets[valid])
        return importlib.import_module("trl.trainer.utils").FusedCausalLMOutput(
            log_probs=_spread(log_probs, valid),
            entropy=None if entropy is None else _spread(entropy, valid),
            label_mask=valid,
            aux_loss=_router_loss(model, outputs, kwargs) if kwargs.get("output_router_logits") else None,
        )

    def _layer(self, model: Any) -> Any:
        """The output embeddings; TRL gives them a forward of its own where they are cast to float32."""
        if self.in_float32:
            return model.get_output_embeddings()
        with _without_remedy():
            return output_embeddings(model)

    def _of_tokens(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and, where wanted, entropies [N]."""
        with without_autocast(hidden) if self.in_float32 else nullcontext():
            found: Any = fused_linear_token_logprobs(
                hidden.float() if self.in_float32 else hidden,
                weight,
                targets,
                bias=bias,
                temperature=self.temperature,
                ignore_index=IGNORED,
                softcap=self.head.softcap,
                logit_scale=self.head.logit_scale,
                return_entropy=self.with_entropy,
                max_chunk_bytes=self.max_chunk_bytes,
                backend=self.backend,
            )
        return found if self.with_entropy else (found, None)


def _spread(
    values: Tensor,  # [N]
    valid: Tensor,  # [B, T], with N of True
) -> Tensor:  # [B, T]
    """The values where `valid` is True, and 0 elsewhere."""
    return values.new_zeros(valid.shape).masked_scatter(valid, values)


def _router_loss(model: Any, outputs: Any, arguments: dict[str, Any]) -> Tensor:
    """The load-balancing loss of a mixture of experts, as the model computes it itself."""
    config = model.config.get_text_config()
    mixtral = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    return mixtral.load_balancing_loss_func(
        outputs.router_logits,
        getattr(model, "num_experts", None) or config.num_experts,
        config.num_experts_per_tok,
        arguments.get("attention_mask"),
    )


@contextmanager
def _without_remedy() -> Iterator[None]:
    """Within this context a ValueError about a model's head does not name losses, which a trainer cannot take."""
    try:
        yield
    except ValueError as error:
        raise ValueError(REMEDY.sub("", str(error))) from error
