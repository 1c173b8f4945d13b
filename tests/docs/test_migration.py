"""The tables of docs/migration.md: every argument of the other packages is there, and its counterpart is here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import mixce_kernels
from conftest import EMULATED
from mixce_kernels import MixCEStats, fused_linear_mixce_loss, fused_mixce_loss, vocab_parallel_mixce_loss
from support.docs.blocks import text_of
from support.docs.checks import assert_far, assert_near

pytestmark = pytest.mark.skipif(EMULATED is not None, reason="documents are tried natively")


def arguments_of(*functions: Callable[..., Any]) -> set[str]:
    return {name for function in functions for name in inspect.signature(function).parameters} - {"self"}


class Section(NamedTuple):
    """A table: the arguments that are its rows, and those of our functions that have their counterparts.

    Both are functions, which skip the test where a package is missing.
    """

    theirs: Callable[[], set[str]]
    ours: Callable[[], set[str]]


def liger_arguments() -> set[str]:
    functional = pytest.importorskip("liger_kernel.transformers.functional", exc_type=ImportError)
    return arguments_of(functional.liger_cross_entropy)


def liger_linear_arguments() -> set[str]:
    liger = pytest.importorskip("liger_kernel.transformers", exc_type=ImportError)
    module = liger.LigerFusedLinearCrossEntropyLoss
    return arguments_of(module, module.forward)


def cut_cross_entropy_arguments() -> set[str]:
    """Of the release, and those that the page marks as newer."""
    cce = pytest.importorskip("cut_cross_entropy", exc_type=ImportError)
    newer = {"bias", "return_lse", "filter_e_grad", "filter_c_grad", "accum_e_fp32", "accum_c_fp32"}
    return arguments_of(cce.linear_cross_entropy) | newer | {"vocab_parallel_options"}


def flash_attention_arguments() -> set[str]:
    """Of flash_attn/ops/triton/cross_entropy.py, as of flash-attention's commit 058ad35a."""
    scales = {"label_smoothing", "logit_scale", "lse_square_scale"}
    return {"logits", "labels", "precomputed_lse", *scales, "ignore_index", "inplace_backward", "process_group"}


def trl_arguments() -> set[str]:
    """Of TRL 1.0's `dft_loss`, and of the configuration."""
    trl = pytest.importorskip("trl", exc_type=ImportError)
    options = {"loss_type", "label_smoothing_factor"}
    assert options <= arguments_of(trl.SFTConfig)
    return {"outputs", "labels", "num_items_in_batch", *options}


def reweighting_arguments() -> set[str]:
    """Of the trainers' sources at the commits that the page names."""
    llama_factory = {"use_dft_loss", "use_eaft_loss", "eaft_alpha"}
    axolotl = {"use_eaft", "eaft_alpha", "eaft_k", "liger_use_token_scaling"}
    chord = {"chord_enable_phi_function", "chord_mu_peak", "chord_mu_valley"}
    ms_swift = {"enable_dft_loss", *chord, "chord_mu_warmup_steps", "chord_mu_decay_steps"}
    return llama_factory | axolotl | ms_swift | {"loss_type"}


def causal_lm_loss_arguments() -> set[str]:
    """Of `MixCEForCausalLMLoss` and its call, and of the configuration of `MixCESFTTrainer`."""
    module = pytest.importorskip("mixce_kernels.integrations.trl", exc_type=ImportError)
    loss = pytest.importorskip("mixce_kernels.integrations.transformers").MixCEForCausalLMLoss
    return arguments_of(loss, loss.__call__, module.MixCESFTConfig)


LOSS = partial(arguments_of, fused_mixce_loss)
LINEAR_LOSS = partial(arguments_of, fused_linear_mixce_loss)

