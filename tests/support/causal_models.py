"""Small causal language models of Transformers, made from their configurations: no weights are downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")

VOCAB_SIZE = 61
# Older releases' models break a graph by themselves.
WHOLE_GRAPHS = int(transformers.__version__.partition(".")[0]) >= 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Name to configuration class and what it says beside the sizes: heads that are tied and untied, with a bias, capped,
# scaled by a factor or a divisor, and behind a decoder inside of the base model.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCAB_SIZE}),
    "llama": ("LlamaConfig", SIZES),
    "qwen2": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {**SIZES, "head_dim": 8, "final_logit_softcapping": 0.25}),
    "cohere": ("CohereConfig", {**SIZES, "logit_scale": 0.375}),
    "granite": ("GraniteConfig", {**SIZES, "logits_scaling": 0.125}),
    "phi": ("PhiConfig", {**SIZES, "num_key_value_heads": 2, "partial_rotary_factor": 0.5}),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}),
}
# How the logits come from the last hidden states: factor and cap.
HEADS: dict[str, tuple[float, float | None]] = {"gemma2": (1.0, 0.25), "cohere": (0.375, None), "granite": (8.0, None)}


def config_of(name: str, **changes: Any) -> Any:
    """The configuration by name, without dropout, so that two runs are one.

    The attention is plain PyTorch's: of GPT-2's other one older releases cannot mask float64.
    """
    kind, options = CONFIGS[name]
    options = {"attn_implementation": "eager", **options}
    dropouts = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout")
    return getattr(transformers, kind)(**{**dict.fromkeys(dropouts, 0.0), **TOKENS, **options, **changes})


def model_of(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of this configuration in training mode, with the same weights every time.

    The head's weight is large enough for some tokens to be probable: random logits near 0 would make every q alike.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, **changes))
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(10)
        if head.bias is not None:
            head.bias.normal_()
    return model.to(dtype).train()


def batch_of(rows: int = 3, length: int = 9, ignored: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [rows, length]; some labels are -100, of the last row all but one."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB_SIZE, (rows, length), generator=generator)
    labels = tokens.clone()
    if ignored:
        labels[0, :3] = labels[1, -2:] = labels[-1, :-1] = -100
    return tokens, labels


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """The parameters' gradients by name; they are cleared."""
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """All of a model's gradients, in float64.

    Some models (RMSNorm, rotary embeddings) compute in float32 whatever their type: where two float64 values differ in
    the last bit, the float32 ones may differ by an epsilon of the largest gradient. A sum of some hundred such terms is
    allowed 32.
    """
    assert actual.keys() == expected.keys()
    tolerance = 32 * torch.finfo(torch.float32).eps * max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert value.dtype == torch.float64
        assert (actual[name] - value).abs().max() <= tolerance, name
