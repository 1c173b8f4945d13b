"""Heads that `with_linear_mixce_loss` refuses: those that do more than multiply, and weights that it cannot read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_transformers import oracle
from test_transformers_heads import adapted, assert_trains_as_its_logits, move
from test_transformers_linear import ETA, TOLERANCE
from torch import Tensor, nn
from torch.nn.utils import prune

from mixce_kernels.integrations.transformers import MixCEForCausalLMLoss, with_linear_mixce_loss
from support.causal_models import VOCAB_SIZE, assert_close, batch_of, gradients_of, model_of

REMEDY = "MixCEForCausalLMLoss takes the model's logits"


class Quantized(Tensor):
    """A weight in eighths, held as int8, that says it is of another type: as torchao's."""

    @staticmethod
    def __new__(cls, eighths: Tensor, dtype: torch.dtype) -> Quantized:
        return Tensor._make_wrapper_subclass(cls, eighths.shape, dtype=dtype)

    def __init__(self, eighths: Tensor, dtype: torch.dtype) -> None:
        self.eighths = eighths

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].eighths, args[0].dtype)
        plain = [one.eighths.to(one.dtype) / 8 if isinstance(one, cls) else one for one in args]
        return function(*plain, **(kwargs or {}))


def quantize(head: nn.Linear) -> None:
    weight = Quantized((8 * head.weight.detach()).to(torch.int8), head.weight.dtype)
    head.weight = nn.Parameter(weight, requires_grad=False)


def replace_forward(head: nn.Linear) -> None:
    head.forward = functools.partial(nn.functional.linear, weight=-head.weight)


def halve(_: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (arguments[0] / 2,)


HOOKED = "expected output embeddings without hooks, which do not run where there are no logits, got {} in {}: "
# What changes a head, and the sentence.
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "pruned": (
        lambda head: prune.l1_unstructured(head, "weight", 0.5),
        HOOKED.format("L1Unstructured", "_forward_pre_hooks"),
    ),
    "old weight_norm": (nn.utils.weight_norm, HOOKED.format("WeightNorm", "_forward_pre_hooks")),
    "old spectral_norm": (nn.utils.spectral_norm, HOOKED.format("SpectralNorm", "_forward_pre_hooks")),
    "forward pre-hook": (
        lambda head: head.register_forward_pre_hook(halve),
        HOOKED.format("halve", "_forward_pre_hooks"),
    ),
    "forward hook": (
        lambda head: head.register_forward_hook(lambda module, inputs, output: output / 2),
        HOOKED.format(r".*lambda>", "_forward_hooks"),
    ),
    "backward pre-hook": (
        lambda head: head.register_full_backward_pre_hook(lambda module, gradients: (gradients[0] / 2,)),
        HOOKED.format(r".*lambda>", "_backward_pre_hooks"),
    ),
    "backward hook": (
        lambda head: head.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] / 2,)),
        HOOKED.format(r".*lambda>", "_backward_hooks"),
    ),
    "forward": (
        replace_forward,
        "expected output embeddings with the forward of torch.nn.modules.linear.Linear, got another: ",
    ),
    "quantized": (
        quantize,
        "expected output embeddings whose weight is a torch.nn.Parameter, got test_.*.Quantized: ",
    ),
}


@pytest.mark.filterwarnings("ignore:`?torch.nn.utils.*deprecated")
@pytest.mark.parametrize("case", REFUSED)
def test_heads_that_are_refused(case: str) -> None:
    """When the model is made, and at a call if the head became such later; what the sentence names does serve it."""
    change, sentence = REFUSED[case]
    tokens, labels = batch_of()
    # In training old spectral_norm computes another weight for each call.
    model = model_of("llama", torch.float64).eval()
    linear = with_linear_mixce_loss(model, ETA)
    change(model.lm_head)
    with pytest.raises(ValueError, match=f"^{sentence}{REMEDY}$"):
        with_linear_mixce_loss(model, ETA)
    with pytest.raises(ValueError, match=f"^{sentence}{REMEDY}$"):
        linear(tokens, labels=labels)
    expected = oracle(model(tokens).logits, labels)
    expected.backward()
    gradients = gradients_of(model)
    model.loss_function = MixCEForCausalLMLoss(ETA)
    loss = model(tokens, labels=labels).loss
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    loss.backward()
    assert_close(gradients_of(model), gradients)