SECTIONS = {
    "torch.nn.functional.cross_entropy": Section(partial(arguments_of, F.cross_entropy), LOSS),
    "Liger: liger_cross_entropy, LigerCrossEntropyLoss": Section(liger_arguments, LOSS),
    "Liger: LigerFusedLinearCrossEntropyLoss": Section(liger_linear_arguments, LINEAR_LOSS),
    "cut-cross-entropy: linear_cross_entropy": Section(cut_cross_entropy_arguments, LINEAR_LOSS),
    "flash-attention: cross_entropy_loss": Section(
        flash_attention_arguments, partial(arguments_of, fused_mixce_loss, vocab_parallel_mixce_loss)
    ),
    'TRL: loss_type="dft"': Section(trl_arguments, causal_lm_loss_arguments),
    "Reweighted fine-tuning in LLaMA-Factory, ms-swift, TRL and Axolotl": Section(reweighting_arguments, LOSS),
}


def tables() -> dict[str, list[tuple[str, str]]]:
    """The rows of each section's table, heading and rule left out."""
    found: dict[str, list[tuple[str, str]]] = {}
    for section in text_of("migration.md").split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        rows = [
            tuple(cell.strip() for cell in line.strip("|").split("|")) for line in re.findall(r"^\|.*\|$", body, re.M)
        ]
        if rows:
            assert all(len(row) == 2 for row in rows), heading
            found[heading] = rows[2:]
    return found


def test_every_table_is_known() -> None:
    assert tables().keys() == SECTIONS.keys()


@pytest.mark.parametrize("heading", SECTIONS)
def test_tables_have_every_argument(heading: str) -> None:
    rows = tables()[heading]
    theirs = [name for cell, _ in rows for name in re.findall(r"`(\w+)`", cell) if name != "SFTConfig"]
    assert len(set(theirs)) == len(theirs)
    assert set(theirs) == SECTIONS[heading].theirs()


@pytest.mark.parametrize("heading", SECTIONS)
def test_counterparts_exist(heading: str) -> None:
    """What stands in the right column as a name, or as a name and its value, is an argument here."""
    known = SECTIONS[heading].ours() | set(mixce_kernels.__all__)
    for name, here in tables()[heading]:
        spans = re.findall(r"`([^`]+)`", here)
        found = {match[1] for span in spans if (match := re.fullmatch(r"(\w+)(?:=.*)?", span))}
        assert found <= known, f"{name}: {found - known}"
        assert found or here.startswith("no counterpart"), name
        for span in spans:
            assert set(re.findall(r"stats\.(\w+)", span)) <= set(MixCEStats._fields), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 4, 1000])
@pytest.mark.parametrize("option", ["", "label_smoothing", "weight"])
def test_cross_entropy_with_each_argument(reduction: str, ignore_index: int, option: str) -> None:
    """The first table, by the calls it describes."""
    torch.manual_seed(5)
    inputs = torch.randn(5, 11, 3, 2, dtype=torch.float64, requires_grad=True)  # [N, C, d1, d2]
    target = torch.randint(11, (5, 3, 2))
    target[0, 0], target[1] = ignore_index, 4
    weight = torch.rand(11, dtype=torch.float64)
    theirs: dict[str, Any] = {"label_smoothing": 0.2} if option == "label_smoothing" else {}
    ours = dict(theirs)
    if option == "weight":
        theirs["weight"] = weight
        ours["token_weights"] = weight[target.clamp(min=0, max=10)]
    before = F.cross_entropy(inputs, target, reduction=reduction, ignore_index=ignore_index, **theirs)
    after = fused_mixce_loss(inputs.movedim(1, -1), target, 1.0, reduction=reduction, ignore_index=ignore_index, **ours)
    assert_near(after, before)
    upstream = torch.randn_like(before)
    grads = [torch.autograd.grad(loss, inputs, upstream)[0] for loss in (before, after)]
    assert_near(grads[1], grads[0])


def test_class_weights_with_label_smoothing_differ() -> None:
    """Where the page says that there is no counterpart."""
    logits, targets, weight = torch.randn(6, 11), torch.randint(11, (6,)), torch.rand(11)
    before = F.cross_entropy(logits, targets, weight=weight, label_smoothing=0.2)
    assert_far(fused_mixce_loss(logits, targets, 1.0, token_weights=weight[targets], label_smoothing=0.2), before)
