"""The loss for TRL: `SFTTrainer` with eta, without logits, and with TRL's metrics from the same pass.

`MixCESFTTrainer` takes the place of `SFTTrainer`, and `MixCESFTConfig` that of `SFTConfig`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mixce_kernels.integrations.causal_lm import base_of
from mixce_kernels.integrations.metrics import TokenMetrics
from mixce_kernels.integrations.transformers import transformers, with_linear_mixce_loss
from mixce_kernels.integrations.versions import require
from mixce_kernels.modules import LinearMixCELoss
from mixce_kernels.options import check_eta_number
from mixce_kernels.weightings import PROBABILITY, Weighting, parse

# 1.0 is the first release whose interface is declared stable; 2 is announced to take out what 1.16 warns of.
OLDEST_TRL, BELOW_TRL = "1.0.0", "2"
trl = require("trl", OLDEST_TRL, BELOW_TRL)

SFTConfig: Any = trl.SFTConfig
SFTTrainer: Any = trl.SFTTrainer
Trainer: Any = transformers.Trainer
# TRL's names, and `nll`, the plain cross-entropy in nats: comparable between etas, as the loss is not.
LOGGED = ("entropy", "mean_token_accuracy", "nll")


@dataclass
class MixCESFTConfig(SFTConfig):  # type: ignore[misc]  # TRL's types are not followed
    """`SFTConfig` and the options of the loss.

    `label_smoothing_factor`, an option of every `TrainingArguments`, is the loss's label smoothing. `loss_type` stays
    "nll": eta = 1 is TRL's "nll", eta = 0 its "dft".

    Attributes:
        eta: mixing ratio in [0, 1] at the start; `MixCESFTTrainer.mixce_loss.eta` schedules it.
        weighting: what a token's weight is made from, as `mixce_kernels.weightings.parse` reads it: "Power(alpha=0.5)".
            A weighting itself is taken, too, and kept as that string. A function of one's own is no configuration:
            assign it to `MixCESFTTrainer.mixce_loss.weighting`.
        z_loss, max_chunk_bytes, backend: as in `fused_linear_mixce_loss`.
    """

    eta: float = field(
        default=0.5,
        metadata={
            "help": "Mixing ratio of the loss, from 1 (forward cross-entropy, TRL's 'nll') to 0 (its reverse "
            "approximation, TRL's 'dft')."
        },
    )
    weighting: str = field(
        default=repr(PROBABILITY),
        metadata={
            "help": "f of a token's weight eta + (1 - eta) f, such as 'Power(alpha=0.5)', 'Variance' or "
            "'Entropy(alpha=1.0, scale=3.0)'."
        },
    )
    z_loss: float = field(
        default=0.0, metadata={"help": "Factor of the squared logarithm of the softmax's normaliser in the loss."}
    )
    max_chunk_bytes: int | None = field(
        default=None,
        metadata={"help": "Memory for the logits of a chunk. Unset: 44 MiB or more on a CPU, 1 GiB on a GPU."},
    )
    backend: str | None = field(
        default=None,
        metadata={
            "help": "Whose kernels compute the loss. Unset: the best that can serve.",
            "choices": ["cpu", "cuda", "triton", "reference"],
        },
    )
    loss_type: str = field(
        default="nll", metadata={"help": "'nll', whose place the loss of eta takes.", "choices": ["nll"]}
    )

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            TypeError: an option of the loss is not a number.
            ValueError: an option of the loss is outside its range, or another option asks for another loss.
        """
        super().__post_init__()
        self.eta = check_eta_number(self.eta)
        given = self.weighting
        # By its repr, since a configuration is written as text.
        self.weighting = repr(parse(repr(given) if isinstance(given, Weighting) else given))
        LinearMixCELoss(
            self.eta,
            label_smoothing=self.label_smoothing_factor,
            z_loss=self.z_loss,
            max_chunk_bytes=self.max_chunk_bytes,
            backend=self.backend,
        )
        if self.loss_type == "dft":
            raise ValueError("expected loss_type='nll' with eta, got 'dft': this is the loss of eta=0")
        # In some releases of TRL this is "nll" by a patch of the model.
        if self.loss_type == "chunked_nll":
            self.loss_type = "nll"
        if self.loss_type != "nll":
            raise ValueError(f"expected loss_type='nll' with eta, got {self.loss_type!r}")
        liger = self.liger_kernel_config or {}
        if self.use_liger_kernel and liger.get("fused_linear_cross_entropy", True):
            raise ValueError(
                "expected use_liger_kernel=False, or liger_kernel_config={'fused_linear_cross_entropy': False}, since "
                "Liger's loss would take the place of this one"
            )