def test_weights_that_are_refused() -> None:
    tokens, labels = batch_of()
    model = model_of("phi")
    linear = with_linear_mixce_loss(model)
    bias = model.lm_head.bias
    model.lm_head.bias = nn.Parameter(
        Quantized(torch.zeros(VOCAB_SIZE, dtype=torch.int8), torch.float32), requires_grad=False
    )
    with pytest.raises(
        ValueError, match=r"^expected output embeddings whose bias is a .* got test_.*\.Quantized: MixCE"
    ):
        linear(tokens, labels=labels)
    model.lm_head.bias = bias
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    integers = r"^expected output embeddings of float32, .*, float64, got a weight of torch\.int8: MixCEForCausalLMLoss"
    with pytest.raises(ValueError, match=integers):
        with_linear_mixce_loss(model)
    with pytest.raises(ValueError, match=integers):
        linear(tokens, labels=labels)
    model.lm_head.weight = nn.Parameter(torch.empty(VOCAB_SIZE, 16, device="meta"))
    unloaded = r"^expected output embeddings that are loaded, got a weight on the meta device \(MixCEForCausalLMLoss"
    with pytest.raises(ValueError, match=unloaded):
        with_linear_mixce_loss(model)
    with pytest.raises(ValueError, match=unloaded):
        linear(tokens, labels=labels)


def test_an_offloaded_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    tokens, labels = batch_of()
    model = model_of("llama", torch.float64)
    linear = with_linear_mixce_loss(model, ETA)
    expected = oracle(model(tokens).logits, labels)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"^expected output embeddings that are loaded"):
        with_linear_mixce_loss(model)
    with pytest.raises(ValueError, match=r"^expected output embeddings that are loaded"):
        linear(tokens, labels=labels)
    model.loss_function = MixCEForCausalLMLoss(ETA)
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("llama", {"target_modules": ["lm_head"]}, r"peft\.tuners\.lora\.layer\.Linear"),
        ("qwen2", {"trainable_token_indices": {"embed_tokens": [1, 2]}}, r"peft\.utils\.other\.TrainableTokensWrapper"),
    ],
)
def test_adapters_on_the_head_are_refused(name: str, changes: dict[str, Any], kind: str) -> None:
    peft = pytest.importorskip("peft")
    tokens, labels = batch_of()
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes}
    sentence = f"^expected output embeddings that are a torch.nn.Linear, got {kind}: {REMEDY}$"
    model = peft.get_peft_model(with_linear_mixce_loss(model_of(name, torch.float64), ETA), peft.LoraConfig(**options))
    with pytest.raises(ValueError, match=sentence):
        model(input_ids=tokens, labels=labels)
    model = peft.get_peft_model(model_of(name, torch.float64), peft.LoraConfig(**options))
    move(model)
    with pytest.raises(ValueError, match=sentence):
        with_linear_mixce_loss(model.get_base_model())
    expected = oracle(model(input_ids=tokens).logits, labels)
    model.get_base_model().loss_function = MixCEForCausalLMLoss(ETA)
    torch.testing.assert_close(model(input_ids=tokens, labels=labels).loss, expected, **TOLERANCE)


def test_adapters_of_each_row_are_refused() -> None:
    """PEFT tells the wrapper of the copies by a hook which row has which copy."""
    tokens, labels = batch_of()
    model = adapted("llama").eval()
    names = {"input_ids": tokens, "adapter_names": ["default", "__base__", "default"]}
    assert torch.isfinite(model(**names).logits).all()
    with pytest.raises(ValueError, match=r"^expected output embeddings without hooks, .* in _forward_pre_hooks: MixCE"):
        model(**names, labels=labels)


def test_hooks_on_a_copy_are_refused() -> None:
    tokens, labels = batch_of()
    model = adapted("llama")
    wrapper = model.get_output_embeddings()
    for module in (wrapper, wrapper.modules_to_save["default"]):
        handle = module.register_forward_pre_hook(halve)
        with pytest.raises(ValueError, match=r"^expected output embeddings without hooks, .* got halve in"):
            model(input_ids=tokens, labels=labels)
        handle.remove()
    # Those of a layer that is not active do not run.
    wrapper.original_module.register_forward_pre_hook(halve)
    assert_trains_as_its_logits(model)
    quantize(wrapper.modules_to_save["default"])
    with pytest.raises(ValueError, match=r"^expected output embeddings whose weight is a torch\.nn\.Parameter"):
        model(input_ids=tokens, labels=labels)
