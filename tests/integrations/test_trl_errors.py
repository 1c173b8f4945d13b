"""What `MixCESFTConfig` and `MixCESFTTrainer` take from a command line, and what they refuse."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils import prune

pytest.importorskip("trl", reason="needs the extra 'trl'")

from mixce_kernels.integrations.trl import MixCESFTConfig, MixCESFTTrainer
from mixce_kernels.weightings import Power, TaiLr
from support.causal_models import VOCAB_SIZE, config_of, model_of, transformers
from support.trl_runs import (
    ETA,
    RELEASE,
    data,
    lora,
    options,
    tokenizer,
    train,
    trl,
)

pytestmark = pytest.mark.usefixtures("offline")


def test_the_command_line(tmp_path: Path) -> None:
    parser = transformers.HfArgumentParser(MixCESFTConfig)
    line = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--bf16", "False", "--eta", "0.25", "--z_loss", "1e-4"]
    (config,) = parser.parse_args_into_dataclasses([*line, "--max_chunk_bytes", "4096", "--backend", "cpu"])
    assert (config.eta, config.z_loss, config.max_chunk_bytes, config.backend) == (0.25, 1e-4, 4096, "cpu")
    assert config.loss_type == "nll"
    (config,) = parser.parse_args_into_dataclasses(line[:-4])
    assert (config.eta, config.z_loss, config.max_chunk_bytes, config.backend) == (0.5, 0.0, None, None)
    assert config.to_dict()["eta"] == 0.5
    assert config.weighting == "Probability()"
    (config,) = parser.parse_args_into_dataclasses([*line, "--weighting", "TaiLr(0.5, floor=0.1)"])
    assert config.weighting == "TaiLr(gamma=0.5, floor=0.1)"
    again = MixCESFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, weighting=TaiLr(0.5, 0.1))
    assert json.loads(again.to_json_string())["weighting"] == config.weighting


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"eta": 1.5}, ValueError, r"expected eta in \[0, 1\], got 1.5"),
        ({"eta": float("nan")}, ValueError, r"expected eta in \[0, 1\], got nan"),
        ({"eta": "half"}, TypeError, "expected eta to be a number, got str"),
        ({"eta": torch.tensor(0.5)}, TypeError, "expected eta to be a number, got a tensor of torch.float32"),
        ({"weighting": "Powers(1)"}, ValueError, r"expected one of Probability, .*, got 'Powers\(1\)'"),
        ({"weighting": "Power(-1)"}, ValueError, "expected alpha to be finite and not negative, got -1"),
        ({"weighting": Power(torch.tensor(1.0))}, ValueError, "expected one of Probability, .* with numbers, got"),
        ({"weighting": lambda stats: stats.q}, ValueError, "expected one of Probability, .* with numbers, got"),
        ({"z_loss": -1.0}, ValueError, "expected z_loss to be finite and not negative, got -1.0"),
        ({"label_smoothing_factor": 2.0}, ValueError, r"expected label_smoothing in \[0, 1\], got 2.0"),
        ({"max_chunk_bytes": 0}, ValueError, "expected max_chunk_bytes to be positive, got 0"),
        ({"loss_type": "dft"}, ValueError, "expected loss_type='nll' with eta, got 'dft': this is the loss of eta=0"),
        ({"loss_type": "mle"}, ValueError, "expected loss_type='nll' with eta, got 'mle'"),
        ({"use_liger_kernel": True}, ValueError, "expected use_liger_kernel=False, or liger_kernel_config="),
    ],
)
def test_options_that_are_refused(
    changes: dict[str, Any], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"^{sentence}"):
        MixCESFTConfig(**options(tmp_path, **changes))


def test_layer_kernels_of_liger_are_allowed(tmp_path: Path) -> None:
    layers = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
    assert MixCESFTConfig(**options(tmp_path, **layers)).use_liger_kernel


def refused(error: type[Exception], sentence: str, folder: Path, model: Any = None, **more: Any) -> None:
    args = more.pop("args", None) or MixCESFTConfig(**options(folder))
    with pytest.raises(error, match=sentence):
        MixCESFTTrainer(
            model_of("llama") if model is None else model,
            args,
            train_dataset=data(),
            processing_class=tokenizer(),
            **more,
        )


def test_arguments_that_are_refused(tmp_path: Path) -> None:
    config = trl.SFTConfig(**options(tmp_path))
    refused(TypeError, "^expected args to be a MixCESFTConfig, got SFTConfig$", tmp_path, args=config)
    sentence = "^expected compute_loss_func=None, since the loss is that of eta$"
    refused(ValueError, sentence, tmp_path, compute_loss_func=lambda *_: None)

    config = MixCESFTConfig(**options(tmp_path))
    config.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    refused(ValueError, "^expected a ZeRO stage below 3, .* got 3$", tmp_path, args=config)
    config = MixCESFTConfig(**options(tmp_path))
    assert config.n_gpu <= 1
    config._n_gpu = 2
    refused(ValueError, "nn.DataParallel", tmp_path, args=config)


def test_sequence_parallelism_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = trl.SFTTrainer.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        self.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(sp_enabled=True))

    monkeypatch.setattr(trl.SFTTrainer, "__init__", initialise)
    refused(ValueError, "^expected sp_size=1, since the loss is not added up", tmp_path)


def test_models_that_are_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    model.forward = functools.partial(model.forward)
    refused(ValueError, "^expected a model with the forward of its class, got LlamaForCausalLM", tmp_path, model=model)
    model = model_of("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    refused(ValueError, "^expected output embeddings that are a torch.nn.Linear", tmp_path, model=model)
    model = model_of("llama")
    prune.l1_unstructured(model.lm_head, "weight", 0.5)
    sentence = "^expected output embeddings without hooks, .* got L1Unstructured .*: MixCEForCausalLMLoss takes the"
    refused(ValueError, sentence, tmp_path, model=model)
    sentence = (
        "^expected output embeddings that are a torch.nn.Linear, got peft.*: MixCEForCausalLMLoss takes the model's"
    )
    tokens = {"trainable_token_indices": {"embed_tokens": [1, 2]}}
    refused(ValueError, sentence, tmp_path, model=model_of("qwen2"), peft_config=lora(**tokens))
    if RELEASE >= (1, 16):
        sentence = "^Applying a PEFT adapter to `lm_head` is not supported"
    refused(ValueError, sentence, tmp_path, peft_config=lora(target_modules=["q_proj", "lm_head"]))
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.01}
    experts = transformers.MixtralConfig(**config_of("llama").to_diff_dict() | {"model_type": "mixtral"} | sizes)
    experts.output_router_logits = True
    model = transformers.MixtralForCausalLM(experts)
    refused(ValueError, "^expected a model without a router's loss", tmp_path, model=model)


def test_a_head_that_is_pruned_while_it_trains(tmp_path: Path) -> None:
    trainer = train(tmp_path, eta=ETA, max_steps=1, evaluate=False).trainer
    prune.l1_unstructured(trainer.model.lm_head, "weight", 0.5)
    with pytest.raises(ValueError, match=r"^expected output embeddings without hooks, .* got L1Unstructured"):
        trainer.train()


def test_batches_that_are_refused(tmp_path: Path) -> None:
    trainer = train(tmp_path, eta=ETA, max_steps=1, evaluate=False).trainer
    tokens = torch.randint(3, VOCAB_SIZE, (2, 5))
    with pytest.raises(ValueError, match=r"^expected a batch with labels, got one with input_ids$"):
        trainer.compute_loss(trainer.model, {"input_ids": tokens})
