"""`MixCELoss` and `LinearMixCELoss`: the losses as modules."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from mixce_kernels.functional import linear_mixce_loss, mixce_loss
from mixce_kernels.mixture import check_is_weighting
from mixce_kernels.options import LinearOptions, LossOptions, check_eta_number
from mixce_kernels.parallel.shard import Sharding
from mixce_kernels.stats import MixCEStats
from mixce_kernels.weightings import PROBABILITY, CustomWeighting


class _Loss(nn.Module):
    """What stays the same over a training run: eta, and the options in records."""

    def __init__(self, eta: float | Tensor, options: LossOptions, *others: LinearOptions | Sharding) -> None:
        super().__init__()
        options.for_tokens()
        options.check_reduction_name()
        check_is_weighting(options.weighting)
        self.eta = eta if isinstance(eta, Tensor) else check_eta_number(eta)
        self.options = options
        self.records = (options, *others)

    def extra_repr(self) -> str:
        changed = {"eta": self.eta}
        for record in self.records:
            changed |= {
                name: value for name, value in record._asdict().items() if value != record._field_defaults[name]
            }
        return ", ".join(f"{name}={value}" for name, value in changed.items())


class MixCELoss(_Loss):
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
        weighting: CustomWeighting = PROBABILITY,
        inplace_backward: bool = False,
        grad_in_forward: bool = False,
        return_stats: bool = False,
        validate: bool = False,
        backend: str | None = None,
    ) -> None:
        """Takes the options of `fused_mixce_loss`.

        Raises:
            TypeError: an option is not a number, or the weighting no function.
            ValueError: an option is outside its range.
        """
        options = LossOptions(
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss,
            softcap=softcap, logit_scale=logit_scale, weighting=weighting, inplace_backward=inplace_backward,
            grad_in_forward=grad_in_forward, return_stats=return_stats, validate=validate, backend=backend,
        )  # fmt: skip
        super().__init__(eta, options)

    def forward(
        self,
        logits: Tensor,  # [..., V]
        targets: Tensor,  # [...]
        *,
        token_weights: Tensor | None = None,  # [...]
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MixCEStats]:
        """The loss of a batch: arguments, results and errors of `fused_mixce_loss`."""
        options = self.options._replace(token_weights=token_weights, num_items_in_batch=num_items_in_batch)
        return mixce_loss(logits, targets, self.eta, options)


class LinearMixCELoss(_Loss):
    """`fused_linear_mixce_loss` as an `nn.Module`.

    The weight belongs to the model and comes with the call, so that one tied to the embedding stays tied:
    `loss(hidden, model.lm_head.weight, targets)`. `eta` is a plain attribute: assign a number or a tensor to schedule
    it.
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
        weighting: CustomWeighting = PROBABILITY,
        inplace_backward: bool = False,
        grad_in_forward: bool = False,
        return_stats: bool = False,
        validate: bool = False,
        max_chunk_bytes: int | None = None,
        path: str = "chunks",
        group: dist.ProcessGroup | None = None,
        vocab_start: int | None = None,
        vocab_size: int | None = None,
        check_group: bool = True,
        backend: str | None = None,
    ) -> None:
        """Takes the options of `fused_linear_mixce_loss`. With a group it can be neither copied nor pickled.

        Raises:
            TypeError: an option is not a number, or the weighting no function.
            ValueError: an option is outside its range.
        """
        options = LossOptions(
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss,
            softcap=softcap, logit_scale=logit_scale, weighting=weighting, inplace_backward=inplace_backward,
            grad_in_forward=grad_in_forward, return_stats=return_stats, validate=validate, backend=backend,
        )  # fmt: skip
        linear = LinearOptions(max_chunk_bytes=max_chunk_bytes, path=path)
        sharding = Sharding(group=group, vocab_start=vocab_start, vocab_size=vocab_size, check_group=check_group)
        linear.check(backend, sharded=group is not None)
        sharding.check_group_is_named()
        super().__init__(eta, options, linear, sharding)
        self.linear = linear
        self.sharding = sharding

    def forward(
        self,
        hidden: Tensor,  # [..., D]
        weight: Tensor,  # [V, D]
        targets: Tensor,  # [...]
        *,
        bias: Tensor | None = None,  # [V]
        token_weights: Tensor | None = None,  # [...]
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MixCEStats]:
        """The loss of a batch: arguments, results and errors of `fused_linear_mixce_loss`."""
        options = self.options._replace(token_weights=token_weights, num_items_in_batch=num_items_in_batch)
        return linear_mixce_loss(hidden, weight, bias, targets, self.eta, options, self.linear, self.sharding)
