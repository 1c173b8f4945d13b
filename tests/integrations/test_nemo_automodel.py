"""The losses of NeMo Automodel: built from a recipe's YAML, and called by its own `calculate_loss`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("nemo_automodel", reason="test_other_trainers.py runs it with NeMo Automodel")

import yaml
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.loss import build_loss_config
from nemo_automodel.components.loss.linear_ce_base import LinearCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.loss.utils import calculate_loss
from nemo_automodel.recipes._typed_config import _callable_and_kwargs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mixce_kernels import mixce_loss_reference
from mixce_kernels.integrations.nemo_automodel import LinearMixCELoss, MixCELoss
from mixce_kernels.weightings import Power
from support.paths import ROOT

MODULE = "mixce_kernels.integrations.nemo_automodel"
B, T, D, V = 3, 7, 16, 61


def built(target: str, **options: Any) -> Any:
    """The loss of a recipe, as its typed configuration builds it."""
    node = ConfigNode({"loss_fn": {"_target_": f"{MODULE}.{target}", **options}})
    factory, kwargs = _callable_and_kwargs(node.loss_fn)
    return build_loss_config(factory, **kwargs).build()


class Inputs:
    """Hidden states, head and labels that are shifted already, of the same numbers every time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(B, T, D, generator=generator).requires_grad_()
        self.weight = torch.randn(V, D, generator=generator).requires_grad_()
        self.labels = torch.randint(V, (B, T), generator=generator)
        self.labels[0, 3:] = -100
        self.factors = torch.rand(B, T, generator=generator)

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return self.hidden.grad, self.weight.grad

    def called(self, loss_fn: Any, num_label_tokens: int | None, weighted: bool) -> Tensor:
        """As the recipe's `_forward_backward_step` calls it."""
        loss: Tensor = calculate_loss(
            loss_fn,
            logits=self.hidden @ self.weight.T,
            labels=self.labels,
            model=None,
            hidden_states=self.hidden,
            lm_weight=self.weight,
            num_label_tokens=num_label_tokens,
            loss_weights=self.factors if weighted else None,
        )
        return loss

    def expected(self, eta: float, num_label_tokens: int | None, weighted: bool, **options: Any) -> Tensor:
        logits = self.hidden.double() @ self.weight.double().T
        per_token = mixce_loss_reference(logits, self.labels, eta, reduction="none", **options)
        return (per_token * self.factors if weighted else per_token).sum() / (num_label_tokens or 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_label_tokens", [None, 40])
@pytest.mark.parametrize("target", ["MixCELoss", "LinearMixCELoss"])
def test_loss_and_gradient_are_the_plain_formula_s(target: str, num_label_tokens: int | None, weighted: bool) -> None:
    """float32 against float64, of logits up to 20: some hundred epsilons of the largest number."""
    got, wanted = Inputs(), Inputs()
    loss = got.called(built(target, eta=0.3, weighting="Power(alpha=0.5)"), num_label_tokens, weighted)
    expected = wanted.expected(0.3, num_label_tokens, weighted, weighting=Power(0.5))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for one, other in zip(got.gradients, wanted.gradients, strict=True):
        assert (one - other).abs().max() <= 2e-5 * other.abs().max()


@pytest.mark.parametrize("target", ["MixCELoss", "LinearMixCELoss"])
def test_no_token_on_any_rank_is_a_loss_of_0_with_gradients(target: str) -> None:
    inputs = Inputs()
    inputs.labels.fill_(-100)
    loss = inputs.called(built(target), 0, False)
    loss.backward()
    assert loss == 0
    assert all((gradient == 0).all() for gradient in inputs.gradients)


def test_eta_1_is_automodel_s_own_loss() -> None:
    inputs = Inputs()
    own = inputs.called(MaskedCrossEntropy(), 18, True)
    for target in ("MixCELoss", "LinearMixCELoss"):
        torch.testing.assert_close(inputs.called(built(target, eta=1.0), 18, True), own)


def test_automodel_takes_them_for_what_they_replace() -> None:
    """By type it decides on what to call a loss with, and whether to put plain cross-entropy in its place."""
    assert isinstance(built("MixCELoss"), MaskedCrossEntropy)
    assert isinstance(built("LinearMixCELoss"), LinearCrossEntropy)
    for target in ("MixCELoss", "LinearMixCELoss"):
        loss = built(target, ignore_index=-1)
        assert (loss.ignore_index, loss.reduction) == (-1, "sum")
        inputs = Inputs()
        # Automodel writes the loss's own index in the place of -100.
        torch.testing.assert_close(
            inputs.called(loss, 9, False).double(), inputs.expected(0.5, 9, False), rtol=1e-5, atol=0
        )


def test_mask_takes_tokens_out_and_leaves_the_labels_as_they_are() -> None:
    inputs = Inputs()
    labels, mask = inputs.labels.clone(), torch.rand(B, T) < 0.5
    loss = MixCELoss()(inputs.hidden @ inputs.weight.T, inputs.labels, mask)
    assert (inputs.labels == labels).all()
    inputs.labels[~mask] = -100
    torch.testing.assert_close(loss.double(), inputs.expected(0.5, None, False), rtol=1e-5, atol=0)


def test_softcap_and_scale_of_a_head_that_does_not_run() -> None:
    inputs = Inputs()
    loss = inputs.called(built("LinearMixCELoss", softcap=5.0, logit_scale=0.5), None, False)
    expected = inputs.expected(0.5, None, False, softcap=5.0, logit_scale=0.5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_logits_whose_vocabulary_is_sharded(tmp_path: Path) -> None:
    """As a colwise-parallel head gives them; tests of more ranks are those of `fused_mixce_loss`."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        inputs = Inputs()
        sharded = distribute_tensor(
            (inputs.hidden @ inputs.weight.T).detach(), init_device_mesh("cpu", (1,)), [Shard(-1)]
        ).requires_grad_()
        loss = calculate_loss(
            built("MixCELoss"), logits=sharded, labels=inputs.labels, model=None, hidden_states=None, num_label_tokens=9
        )
        assert type(loss) is Tensor
        torch.testing.assert_close(loss.double(), inputs.expected(0.5, 9, False), rtol=1e-5, atol=0)
        loss.backward()
        assert sharded.grad.placements == sharded.placements
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": -0.5}, r"expected eta in \[0, 1\], got -0.5"),
        ({"weighting": "Cube()"}, "expected one of Probability, Power"),
        ({"label_smoothing": 1.5}, "expected label_smoothing"),
        ({"ignore_index": 0.5}, "expected ignore_index"),
    ],
)
@pytest.mark.parametrize("loss", [MixCELoss, LinearMixCELoss])
def test_options_out_of_range_are_refused_at_once(loss: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        loss(**options)


def test_the_documented_block_builds_the_loss() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text()
    block = page.partition("## NeMo Automodel")[2].partition("<<'EOF'\n")[2].partition("EOF\n")[0]
    factory, kwargs = _callable_and_kwargs(ConfigNode(yaml.safe_load(block)).loss_fn)
    assert isinstance(build_loss_config(factory, **kwargs).build(), LinearMixCELoss)
