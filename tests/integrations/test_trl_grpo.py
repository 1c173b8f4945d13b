"""`FusedLogprobsGRPOTrainer` beside TRL's own trainer and plain formulas in float64: numbers, gradients, real runs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_transformers import LargeTensors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

trl = pytest.importorskip("trl", reason="needs the extra 'trl'")

RELEASE = tuple(int(number) for number in trl.__version__.split(".")[:2])
if RELEASE < (1, 16):
    pytest.skip("needs a newer release of TRL", allow_module_level=True)

from mixce_kernels.integrations import trl_grpo
from mixce_kernels.integrations.trl_grpo import FusedLogprobsGRPOTrainer
from mixce_kernels.integrations.versions import require
from support.causal_models import CONFIGS, VOCAB_SIZE, config_of, model_of, transformers
from support.docs.models import group_of_one
from support.grpo_runs import TEMPERATURE, batch_of, expected, grpo_trainer, scored
from support.numerics import assert_accurate
from support.trl_runs import EPSILON, Run, assert_same_weights, lora, recorded

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module", autouse=True)
def no_garbage_of_imports() -> Iterator[None]:
    """Each training collects garbage, in half a second where it has to look at all modules."""
    gc.freeze()
    yield
    gc.unfreeze()


def both(folder: Path, model: Any, **changes: Any) -> tuple[Any, Any]:
    """Our trainer of a model and TRL's of a copy of it."""
    own = grpo_trainer(False, folder, copy.deepcopy(model), **changes)
    return grpo_trainer(True, folder, model, **changes), own


def both_train(folder: Path, model: Any, **changes: Any) -> tuple[Run, Run]:
    """The runs of the two, each from the seed that its trainer sets."""
    own = recorded(grpo_trainer(False, folder, copy.deepcopy(model), evaluate=True, **changes))
    return recorded(grpo_trainer(True, folder, model, evaluate=True, **changes)), own


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Gradients of float32, each to some roundings of the largest."""
    assert actual.keys() == expected.keys()
    tolerance = 32 * EPSILON * max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0.0, atol=tolerance, msg=name)


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_are_as_near_to_float64_as_trl_s(name: str, confident: bool, tmp_path: Path) -> None:
    """Heads with a bias, a factor, a cap; the errors of TRL's numbers are the measure of ours."""
    model = model_of(name)
    if confident:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(10)
    batch = batch_of()
    ours, own = (scored(trainer, batch) for trainer in both(tmp_path, model, temperature=TEMPERATURE))
    assert torch.equal(ours.hidden, own.hidden)
    exact = expected(name, model, batch, ours.hidden)
    assert (ours.log_probs.dtype, ours.entropy.dtype) == (torch.float32, torch.float32)
    assert_accurate("log-probabilities", ours.log_probs, exact.log_probs.numpy(), own.log_probs, 0.0)
    assert_accurate("entropies", ours.entropy, exact.entropy.numpy(), own.entropy, 0.0)
    assert_accurate("gradient of hidden states", ours.grad_hidden, exact.grad_hidden.numpy(), own.grad_hidden, 0.0)
    if not model.config.tie_word_embeddings:
        for kind, gradient in (("weight", exact.grad_weight), ("bias", exact.grad_bias)):
            if gradient is not None:
                key = f"lm_head.{kind}"
                assert_accurate(key, ours.gradients[key], gradient.numpy(), own.gradients[key], 0.0)
    assert not ours.log_probs[~batch.valid].any()
    assert not ours.entropy[~batch.valid].any()
    if not confident:
        assert_close(ours.gradients, own.gradients)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rows_in_parts(batch_size: int, tmp_path: Path) -> None:
    """TRL hands the model some rows at a time where it is not differentiated."""
    ours, own = both(tmp_path, model_of("llama"), temperature=TEMPERATURE)
    parts, whole = (scored(ours, batch_of(), batch_size=size) for size in (batch_size, None))
    torch.testing.assert_close(parts.log_probs, whole.log_probs)
    torch.testing.assert_close(parts.entropy, whole.entropy)
    assert_close(parts.gradients, whole.gradients)
    torch.testing.assert_close(parts.log_probs, scored(own, batch_of(), batch_size=batch_size).log_probs)


