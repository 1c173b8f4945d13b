"""docs/index.md, which takes nothing for granted."""

from __future__ import annotations

from torch import Tensor

from mixce_kernels import mixce_loss_reference
from support.docs.blocks import Namespace, Page, Step
from support.docs.checks import assert_differentiated, check_call


def check_linear_call(names: Namespace) -> None:
    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return mixce_loss_reference(hidden @ weight.T, names["targets"], 0.5)

    assert_differentiated(names["loss"], loss_of, names["hidden"], names["weight"])


PAGE = Page("index.md", steps=(Step(check_call), Step(check_linear_call)))
