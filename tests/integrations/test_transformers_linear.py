"""`with_linear_mixce_loss`: models of Transformers that train without logits, and what they refuse."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers import LargeTensors, oracle
from torch import Tensor, nn

from mixce_kernels.integrations import TokenMetrics
from mixce_kernels.integrations.transformers import MixCEForCausalLMLoss, with_linear_mixce_loss
from support.causal_models import (
    CONFIGS,
    HEADS,
    VOCAB_SIZE,
    WHOLE_GRAPHS,
    assert_close,
    batch_of,
    config_of,
    gradients_of,
    model_of,
    transformers,
)
from support.ranks import run_ranks

ETA = 0.3
# The reference's loss goes through a model that computes in float32 here and there, ours through the same.
TOLERANCE = {"rtol": 1e-6, "atol": 0.0}


@pytest.mark.parametrize("num_items", [None, torch.tensor(31)])
@pytest.mark.parametrize("name", CONFIGS)
def test_trains_as_with_logits(name: str, num_items: Tensor | None) -> None:
    tokens, labels = batch_of()
    model = model_of(name, torch.float64)
    expected = oracle(model(tokens).logits, labels, num_items_in_batch=num_items)
    expected.backward()
    gradients = gradients_of(model)

    linear = with_linear_mixce_loss(model, ETA)
    assert (linear.mixce_loss.head.logit_scale, linear.mixce_loss.head.softcap) == HEADS.get(name, (1.0, None))
    outputs = linear(tokens, labels=labels, num_items_in_batch=num_items)
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, expected.detach(), **TOLERANCE)
    outputs.loss.backward()
    assert_close(gradients_of(linear), gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_found_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    assert with_linear_mixce_loss(model_of(name, dtype)).mixce_loss.head[1:] == HEADS[name]


def test_there_are_no_logits() -> None:
    """No operator returns as many elements as logits have.

    What the loss's own operator holds meanwhile is measured in test_linear_memory.py.
    """
    tokens, labels = batch_of(rows=4, length=16, ignored=False)
    model = model_of("llama")
    linear = with_linear_mixce_loss(model, ETA, max_chunk_bytes=2 * 4 * VOCAB_SIZE)
    with LargeTensors(labels.numel() * VOCAB_SIZE) as large:
        linear(tokens, labels=labels).loss.backward()
    assert not large.found
    with LargeTensors(labels.numel() * VOCAB_SIZE) as large:
        model(tokens, labels=labels).loss.backward()
    assert large.found


def test_the_model_stays_as_it_was() -> None:
    tokens, labels = batch_of()
    model = model_of("gpt2")
    before = {name: id(value) for name, value in vars(model).items()}
    linear = with_linear_mixce_loss(model, ETA)
    assert {name: id(value) for name, value in vars(model).items()} == before
    assert type(model) is transformers.GPT2LMHeadModel
    assert model(tokens, labels=labels).logits.shape == (*tokens.shape, VOCAB_SIZE)
    # It is a model of the same class, with the same weights.
    assert isinstance(linear, transformers.GPT2LMHeadModel)
    assert linear.lm_head.weight is model.lm_head.weight is model.transformer.wte.weight
    assert [id(weight) for weight in linear.parameters()] == [id(weight) for weight in model.parameters()]


def test_without_labels_it_is_the_model() -> None:
    tokens, _ = batch_of()
    model = model_of("llama").eval()
    linear = with_linear_mixce_loss(model, ETA)
    assert torch.equal(linear(tokens).logits, model(tokens).logits)
    assert torch.equal(linear(input_ids=tokens, return_dict=False)[0], model(tokens).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(linear.generate(tokens, **options), model.generate(tokens, **options))


def test_arguments_of_a_call() -> None:
    tokens, labels = batch_of()
    model = model_of("llama").eval()
    linear = with_linear_mixce_loss(model, ETA, label_smoothing=0.1, z_loss=1e-3)
    own = MixCEForCausalLMLoss(ETA, label_smoothing=0.1, z_loss=1e-3)
    mask = torch.ones_like(tokens)
    mask[1, -3:] = 0
    logits = model(tokens, attention_mask=mask).logits
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    expected = own(logits, labels)
    torch.testing.assert_close(linear(tokens, attention_mask=mask, labels=labels).loss, expected)
    torch.testing.assert_close(linear(tokens, attention_mask=mask, shift_labels=shifted).loss, expected)
    embedded = linear(inputs_embeds=model.get_input_embeddings()(tokens), attention_mask=mask, labels=labels)
    torch.testing.assert_close(embedded.loss, expected)
    other = torch.where(labels == -100, 7, labels.masked_fill(labels == 7, 8))
    torch.testing.assert_close(
        linear(tokens, attention_mask=mask, labels=other, ignore_index=7).loss, own(logits, other, ignore_index=7)
    )


def test_positions_of_hidden_states_are_returned_where_asked_for() -> None:
    tokens, labels = batch_of()
    linear = with_linear_mixce_loss(model_of("gpt2"))
    outputs = linear(tokens, labels=labels, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    loss, states = linear(tokens, labels=labels, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, outputs.loss)
    assert len(states) == 3


def test_eta_and_metrics() -> None:
    tokens, labels = batch_of()
    model = model_of("gemma2")
    ours, theirs = TokenMetrics(), TokenMetrics()
    linear = with_linear_mixce_loss(model, torch.tensor(1.0), metrics=ours)
    own = MixCEForCausalLMLoss(metrics=theirs)
    logits = model(tokens).logits
    for eta in (1.0, 0.5, 0.0):
        linear.mixce_loss.eta.fill_(eta)
        own.eta = eta
        torch.testing.assert_close(linear(tokens, labels=labels).loss, own(logits, labels))
        assert ours.compute() == pytest.approx(theirs.compute(), rel=1e-5)


def test_all_labels_ignored() -> None:
    tokens, labels = batch_of()
    linear = with_linear_mixce_loss(model_of("llama"))
    loss = linear(tokens, labels=torch.full_like(labels, -100)).loss
    loss.backward()
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients_of(linear).values())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    tokens, _ = batch_of()
    model = model_of(name).eval()
    with_linear_mixce_loss(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(loaded) is type(model)
    assert loaded.config.architectures == [type(model).__name__]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_copied() -> None:
    tokens, labels = batch_of()
    linear = with_linear_mixce_loss(model_of("gpt2"), ETA)
    twin = copy.deepcopy(linear)
    assert twin.lm_head.weight is not linear.lm_head.weight
    assert torch.equal(twin(tokens, labels=labels).loss, linear(tokens, labels=labels).loss)


def test_after_resizing_the_vocabulary() -> None:
    tokens, labels = batch_of()
    linear = with_linear_mixce_loss(model_of("gpt2", torch.float64), ETA)
    linear.resize_token_embeddings(VOCAB_SIZE + 7, mean_resizing=False)
    loss = linear(tokens, labels=labels).loss
    logits = linear(tokens).logits
    assert logits.shape[-1] == VOCAB_SIZE + 7
    torch.testing.assert_close(loss, oracle(logits, labels), **TOLERANCE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    tokens, labels = batch_of()
    linear = with_linear_mixce_loss(model_of("qwen2", torch.float64), ETA, metrics=TokenMetrics())
    linear(tokens, labels=labels).loss.backward()
    gradients = gradients_of(linear)
    once = linear.mixce_loss.metrics.compute()
    linear.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        linear.enable_input_require_grads()
    linear(tokens, labels=labels).loss.backward()
    assert_close(gradients_of(linear), gradients)
    assert linear.mixce_loss.metrics.compute() == pytest.approx(once, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    tokens, labels = batch_of()
    linear = with_linear_mixce_loss(model_of(name, torch.float64), ETA)
    expected = linear(tokens, labels=labels).loss
    expected.backward()
    gradients = gradients_of(linear)
    loss = torch.compile(linear, fullgraph=WHOLE_GRAPHS, backend="aot_eager")(tokens, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), **TOLERANCE)
    assert_close(gradients_of(linear), gradients)


def test_under_autocast() -> None:
    """Hidden states are bfloat16 there and logits float32; each of 16 products is off by 2^-8 at most."""
    tokens, labels = batch_of()
    model = model_of("llama")
    linear = with_linear_mixce_loss(model, ETA)
    expected = linear(tokens, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear(tokens, labels=labels).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients_of(linear).values())
    largest = model(tokens).logits.abs().max()
    assert 0 < (loss - expected).abs() <= 2**-7 * largest


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    tokens, labels = batch_of()
    linear = with_linear_mixce_loss(model_of("llama", torch.float64), ETA)
    adapted = peft.get_peft_model(linear, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    outputs = adapted(input_ids=tokens, labels=labels)
    assert outputs.logits is None
    expected = oracle(adapted(input_ids=tokens).logits, labels)
    torch.testing.assert_close(outputs.loss, expected, **TOLERANCE)
    outputs.loss.backward()
    gradients = gradients_of(adapted)
    expected.backward()
    assert_close(gradients, gradients_of(adapted))
    assert all("lora" in name for name in gradients)

    with pytest.raises(TypeError, match=r"expected model to be a transformers.PreTrainedModel, got PeftModelForCausal"):
        with_linear_mixce_loss(adapted)
    on_head = peft.get_peft_model(
        with_linear_mixce_loss(model_of("llama")), peft.LoraConfig(r=2, target_modules=["lm_head"])
    )
    with pytest.raises(
        ValueError, match=r"expected output embeddings that are a torch\.nn\.Linear, got peft\.tuners\.lora\.layer"
    ):
        on_head(input_ids=tokens, labels=labels)


def test_with_hooks_of_accelerate() -> None:
    """As a model that a device_map spread over devices has them; here the only device is the CPU."""
    accelerate = pytest.importorskip("accelerate")
    tokens, labels = batch_of()
    model = model_of("llama", torch.float64)
    expected = oracle(model(tokens).logits, labels)
    dispatched = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    hooked = vars(dispatched)["forward"]
    linear = with_linear_mixce_loss(dispatched, ETA)
    calls = []
    linear._hf_hook.pre_forward = lambda module, *args, **kwargs: calls.append(module) or (args, kwargs)
    outputs = linear(tokens, labels=labels)
    assert calls == [linear]
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, expected, **TOLERANCE)
    assert vars(dispatched)["forward"] is hooked
    assert dispatched(tokens).logits is not None


def gradients_of_ranks() -> dict[str, dict[str, Tensor]]:
    """The gradients of two ranks that split a batch unevenly, with the divisor of the whole batch, by engine."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    tokens, labels = batch_of()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = slice(0, 1) if rank == 0 else slice(1, None)
    # Gradients are averaged over the ranks.
    batch = {
        "input_ids": tokens[mine],
        "labels": labels[mine],
        "num_items_in_batch": (labels[:, 1:] != -100).sum() / ranks,
    }
    found = {}
    for engine in ("ddp", "fsdp"):
        linear = with_linear_mixce_loss(model_of("llama", torch.float64), ETA)
        if engine == "fsdp":
            for layer in linear.model.layers:
                fully_shard(layer)
        parallel = DistributedDataParallel(linear) if engine == "ddp" else fully_shard(linear)
        parallel(**batch).loss.backward()
        gradients = gradients_of(linear)
        found[engine] = {name: getattr(one, "full_tensor", lambda one=one: one)() for name, one in gradients.items()}
    return found


