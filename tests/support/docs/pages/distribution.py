"""docs/distribution.md."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from build_hub import build
from mixce_kernels import mixce_loss_reference
from support.docs.blocks import Namespace, Page, Step
from support.docs.checks import assert_near
from support.hub import FOLDER

if FOLDER.is_dir():
    sys.path.append(str(FOLDER))


def set_up() -> Namespace:
    folder = tempfile.TemporaryDirectory()
    build(Path(folder.name))
    logits, targets = torch.randn(8, 515, requires_grad=True), torch.randint(515, (8,))
    # The folder is there as long as its object is.
    return {"hub": Path(folder.name), "folder": folder, "logits": logits, "targets": targets}


def check_local_kernel(names: Namespace) -> None:
    logits = names["logits"].detach().double().requires_grad_()
    expected = mixce_loss_reference(logits, names["targets"], eta=0.5)
    assert_near(names["loss"], expected)
    assert_near(names["logits"].grad, torch.autograd.grad(expected, logits)[0])
    assert names["mixce"].__name__ != "mixce_kernels"


PAGE = Page("distribution.md", set_up, (Step(check_local_kernel, needs=("kernels",)),))
