"""The targets of a causal language model's positions, and the function by which its head computes logits."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixce_kernels.checks import TARGET_DTYPES
from mixce_kernels.integrations.output_embeddings import output_embeddings, weight_and_bias

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names under which configurations keep a factor or a cap of the logits: `logit_scale`, `logits_scaling`,
# `lm_head_multiplier`, `final_logit_softcapping`, ... A trial finds the meaning of a value; its name does not tell.
LOGIT_OPTIONS = re.compile("logit|soft_?cap|multiplier")
# The largest logit of the trial: far above every cap in use, so that a cap shows in every dtype.
LARGEST_LOGIT = 200.0
SMALLEST = torch.finfo(torch.float32).tiny


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
    Views that are both shifted already are recognised by their strides; copies of such slices cannot be recognised.

    Raises:
        TypeError: there are no labels, or they are no tensor of int64 or int32.
        ValueError: labels and values do not have the same positions, or labels have no dimension to be shifted along.
    """
    given, label_name = (labels, "labels") if shift_labels is None else (shift_labels, "shift_labels")
    if not isinstance(given, Tensor):
        raise TypeError(f"expected labels to be a tensor, got {type(given).__name__}")
    if given.dtype not in TARGET_DTYPES:
        raise TypeError(f"expected {label_name} of int64, int32, got {given.dtype}")
    positions = list(values.shape[:-1])
    if list(given.shape) != positions:
        message = f"expected {label_name} of shape {positions} for {name} of shape {list(values.shape)}"
        message += f", got {list(given.shape)}"
        if shift_labels is None and given.dim() == len(positions) > 0 and abs(given.shape[-1] - positions[-1]) == 1:
            message += f": pass {name} and labels as they are, they are shifted here (or shifted ones as shift_labels)"
        raise ValueError(message)
    given = given.to(values.device)
    if shift_labels is not None:
        return given
    if given.dim() < 2:
        raise ValueError(
            f"expected labels of shape [B, T], got {list(given.shape)}: flattened ones would be shifted across "
            "sequences (pass shifted ones as shift_labels)"
        )
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
            ValueError: `output_embeddings` or `weight_and_bias` refuses the output embeddings, the model's logits are
                not such a function of its last hidden states, or its own loss has terms besides that of the logits.
        """
        layer = output_embeddings(model)
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"expected a decoder alone, got {type(model).__name__} with an encoder")
        # Bamba's: a mean over all positions, labelled or not.
        if getattr(model.config, "z_loss_coefficient", 0):
            raise ValueError(
                "expected z_loss_coefficient=0 in the model's configuration, whose z-loss is not computed here, got "
                f"{model.config.z_loss_coefficient} (z_loss is an option of the loss)"
            )
        refused = ValueError(
            "expected logits that are the product of output embeddings and last hidden states, scaled and capped by "
            f"numbers in the configuration, got others from {type(model).__name__}: MixCEForCausalLMLoss takes these"
        )
        with torch.no_grad(), _evaluating(layer):
            weight, bias = weight_and_bias(layer)
            try:
                trial = _Trial.of(model, layer, weight, bias)
            except Exception as error:  # of any kind: a model that cannot be tried, as one that wants an image
                raise refused from error
            if trial is None:
                raise refused
            # Some roundings of the model's own, in its dtype or the one that it turns logits into.
            tolerance = 8 * max(torch.finfo(trial.hidden.dtype).eps, torch.finfo(trial.logits.dtype).eps)
            raw = F.linear(trial.hidden, weight, bias).double()
            for logit_scale, softcap in _candidates(model):
                found = cls(trial.backbone, logit_scale, softcap)
                expected = found.apply(raw)
                if trial.logits.shape != expected.shape:
                    break
                if (trial.logits.double() - expected).abs().amax() <= tolerance * expected.abs().amax():
                    _check_takes_all(model, trial.backbone)
                    return found._replace(logit_scale=logit_scale * trial.factor)
        raise refused

    def apply(self, raw: Tensor) -> Tensor:
        """The logits, of the products `raw`."""
        scaled = self.logit_scale * raw
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


class _Trial(NamedTuple):
    """The logits of a model for made-up hidden states, which took the place of its backbone's output."""

    backbone: str
    hidden: Tensor  # [1, 2, D], as its head got them
    factor: float  # by which the model had multiplied them
    logits: Tensor  # [1, 2, V]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        layer: nn.Linear,
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
    ) -> _Trial | None:
        """Runs the model with its backbone's output in place; None where its head, `layer`, does not get just that.

        Most models call their base model, some a decoder inside of it: each seems to return other hidden states.
        """
        backbones = [model.base_model, getattr(model, "get_decoder", lambda: None)(), getattr(model, "model", None)]
        generator = torch.Generator().manual_seed(0)
        returned: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if name and any(module is one for one in backbones):
                # Of the weight's width: of a tied copy PEFT 0.21 has in_features and out_features the wrong way round.
                states = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight)
                raw = F.linear(states, weight, bias)
                returned[name] = states * LARGEST_LOGIT / raw.abs().amax().clamp(min=SMALLEST)
        seen: list[Tensor] = []
        with ExitStack() as stack:
            for name, states in returned.items():
                stack.enter_context(_returning(model.get_submodule(name), _Hidden(states)))
            watch = layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
            stack.callback(watch.remove)
            if not returned:
                return None
            tokens = torch.zeros(1, 2, dtype=torch.int64, device=weight.device)
            logits = model(input_ids=tokens, return_dict=True, **without_cache(model)).logits
        for name, states in returned.items():
            if len(seen) == 1 and seen[0].shape == states.shape:
                factor = _factor(states.double(), seen[0].double(), torch.finfo(states.dtype).eps)
                if factor is not None and (factor == 1.0 or bias is None):
                    return cls(name, seen[0], factor, logits)
        return None


def _factor(states: Tensor, scaled: Tensor, eps: float) -> float | None:
    """The number f for which scaled = f * states, to a rounding; None where there is none."""
    if torch.equal(states, scaled):
        return 1.0
    factor = (states * scaled).sum() / states.square().sum()
    off = (scaled - factor * states).abs().amax()
    return factor.item() if off <= 2 * eps * scaled.abs().amax() else None


def _check_takes_all(model: PreTrainedModel, backbone: str) -> None:
    """Raises ValueError where a decoder that is not the base model would not see what the model is called with.

    That is an encoder's output or an image, which a model of several parts brings together before its decoder.
    """
    module = model.get_submodule(backbone)
    if module is model.base_model:
        return
    lost = _named(model) - _named(module) - {"labels", "logits_to_keep", "num_logits_to_keep"}
    if lost:
        raise ValueError(
            f"expected a decoder that takes all that {type(model).__name__} takes, got one without "
            f"{', '.join(sorted(lost))}: MixCEForCausalLMLoss takes the model's logits"
        )


def _named(module: nn.Module) -> set[str]:
    """The names of the arguments of a module's forward."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {one.name for one in parameters if one.kind != inspect.Parameter.VAR_KEYWORD}


def base_of(model: Any) -> Any:
    """The causal language model inside of a `PeftModel`, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def without_cache(module: nn.Module) -> dict[str, bool]:
    """The keyword that keeps a module from caching keys and values for a generation, where it takes that keyword."""
    return {"use_cache": False} if "use_cache" in _named(module) else {}


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
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within this context the module's parametrizations do not change or draw anything when a weight is read."""
    modes = [(one, one.training) for one in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for one, mode in modes:
            one.training = mode


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