def test_data_parallel() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("needs FSDP2")
    tokens, labels = batch_of()
    linear = with_linear_mixce_loss(model_of("llama", torch.float64), ETA)
    linear(tokens, labels=labels).loss.backward()
    expected = gradients_of(linear)
    for found in run_ranks(gradients_of_ranks, 2):
        for gradients in found.values():
            assert_close(gradients, expected)


class Wrapped(nn.Module):
    """A head that does more than multiply."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)


class Changed(transformers.LlamaForCausalLM):
    """A model whose head and configuration do not tell all of what it does."""

    def before(self, hidden: Tensor) -> Tensor:
        return hidden

    def after(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        kwargs.pop("labels", None)
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        logits = self.after(self.lm_head(self.before(hidden)))
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


class ScaledHidden(Changed):
    def before(self, hidden: Tensor) -> Tensor:
        return hidden / 3


class ShiftedHidden(Changed):
    def before(self, hidden: Tensor) -> Tensor:
        return hidden + 0.01


class ScaledLogits(Changed):
    def after(self, logits: Tensor) -> Tensor:
        return logits * 0.99


class Raising(Changed):
    def after(self, logits: Tensor) -> Tensor:
        raise RuntimeError("cannot")


def test_hidden_states_that_are_scaled_before_the_head() -> None:
    """As MiniCPM3's are, by a number that is no entry of its configuration."""
    tokens, labels = batch_of()
    model = ScaledHidden(config_of("llama")).double()
    linear = with_linear_mixce_loss(model, ETA)
    assert linear.mixce_loss.head.logit_scale == pytest.approx(1 / 3)
    torch.testing.assert_close(linear(tokens, labels=labels).loss, oracle(model(tokens).logits, labels), **TOLERANCE)


