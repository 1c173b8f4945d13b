"""Heads that `with_linear_mixce_loss` serves: those whose weight is computed, copied by PEFT, or changed later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_transformers import oracle
from test_transformers_linear import ETA, TOLERANCE
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from mixce_kernels.integrations.transformers import with_linear_mixce_loss
from support.causal_models import VOCAB_SIZE, WHOLE_GRAPHS, assert_close, batch_of, gradients_of, model_of


def assert_trains_as_its_logits(model: Any) -> dict[str, Tensor]:
    """Loss and gradients beside the plain formula's of a copy: reading a weight may change it. Returns gradients."""
    tokens, labels = batch_of()
    plain = copy.deepcopy(model)
    expected = oracle(plain(input_ids=tokens).logits, labels)
    expected.backward()
    outputs = model(input_ids=tokens, labels=labels)
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, expected.detach(), **TOLERANCE)
    outputs.loss.backward()
    gradients = gradients_of(model)
    assert_close(gradients, gradients_of(plain))
    return gradients


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


class Dropped(nn.Module):
    """A parametrization that draws something at every access in training."""

    def forward(self, value: Tensor) -> Tensor:
        return nn.functional.dropout(value, training=self.training)


COMPUTED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "weight": ("llama", lambda head: parametrize.register_parametrization(head, "weight", Doubled())),
    "tied weight": ("qwen2", lambda head: parametrize.register_parametrization(head, "weight", Doubled())),
    "bias": ("phi", lambda head: parametrize.register_parametrization(head, "bias", Doubled())),
    "scaled": ("granite", lambda head: parametrize.register_parametrization(head, "weight", Doubled())),
    "weight_norm": ("llama", parametrizations.weight_norm),
    "spectral_norm": ("llama", parametrizations.spectral_norm),
    "orthogonal": ("llama", parametrizations.orthogonal),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", COMPUTED)
def test_a_parametrized_head(case: str, when: str) -> None:
    name, change = COMPUTED[case]
    model = model_of(name, torch.float64)
    if when == "before":
        change(model.lm_head)
    before = state_of(model)
    linear = with_linear_mixce_loss(model, ETA)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    if when == "after":
        change(model.lm_head)
    gradients = assert_trains_as_its_logits(linear)
    assert any("lm_head.parametrizations" in key for key in gradients) or case == "tied weight"


def test_a_weight_is_computed_once_a_call() -> None:
    """Random ones would be another weight in the backward; this seed draws the same for loss and logits."""
    tokens, labels = batch_of()
    model = model_of("llama", torch.float64)
    parametrize.register_parametrization(model.lm_head, "weight", Dropped())
    linear = with_linear_mixce_loss(model, ETA)
    torch.manual_seed(5)
    expected = oracle(model(tokens).logits, labels)
    torch.manual_seed(5)
    loss = linear(tokens, labels=labels).loss
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    expected.backward()
    gradients = gradients_of(model)
    loss.backward()
    assert_close(gradients_of(linear), gradients)


def adapted(name: str, linear_first: bool = True, **changes: Any) -> Any:
    """A model under LoRA that trains copies of its head and embeddings, all moved away from where they began."""
    peft = pytest.importorskip("peft")
    saved = {"modules_to_save": ["lm_head", "embed_tokens"]}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **{**saved, **changes})
    model = model_of(name, torch.float64)
    if linear_first:
        wrapped = peft.get_peft_model(with_linear_mixce_loss(model, ETA), config)
    else:
        wrapped = peft.get_peft_model(model, config)
        wrapped.base_model.model = with_linear_mixce_loss(wrapped.get_base_model(), ETA)
    move(wrapped)
    return wrapped


def move(model: Any) -> None:
    """Adds noise to what is trained."""
    generator = torch.Generator().manual_seed(4)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


def loss_of(model: Any) -> float:
    tokens, labels = batch_of()
    return model(input_ids=tokens, labels=labels).loss.item()