def test_log_probabilities_alone(tmp_path: Path) -> None:
    model = model_of("gpt2")
    batch = batch_of()
    ours, own = (scored(trainer, batch, entropy=False) for trainer in both(tmp_path, model, temperature=TEMPERATURE))
    assert ours.entropy is None
    exact = expected("gpt2", model, batch, ours.hidden, entropy=False)
    assert_accurate("log-probabilities", ours.log_probs, exact.log_probs.numpy(), own.log_probs, 0.0)
    assert_accurate("gradient of hidden states", ours.grad_hidden, exact.grad_hidden.numpy(), own.grad_hidden, 0.0)
    assert_close(ours.gradients, own.gradients)


def test_a_model_in_float64_is_exact(tmp_path: Path) -> None:
    """TRL's numbers are float32, whatever the model's type."""
    model = model_of("gpt2", torch.float64)
    batch = batch_of()
    ours = scored(grpo_trainer(True, tmp_path, model, temperature=TEMPERATURE), batch)
    exact = expected("gpt2", model, batch, ours.hidden)
    for name in ("log_probs", "entropy", "grad_hidden"):
        actual, value = getattr(ours, name), getattr(exact, name)
        torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-12)


def test_no_token_of_a_completion(tmp_path: Path) -> None:
    """A differentiable 0."""
    trainer = grpo_trainer(True, tmp_path)
    tokens, mask, kept = batch_of()
    mask[:, -kept:] = 0
    log_probs, entropy, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, tokens, mask, kept, compute_entropy=True
    )
    (log_probs.sum() + entropy.sum()).backward()
    assert not log_probs.any()
    assert not entropy.any()
    assert all(not weight.grad.any() for weight in trainer.model.parameters() if weight.grad is not None)