class _LinearLossTrainer(Trainer):  # type: ignore[misc]  # Transformers' types are not followed
    """`Trainer` of a model whose loss needs no logits.

    As a base that stands behind `SFTTrainer` it gets the model that this has loaded, resized and wrapped by PEFT, and
    before anything else was made of it.

    Attributes:
        mixce_loss: the model's `LinearMixCEForCausalLMLoss`; assign a number or a tensor to its `eta` to schedule it.
    """

    def __init__(self, model: Any, args: MixCESFTConfig, **kwargs: Any) -> None:
        """Takes what `Trainer` takes; raises as `with_linear_mixce_loss` does."""
        base = base_of(model)
        linear = with_linear_mixce_loss(
            base,
            args.eta,
            label_smoothing=args.label_smoothing_factor,
            z_loss=args.z_loss,
            weighting=parse(args.weighting),
            max_chunk_bytes=args.max_chunk_bytes,
            metrics=_BatchMetrics(),
            backend=args.backend,
        )
        if base is model:
            model = linear
        elif model.base_model is base:  # prompt learning has no tuner between the two
            model.base_model = linear
        else:
            model.base_model.model = linear
        self.mixce_loss = linear.mixce_loss
        super().__init__(model=model, args=args, **kwargs)


class MixCESFTTrainer(SFTTrainer, _LinearLossTrainer):  # type: ignore[misc]  # TRL's types are not followed
    """TRL's `SFTTrainer` with the MixCE loss in the place of its cross-entropy and of its "dft" loss.

        trainer = MixCESFTTrainer(model, MixCESFTConfig(eta=0.5, ...), train_dataset=..., processing_class=tokenizer)
        trainer.train()

    A step is one forward, without logits; the loss is that of `fused_linear_mixce_loss`. Logged are TRL's `entropy`,
    `mean_token_accuracy` and `num_tokens` from the same pass, and `nll`, the plain cross-entropy, which is comparable
    between etas. As in TRL from 1.4 on, a batch's mean is over its tokens with a label, on all processes, and what is
    logged is the mean of these over the batches since the last log, or of the evaluation.

    The model is trained through a copy of it that shares its weights, `trainer.model`: the one passed in keeps its own
    loss. A `PeftModel` passed in is not copied: it has this loss from then on.
    Source: Zhang et al., "MixCE", ACL 2023 (arXiv 2305.16958).

    Attributes:
        mixce_loss: holds `eta`; assign a number or a tensor to schedule it. In a callback it is `model.mixce_loss`.
            Likewise `weighting`, which may be a function of one's own.
    """

    # For the model card.
    _name = "MixCE"
    _tag_names = ("trl", "sft", "mixce")
    _paper: ClassVar[dict[str, str]] = {
        "title": "MixCE: Training Autoregressive Language Models by Mixing Forward and Reverse Cross-Entropies",
        "id": "2305.16958",
    }

    def __init__(self, model: Any, args: MixCESFTConfig | None = None, **kwargs: Any) -> None:
        """Takes what `SFTTrainer` takes, all but the first two by name.

        Args:
            model: the name or path of a causal language model, a `transformers.PreTrainedModel` as
                `with_linear_mixce_loss` takes it, or one of these wrapped by PEFT.
            args: None: that of the defaults.
            **kwargs: `train_dataset`, `processing_class`, `peft_config`, ... of `SFTTrainer`.

        Raises:
            TypeError: `args` is no `MixCESFTConfig`.
            ValueError: another loss was passed; the model's logits are not those of a plain linear layer, or of a copy
                of it that PEFT trains; the model has a router's loss; or the parallelism is one of those that the loss
                cannot serve (ZeRO stage 3, `nn.DataParallel`, sequence parallelism).
        """
        args = MixCESFTConfig() if args is None else args
        if not isinstance(args, MixCESFTConfig):
            raise TypeError(f"expected args to be a MixCESFTConfig, got {type(args).__name__}")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("expected compute_loss_func=None, since the loss is that of eta")
        if getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", 0) == 3:
            raise ValueError("expected a ZeRO stage below 3, where a model's forward has the whole head, got 3")
        # Of each batch since the last log, still on its device: the sums of LOGGED over the tokens with a label, the
        # number of these, and that of all tokens, [5].
        self._batches: dict[str, list[Tensor]] = {"train": [], "eval": []}
        with warnings.catch_warnings():
            # Of a second forward, which there is none of here.
            warnings.filterwarnings("ignore", message="`label_smoothing_factor` is deprecated", category=FutureWarning)
            super().__init__(model, args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError("expected one GPU a process, since the copies of nn.DataParallel would share the metrics")
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if getattr(parallelism, "sp_enabled", False):
            raise ValueError("expected sp_size=1, since the loss is not added up over parts of a sequence")
        if self.aux_loss_enabled:
            raise ValueError(
                "expected a model without a router's loss, which is not computed here: set router_aux_loss_coef=0.0, "
                "or output_router_logits=False in the model's configuration"
            )
        # Newer releases of TRL patch the instance for a loss of their own.
        vars(base_of(self.model)).pop("forward", None)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """The loss of a batch, whose metrics are kept for the next log.

        Args:
            model: `self.model`, as it is or wrapped for several processes.
            inputs: the batch: `input_ids` [B, T], `labels` [B, T], ...
            return_outputs: whether logits are wanted, too: for these the model runs once more.
            num_items_in_batch: the tokens of all micro-batches and processes; None: the mean over this batch.

        Returns:
            The loss, or a pair of it and the model's outputs with logits [B, T, V].

        Raises:
            ValueError: the batch has no labels.
        """
        labels = inputs.get("labels", inputs.get("shift_labels"))
        if labels is None:
            raise ValueError(f"expected a batch with labels, got one with {', '.join(inputs)}")
        loss = model(**{**inputs, "use_cache": False}, num_items_in_batch=num_items_in_batch).loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The tokens are those of all processes, over which gradients are averaged.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        # As TRL counts them, with a label or without.
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else torch.tensor(labels.numel())
        sums = self.mixce_loss.metrics.take()
        sums = torch.cat([sums, tokens.to(sums)[None]])
        mode = "train" if self.model.training else "eval"
        self._batches[mode].append(self.accelerator.gather_for_metrics(sums[None]).sum(0))
        if not return_outputs:
            return loss
        with torch.no_grad():
            outputs = model(**{name: value for name, value in inputs.items() if "labels" not in name}, use_cache=False)
        return loss, outputs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, and unless it is wanted alone logits [B, T, V] and labels [B, T] of a batch of an evaluation."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs.logits, inputs.get("labels")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs `logs` and the metrics of the batches since the last log, which are read from the device here."""
        for mode, batches in self._batches.items():
            if not batches:
                continue
            rows = torch.stack(batches).tolist()
            batches.clear()
            *columns, labelled, tokens = zip(*rows, strict=True)
            if mode == "train":
                self._total_train_tokens += int(sum(tokens)) // self.get_tp_size()
            metrics = self._metrics[mode]
            metrics["num_tokens"] = [self._total_train_tokens]
            for name, sums in zip(LOGGED, columns, strict=True):
                metrics[name] += [total / max(count, 1) for total, count in zip(sums, labelled, strict=True)]
        super().log(logs, start_time)


class _BatchMetrics(TokenMetrics):
    """The sums of the last batch alone."""

    def take(self) -> Tensor:
        """The sums over tokens of LOGGED, and the number of these tokens: [4] float64. Starts anew."""
        assert self._sums is not None
        nll, _, _, entropy, correct, tokens = self._sums
        self._sums = None
        return torch.stack([entropy, correct, nll, tokens])
