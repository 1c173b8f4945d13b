"""What a causal language model's loss needs to know: which label belongs to which position, and what its head does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where configurations keep a factor or a cap of the logits: `logit_scale`, `logits_scaling`, `lm_head_multiplier`,
# `final_logit_softcapping`, ... What a value means is not read off its name but tried.
LOGIT_OPTIONS = re.compile("logit|soft_?cap|multiplier")
# The largest logit of the trial: far above every cap in use, so that a cap shows in every dtype.
LARGEST_LOGIT = 200.0


def next_token_targets(
    values: Tensor,  # [..., T, V] logits or [..., T, D] hidden states
    labels: Tensor | None,  # [..., T]
    shift_labels: Tensor | None,  # [..., T]
    ignore_index: int,
    name: str,  # of the values
) -> Tensor:  # [..., T]
    """The target of each position: the next label; none, so `ignore_index`, at the last position.

    The labels are shifted, not the values: a slice of these would cost a copy or a gradient of their own size. Labels
    that are shifted already, as Transformers passes them where sequences are split over devices, are `shift_labels`.

    Raises:
        TypeError: there are no labels, or they are no tensor.
        ValueError: labels and values do not have the same positions.
    """
    given, label_name = (labels, "labels") if shift_labels is None else (shift_labels, "shift_labels")
    if not isinstance(given, Tensor):
        raise TypeError(f"expected labels to be a tensor, got {type(given).__name__}")
    positions = list(values.shape[:-1])
    if list(given.shape) != positions:
        message = f"expected {label_name} of shape {positions} for {name} of shape {list(values.shape)}"
        message += f", got {list(given.shape)}"
        if shift_labels is None and given.dim() == len(positions) > 0 and abs(given.shape[-1] - positions[-1]) == 1:
            message += f": pass {name} and labels as they are, they are shifted here (or shifted ones as shift_labels)"
        raise ValueError(message)
    if given.dim() == 0:
        raise ValueError(f"expected {label_name} of shape [..., T] with a position for each token, got []")
    given = given.to(values.device)
    if shift_labels is not None:
        return given
    if not torch.compiler.is_compiling() and _are_shifted_views(values, given):
        raise ValueError(
            f"expected {name} and labels that are not shifted yet, got views without the last position and without "
            "the first: pass both as they are, or the shifted labels as shift_labels"
        )
    return F.pad(given, (0, 1), value=ignore_index)[..., 1:]


def _are_shifted_views(values: Tensor, labels: Tensor) -> bool:
    """Whether these are `values[:, :-1]` and `labels[:, 1:]`, which would be shifted a second time."""
    if labels.dim() != 2 or 0 in labels.shape:
        return False
    begins = []
    for tensor in (values, labels):
        row, position = tensor.stride()[:2]
        if position == 0 or row < (labels.shape[1] + 1) * position:
            return False
        begins.append(tensor.storage_offset() % row // position)
    return begins[1] == begins[0] + 1


class CausalLMHead(NamedTuple):
    """How a model's logits come from hidden states h: softcap * tanh(logit_scale * (h @ weight.T + bias) / softcap).

    Attributes:
        backbone: name of the submodule whose last hidden states these are.
        logit_scale: factor of the logits, before the cap.
        softcap: bound of the logits, or None.
    """

    backbone: str
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> CausalLMHead:
        """The head of `model`, found by trying.

        The model computes logits of made-up hidden states, in place of those of its backbone, which does not run. Of
        the factors and caps in its configuration those are taken which give the same logits.

        Raises:
            ValueError: the model has no output embeddings, these are no plain linear layer, or its logits are not such
                a function of its last hidden states.
        """
        head = output_embeddings(model)
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"expected a decoder alone, got {type(model).__name__} with an encoder")
        if head.weight.is_meta:
            raise ValueError(f"expected a model with weights, got {type(model).__name__} on the meta device")
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(1, 2, head.in_features, generator=generator).to(head.weight)
            hidden *= LARGEST_LOGIT / head(hidden).abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            trial = _Trial.of(model, head, hidden)
            if trial is not None:
                raw = head(trial.hidden).double()
                # Some roundings of the model's own, in its dtype or the one that it turns logits into.
                tolerance = 8 * max(torch.finfo(hidden.dtype).eps, torch.finfo(trial.logits.dtype).eps)
                for logit_scale, softcap in _candidates(model):
                    candidate = cls(trial.backbone, logit_scale, softcap)
                    expected = candidate.apply(raw)
                    if trial.logits.shape == expected.shape:
                        error = (trial.logits.double() - expected).abs().amax()
                        if error <= tolerance * expected.abs().amax():
                            return candidate
        raise ValueError(
            "expected logits that are the product of output embeddings and last hidden states, scaled and capped by "
            f"numbers in the configuration, got others from {type(model).__name__}: MixCEForCausalLMLoss takes these"
        )

    def apply(self, raw: Tensor) -> Tensor:
        """The logits, of the products `raw`."""
        scaled = self.logit_scale * raw
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def output_embeddings(model: PreTrainedModel) -> nn.Linear:
    """The layer that makes logits of hidden states; raises ValueError unless it is a linear layer and nothing more."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"expected a model with output embeddings, got {type(model).__name__}, which has none")
    # A subclass may hold the weight in another form, or an adapter beside it.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        raise ValueError(f"expected output embeddings that are a torch.nn.Linear, got {kind}")
    return head


class _Trial(NamedTuple):
    """What a model made of the hidden states that its backbone seemed to return."""

    backbone: str
    hidden: Tensor  # [1, 2, D]
    logits: Tensor  # [1, 2, V]

    @classmethod
    def of(cls, model: PreTrainedModel, head: nn.Linear, hidden: Tensor) -> _Trial | None:
        """Runs the model with its backbone's output in place; None where its head does not get just that.

        Most models call their base model, some a decoder inside of it: each seems to return other hidden states.
        """
        backbones = [model.base_model, getattr(model, "get_decoder", lambda: None)()]
        returned = {
            name: hidden if module is backbones[0] else hidden.flip(1)
            for name, module in model.named_modules()
            if module is not model and any(module is one for one in backbones)
        }
        seen: list[Tensor] = []
        with ExitStack() as stack:
            for name, states in returned.items():
                stack.enter_context(_returning(model.get_submodule(name), _Hidden(states)))
            watch = head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
            stack.callback(watch.remove)
            if returned:
                tokens = torch.zeros(1, 2, dtype=torch.int64, device=hidden.device)
                logits = model(input_ids=tokens, use_cache=False).logits
                for name, states in returned.items():
                    if len(seen) == 1 and seen[0].shape == states.shape and torch.equal(seen[0].to(states), states):
                        return cls(name, states, logits)
        return None


def _candidates(model: PreTrainedModel) -> Iterator[tuple[float, float | None]]:
    """The factors and caps that the numbers in the configuration allow, none first."""
    values = {
        float(value)
        for name, value in model.config.get_text_config().to_dict().items()
        if LOGIT_OPTIONS.search(name) and isinstance(value, (int, float)) and value > 0
    }
    scales = [1.0, *sorted(values), *sorted(1 / value for value in values)]
    return ((scale, softcap) for softcap in (None, *sorted(values)) for scale in scales)


class _Hidden:
    """A backbone's output that holds its last hidden states and, of whatever else a model may ask for, None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


@contextmanager
def _returning(module: nn.Module, output: object) -> Iterator[None]:
    """Within this context, calling the module runs nothing and returns `output`."""
    own = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