def test_no_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is not called, no operator returns a tensor as large as the logits, and prompts have no part in it."""
    batch = batch_of(prompts=(4,) * 4, completions=(16, 16, 16, 12))
    tokens = int(batch.valid.sum())
    trainer = grpo_trainer(True, tmp_path, max_chunk_bytes=2 * 4 * VOCAB_SIZE)
    whole = scored(grpo_trainer(True, tmp_path), batch)
    called, rows = [], []
    of_layer, of_tokens = nn.Linear.forward, trl_grpo.fused_linear_token_logprobs

    # A hook on the head would be refused.
    def forward(layer: nn.Linear, hidden: Tensor) -> Tensor:
        if layer is trainer.model.lm_head:
            called.append(layer)
        return of_layer(layer, hidden)

    def counted(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(hidden))
        return of_tokens(hidden, *args, **kwargs)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    monkeypatch.setattr(trl_grpo, "fused_linear_token_logprobs", counted)
    with LargeTensors(tokens * VOCAB_SIZE) as large:
        chunks = scored(trainer, batch)
    assert not large.found
    assert not called
    assert rows == [tokens]
    torch.testing.assert_close(chunks.log_probs, whole.log_probs)
    torch.testing.assert_close(chunks.entropy, whole.entropy)
    with LargeTensors(tokens * VOCAB_SIZE) as large:
        trainer.model(input_ids=batch.input_ids)
    assert large.found
    assert called


def test_other_calls_of_the_model_are_its_own(tmp_path: Path) -> None:
    model = model_of("llama").eval()
    tokens = batch_of(prompts=(4, 4, 4)).input_ids[:, :6]
    before = model(input_ids=tokens, labels=tokens)
    generated = model.generate(tokens, max_new_tokens=3, do_sample=False)
    trainer = grpo_trainer(True, tmp_path, model)
    assert trainer.model is model
    after = model.eval()(input_ids=tokens, labels=tokens)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(model.generate(tokens, max_new_tokens=3, do_sample=False), generated)


def saved(folder: Path) -> str:
    """The path of a model, which TRL loads a reference from."""
    model_of("llama").save_pretrained(folder / "model")
    return str(folder / "model")


TRAININGS: dict[str, dict[str, Any]] = {
    "on policy": {},
    "entropy bonus": {"temperature": TEMPERATURE, "entropy_coef": 0.1, "num_iterations": 2},
    "tokens of high entropy": {"top_entropy_quantile": 0.5, "num_iterations": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "steps_per_generation": 4},
    "sequences": {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
    "checkpointed": {"gradient_checkpointing": True, "num_iterations": 2},
}


def assert_same_training(ours: Run, own: Run) -> None:
    """Losses, what is logged of each step and of the evaluation, and the trained weights."""
    assert ours.losses == pytest.approx(own.losses, rel=0.0, abs=32 * EPSILON)
    assert len(ours.logs) == len(own.logs) > 2
    for one, other in zip(ours.logs, own.logs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if not name.endswith(("time", "runtime", "per_second")):
                assert one[name] == pytest.approx(other[name], rel=64 * EPSILON, abs=32 * EPSILON), name
    assert_same_weights(ours, own)


@pytest.mark.parametrize("changes", TRAININGS.values(), ids=TRAININGS)
def test_training_is_trl_s(changes: dict[str, Any], tmp_path: Path) -> None:
    assert_same_training(*both_train(tmp_path, model_of("llama"), **changes))


def test_a_path_and_a_reference_model(tmp_path: Path) -> None:
    ours, own = both_train(tmp_path, saved(tmp_path), beta=0.5, num_iterations=2)
    assert_same_training(ours, own)
    assert ours.steps[-1]["kl"] > 1e-3
    batch = batch_of()
    reference = [one.trainer._get_per_token_logps_and_entropies(one.trainer.ref_model, *batch) for one in (ours, own)]
    torch.testing.assert_close(reference[0], reference[1])


@pytest.mark.parametrize(
    ("passed", "changes"),
    [
        (False, {}),
        (True, {}),
        (False, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    ],
    ids=["made by the trainer", "passed", "with a trained copy of the head"],
)
def test_lora(passed: bool, changes: dict[str, Any], tmp_path: Path) -> None:
    """The reference is the model without the adapter, or with the one that was passed."""
    peft = pytest.importorskip("peft")
    model, config = model_of("llama"), {"peft_config": lora(**changes)}
    if passed:
        torch.manual_seed(0)
        model, config = peft.get_peft_model(model, lora(init_lora_weights=False)), {}
    assert_same_training(*both_train(tmp_path, model, beta=0.5, num_iterations=2, **config))


def test_prompt_tuning(tmp_path: Path) -> None:
    """Virtual tokens stand before the prompt."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ours, own = both(tmp_path, model_of("llama"), peft_config=config, temperature=TEMPERATURE)
    batch = batch_of()
    actual, wanted = (
        trainer._get_per_token_logps_and_entropies(trainer.model, *batch, compute_entropy=True)[:2]
        for trainer in (ours, own)
    )
    torch.testing.assert_close(actual, wanted)
    assert not actual[0][~batch.valid].any()


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"cast_lm_head_to_fp32": True}),
        (torch.float32, {"bf16": True}),
        (torch.float32, {"bf16": True, "cast_lm_head_to_fp32": True}),
    ],
    ids=["bfloat16", "head in float32", "autocast", "autocast, head in float32"],
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_half_precision(name: str, dtype: torch.dtype, changes: dict[str, Any], tmp_path: Path) -> None:
    """Logits are products in bfloat16 that no one rounds to it, as TRL does unless the head is cast to float32."""
    batch = batch_of()
    model = model_of(name, dtype)
    ours, own = (scored(trainer, batch) for trainer in both(tmp_path, model, temperature=TEMPERATURE, **changes))
    half = torch.finfo(torch.bfloat16).eps
    assert ours.log_probs.dtype == ours.entropy.dtype == torch.float32
    if "bf16" not in changes or "cast_lm_head_to_fp32" in changes:
        exact = expected(name, model, batch, ours.hidden)
        torch.testing.assert_close(ours.log_probs.double(), exact.log_probs, rtol=8 * EPSILON, atol=8 * EPSILON)
        torch.testing.assert_close(ours.entropy.double(), exact.entropy, rtol=8 * EPSILON, atol=8 * EPSILON)
    close = 8 * EPSILON if "cast_lm_head_to_fp32" in changes else 4 * half
    torch.testing.assert_close(ours.log_probs, own.log_probs, rtol=close, atol=close)
    torch.testing.assert_close(ours.entropy, own.entropy, rtol=close, atol=close)
    for key, value in own.gradients.items():
        tolerance = 4 * half * max(gradient.abs().max().item() for gradient in own.gradients.values())
        torch.testing.assert_close(ours.gradients[key], value, rtol=0.0, atol=tolerance, msg=key)