@pytest.mark.parametrize("linear_first", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi", "granite"])
def test_a_trained_copy_of_the_head(name: str, linear_first: bool) -> None:
    gradients = assert_trains_as_its_logits(adapted(name, linear_first))
    assert any("lm_head.modules_to_save.default.weight" in key for key in gradients)
    assert not any("original_module" in key for key in gradients)


@pytest.mark.parametrize("linear_first", [True, False])
def test_copies_that_are_tied(linear_first: bool) -> None:
    peft = pytest.importorskip("peft")
    if "ensure_weight_tying" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("this release of PEFT does not tie copies")
    model = adapted("qwen2", linear_first, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    layers = (model.get_output_embeddings(), model.get_input_embeddings())
    assert layers[0].modules_to_save["default"].weight is layers[1].modules_to_save["default"].weight
    assert_trains_as_its_logits(model)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_active_copy_counts(name: str) -> None:
    """Of several adapters, of one without a copy, of none, and of what is merged."""
    peft = pytest.importorskip("peft")
    model = adapted(name)
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model.add_adapter("second", peft.LoraConfig(**options, modules_to_save=["lm_head", "embed_tokens"]))
    model.add_adapter("without", peft.LoraConfig(**options))
    losses = {}
    for adapter in ("second", "without", "default"):
        model.set_adapter(adapter)
        if adapter == "second":
            move(model)
        gradients = assert_trains_as_its_logits(model)
        assert any(f"lm_head.modules_to_save.{adapter}." in key for key in gradients) == (adapter != "without")
        losses[adapter] = loss_of(model)
    with model.disable_adapter():
        losses["disabled"] = loss_of(model)
        tokens, labels = batch_of()
        expected = oracle(model(input_ids=tokens).logits, labels)
        torch.testing.assert_close(torch.tensor(losses["disabled"]).to(expected), expected, **TOLERANCE)
    assert losses["disabled"] == pytest.approx(loss_of(with_linear_mixce_loss(model_of(name, torch.float64), ETA)))
    # The other copies are other heads; LoRA's second factor begins at zero, so "without" is the model itself.
    assert losses["without"] == pytest.approx(losses["disabled"])
    assert len({round(losses[key], 6) for key in ("default", "second", "without")}) == 3
    assert loss_of(model) == losses["default"]
    model.merge_adapter()
    assert loss_of(model) == pytest.approx(losses["default"], rel=1e-6)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert type(merged.get_output_embeddings()) is nn.Linear
    assert loss_of(merged) == pytest.approx(losses["default"], rel=1e-6)
    assert_trains_as_its_logits(merged.requires_grad_(True))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["copied", "parametrized"])
def test_compiled(head: str) -> None:
    torch._dynamo.reset()
    tokens, labels = batch_of()
    if head == "copied":
        model = adapted("llama").get_base_model()
    else:
        model = with_linear_mixce_loss(model_of("llama", torch.float64), ETA)
        parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    expected = model(tokens, labels=labels).loss
    expected.backward()
    gradients = gradients_of(model)
    loss = torch.compile(model, fullgraph=WHOLE_GRAPHS, backend="aot_eager")(tokens, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), **TOLERANCE)
    assert_close(gradients_of(model), gradients)


def test_exported() -> None:
    """The tracer's own tensors stand in for the weights."""
    tokens, labels = batch_of()
    linear = with_linear_mixce_loss(model_of("llama", torch.float64), ETA)
    inputs = {"input_ids": tokens, "labels": labels}
    exported = torch.export.export(linear, (), inputs, strict=False).module()
    torch.testing.assert_close(exported(**inputs).loss, linear(**inputs).loss, **TOLERANCE)


def test_heads_that_change_into_plain_ones() -> None:
    model = model_of("qwen2", torch.float64)
    linear = with_linear_mixce_loss(model, ETA)
    prune.l1_unstructured(model.lm_head, "weight", 0.5)
    prune.remove(model.lm_head, "weight")
    assert_trains_as_its_logits(linear)
    model.lm_head = nn.Linear(16, VOCAB_SIZE, bias=True, dtype=torch.float64)
    assert "lm_head.bias" in assert_trains_as_its_logits(linear)
    model.lm_head = nn.Linear(16, VOCAB_SIZE, bias=False, dtype=torch.float64)
    linear.tie_weights()
    assert linear.lm_head.weight is linear.model.embed_tokens.weight
    assert_trains_as_its_logits(linear)


def test_hooks_of_accelerate_on_the_head() -> None:
    """They replace its forward; taken off, they leave the class's own in the layer itself."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = model_of("llama", torch.float64)
    linear = with_linear_mixce_loss(model, ETA)
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook(execution_device="cpu"))
    for _ in range(2):
        assert "forward" in vars(model.lm_head)
        assert_trains_as_its_logits(linear)
        assert_trains_as_its_logits(with_linear_mixce_loss(model, ETA))
        hooks.remove_hook_from_module(model.lm_head)