def test_images_are_not_lost() -> None:
    """Of a model with images the loss is that of all its inputs, or the model is refused: older ones keep no base."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
    )
    images = {"image_token_id": 60, "image_token_index": 60, "vision_feature_layer": -1, "image_seq_length": 4}
    config = transformers.LlavaConfig(vision_config=vision, text_config=config_of("llama"), **images)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tokens, labels = (whole[:1] for whole in batch_of(ignored=False))
    tokens = torch.cat([torch.full((1, 4), 60), tokens], 1)
    labels = torch.cat([torch.full((1, 4), -100), labels], 1)
    pixels = torch.randn(1, 3, 4, 4)
    if model.base_model is model:
        with pytest.raises(ValueError, match=r"expected a decoder that takes all that Llava.* takes, got one without"):
            with_linear_mixce_loss(model)
        return
    linear = with_linear_mixce_loss(model, ETA)
    for images in (pixels, 0 * pixels):
        inputs = {"input_ids": tokens, "pixel_values": images}
        expected = oracle(model(**inputs).logits, labels)
        torch.testing.assert_close(linear(**inputs, labels=labels).loss, expected, rtol=1e-5, atol=0.0)


def test_models_that_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected model to be a transformers\.PreTrainedModel, got Linear"):
        with_linear_mixce_loss(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="expected a model with output embeddings, got GPT2Model, which has none"):
        with_linear_mixce_loss(transformers.GPT2Model(config_of("gpt2")))
    with pytest.raises(ValueError, match="expected a model with output embeddings, got LlamaForSequenceClassification"):
        with_linear_mixce_loss(transformers.LlamaForSequenceClassification(config_of("llama")))
    for kind in (ShiftedHidden, ScaledLogits, Raising):
        with pytest.raises(
            ValueError, match=f"expected logits that are the product of .* got others from {kind.__name__}"
        ):
            with_linear_mixce_loss(kind(config_of("llama")))
    model = model_of("llama")
    model.lm_head = Wrapped(model.lm_head)
    with pytest.raises(
        ValueError, match=r"expected output embeddings that are a torch.nn.Linear, got test_transformers_linear.Wrapped"
    ):
        with_linear_mixce_loss(model)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    with pytest.raises(ValueError, match="expected a decoder alone, got T5ForConditionalGeneration with an encoder"):
        with_linear_mixce_loss(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of("llama"))
    with pytest.raises(ValueError, match="expected output embeddings that are loaded, got a weight on the meta device"):
        with_linear_mixce_loss(model)
    model = model_of("llama")
    model.forward = functools.partial(model.forward)
    with pytest.raises(ValueError, match="expected a model with the forward of its class, got LlamaForCausalLM"):
        with_linear_mixce_loss(model)
    del model.forward
    config = config_of("llama")
    config.z_loss_coefficient = 0.1
    with pytest.raises(ValueError, match=r"expected z_loss_coefficient=0 in the model's configuration, .* got 0\.1"):
        with_linear_mixce_loss(transformers.LlamaForCausalLM(config))
    with pytest.raises(ValueError, match=r"expected eta in \[0, 1\], got 2.0"):
        with_linear_mixce_loss(model, 2.0)
    with pytest.raises(ValueError, match="expected path 'chunks' or 'tiles', got 'rows'"):
        with_linear_mixce_loss(model, path="rows")


def test_what_mixed_precision_leaves_behind() -> None:
    """`Trainer` wraps the forward for bfloat16; unwrapped, the class's own stands in the model itself."""
    accelerate = pytest.importorskip("accelerate")
    model = model_of("llama")
    # There is one state for a process, and another test's trainer may have left it.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    with pytest.raises(ValueError, match=r"unwrap_model\(model, keep_fp32_wrapper=False\) takes off"):
        with_linear_mixce_loss(prepared)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert "forward" in vars(unwrapped)
    tokens, labels = batch_of()
    assert with_linear_mixce_loss(unwrapped)(tokens, labels=labels).logits is None


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_pickled(name: str) -> None:
    tokens, labels = batch_of()
    linear = with_linear_mixce_loss(model_of(name), ETA)
    twin = pickle.loads(pickle.dumps(linear))
    assert type(twin) is type(linear)
    assert torch.equal(twin(tokens, labels=labels).loss, linear(tokens, labels=labels).loss)