def experts(**router: Any) -> Any:
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, **router}
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**config_of("llama").to_diff_dict() | {"model_type": "mixtral"} | sizes)
    )


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_experts(coefficient: float, tmp_path: Path) -> None:
    """With and without the router's loss."""
    ours, own = both_train(tmp_path, experts(), router_aux_loss_coef=coefficient, num_iterations=2)
    assert_same_training(ours, own)
    assert ("aux_loss" in ours.steps[0]) == (coefficient > 0)


def test_images(tmp_path: Path) -> None:
    """A model that brings images and text together in its base model."""
    text = {**config_of("llama").to_diff_dict(), "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    text |= {"model_type": "qwen2_5_vl_text"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
              "patch_size": 4, "fullatt_block_indexes": [0]}  # fmt: skip
    tokens = {"image_token_id": 3, "vision_start_token_id": 4, "vision_end_token_id": 5, "video_token_id": 6}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).train()
    ours, own = both(tmp_path, model, temperature=TEMPERATURE)
    ids, mask, kept = batch_of(prompts=(6, 6), completions=(4, 2))
    ids[:, 0], ids[:, 1], ids[:, 2] = 4, 3, 5
    patches = torch.randn(2 * 4, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    images = {
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 2),
        "num_images": [1, 1],
        "mm_token_type_ids": (ids == 3).long(),
    }
    results = []
    for trainer in (ours, own):
        found = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, kept, batch_size=1, compute_entropy=True, **images
        )
        results.append(found[:2])
    torch.testing.assert_close(results[0], results[1])
    images["pixel_values"] = patches.flip(0)
    other = ours._get_per_token_logps_and_entropies(ours.model, ids, mask, kept, batch_size=1, **images)[0]
    assert not torch.allclose(other, results[0][0])


def test_a_model_wrapped_for_several_processes(tmp_path: Path) -> None:
    trainer = grpo_trainer(True, tmp_path, temperature=TEMPERATURE)
    batch = batch_of()
    plain = scored(trainer, batch)
    with group_of_one():
        wrapped = scored(trainer, batch, model=DistributedDataParallel(trainer.model))
    assert torch.equal(wrapped.log_probs, plain.log_probs)
    assert_close(wrapped.gradients, plain.gradients)


def test_labels_that_are_shifted_already(tmp_path: Path) -> None:
    """As TRL passes them where sequences are split over devices: a result for every position."""
    trainer = grpo_trainer(True, tmp_path)
    tokens, mask, _ = batch_of()
    labels = tokens.masked_fill(mask == 0, -100)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    call = {"input_ids": tokens, "attention_mask": mask, "fused_lm_head": True}
    outputs = trainer.model(**call, labels=labels)
    other = trainer.model(**call, shift_labels=shifted)
    assert outputs.log_probs.shape == (3, tokens.shape[1] - 1)
    assert torch.equal(other.log_probs[:, :-1], outputs.log_probs)
    assert torch.equal(other.label_mask, shifted != -100)


def refused(error: type[Exception], sentence: str, folder: Path, model: Any = None, **changes: Any) -> None:
    with pytest.raises(error, match=sentence):
        grpo_trainer(True, folder, model, **changes)


def test_options_that_are_refused(tmp_path: Path) -> None:
    refused(ValueError, "^expected max_chunk_bytes to be positive, got 0$", tmp_path, max_chunk_bytes=0)
    refused(TypeError, "^expected max_chunk_bytes to be None or an int, got float$", tmp_path, max_chunk_bytes=0.5)
    trainer = grpo_trainer(True, tmp_path, backend="numpy")
    with pytest.raises(ValueError, match=r"^expected backend to be one of .* or None, got 'numpy'$"):
        scored(trainer, batch_of())
    config = trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    config.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match=r"^expected a ZeRO stage below 3, .* got 3$"):
        FusedLogprobsGRPOTrainer(
            model_of("llama"), lambda **_: [], config, trainer.train_dataset, processing_class=trainer.processing_class
        )


def test_models_that_are_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    sentence = "^expected output embeddings that are a torch.nn.Linear, got torch.nn.modules.container.Sequential$"
    refused(ValueError, sentence, tmp_path, model)
    model = model_of("llama")
    prune.l1_unstructured(model.lm_head, "weight", 0.5)
    sentence = "^expected output embeddings without hooks, .* got L1Unstructured in _forward_pre_hooks$"
    refused(ValueError, sentence, tmp_path, model)
    tokens = {"trainable_token_indices": {"embed_tokens": [1, 2]}}
    sentence = r"^expected output embeddings that are a torch.nn.Linear, got peft[\w.]*$"
    refused(ValueError, sentence, tmp_path, model_of("qwen2"), peft_config=lora(**tokens))
    model = model_of("llama")
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * own(hidden)
    sentence = r"^expected output embeddings with the forward of torch.nn.modules.linear.Linear, got another$"
    refused(ValueError, sentence, tmp_path, model)
    model = model_of("llama", z_loss_coefficient=0.1)
    sentence = "^expected z_loss_coefficient=0 in the model's configuration, .* not computed here, got 0.1$"
    refused(ValueError, sentence, tmp_path, model)
    # TRL's own.
    sentence = "^Applying a PEFT adapter to `lm_head` is not supported"
    refused(ValueError, sentence, tmp_path, peft_config=lora(target_modules=["q_proj", "lm_head"]))


def test_logits_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = transformers.LlamaForCausalLM.forward

    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = own(model, *args, **kwargs)
        outputs.logits = outputs.logits.square()
        return outputs

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    sentence = (
        "^expected logits that are the product of output embeddings and last hidden states, scaled and capped by "
        "numbers in the configuration, got others from LlamaForCausalLM$"
    )
    refused(ValueError, sentence, tmp_path)


def test_a_head_that_is_pruned_while_it_trains(tmp_path: Path) -> None:
    trainer = grpo_trainer(True, tmp_path)
    prune.l1_unstructured(trainer.model.lm_head, "weight", 0.5)
    with pytest.raises(ValueError, match=r"^expected output embeddings without hooks, .* got L1Unstructured in \w*$"):
        trainer.train()


def test_releases_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one when the module is imported, a newer one without TRL's keyword when a trainer is made."""
    bounds = (trl_grpo.OLDEST_TRL, trl_grpo.BELOW_TRL)
    assert require("trl", *bounds) is trl
    sentence = f"^expected a release of trl that calls its model with fused_lm_head, got {trl.__version__} without$"
    with monkeypatch.context() as patch:
        patch.setattr("trl.trainer.grpo_trainer.add_fused_lm_head", lambda *args, **kwargs: None)
        refused(RuntimeError, sentence, tmp_path)
    for version in ("1.15.0", "2.0"):
        monkeypatch.setattr(trl, "__version__", version)
        with pytest.raises(ImportError, match=rf"^expected trl >= 1.16.0, < 2, got {version}$"):
            require("trl", *bounds)