def test_tuples_where_the_configuration_asks_for_them() -> None:
    tokens, labels = batch_of()
    model = model_of("gpt2")
    expected = with_linear_mixce_loss(model, ETA)(tokens, labels=labels).loss
    model.config.return_dict = False
    (loss,) = with_linear_mixce_loss(model, ETA)(tokens, labels=labels)
    assert torch.equal(loss, expected)


def test_the_trial_leaves_nothing_behind() -> None:
    model = model_of("opt")
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with_linear_mixce_loss(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_calls_that_are_refused() -> None:
    tokens, labels = batch_of()
    linear = with_linear_mixce_loss(model_of("llama"))
    with pytest.raises(
        ValueError, match=r"expected labels of shape \[3, 9\] for hidden states of .* got \[3, 8\]: pass"
    ):
        linear(tokens, labels=labels[:, 1:])
    with pytest.raises(ValueError, match="expected no logits_to_keep together with labels"):
        linear(tokens, labels=labels, logits_to_keep=1)
    with pytest.raises(
        ValueError, match="expected output_router_logits=False, since the router's loss is not computed"
    ):
        linear(tokens, labels=labels, output_router_logits=True)
    with pytest.raises(ValueError, match="expected arguments besides input_ids by name, together with labels"):
        linear(tokens, torch.ones_like(tokens), labels=labels)
    position = list(inspect.signature(linear.forward).parameters).index("labels")
    with pytest.raises(ValueError, match="expected arguments besides input_ids by name, together with labels"):
        linear(tokens, *[None] * (position - 1), labels)
    with pytest.raises(ValueError, match="expected labels with num_items_in_batch, got none: Trainer takes them away"):
        linear(tokens, num_items_in_batch=torch.tensor(3))
    loaded = type(linear)(config_of("llama"))
    with pytest.raises(ValueError, match="expected a model that with_linear_mixce_loss returned"):
        loaded(tokens, labels=labels)
    linear.config.output_router_logits = True
    for asked in ({}, {"output_router_logits": None}):
        with pytest.raises(ValueError, match="expected output_router_logits=False"):
            linear(tokens, labels=labels, **asked)
    assert linear(tokens, labels=labels, output_router_logits=False).loss.isfinite()
    del linear.config.output_router_logits
    with pytest.raises(IndexError, match=r"expected targets in \[0, 61\)"):
        linear(tokens, labels=labels + VOCAB_SIZE)
