"""docs/vocab_parallel.md, on one rank; test_vocab_parallel_group.py and test_dtensor.py have several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mixce_kernels import fused_mixce_loss, mixce_loss_reference
from support.docs.blocks import Namespace, Page, Step
from support.docs.checks import assert_differentiated, assert_near, gradients
from support.docs.models import group_of_one, new_model, new_tokens


def set_up() -> Namespace:
    return {"rank": 0, "columns": 50304, "model": new_model(torch.float64), "tokens": new_tokens()}


@contextmanager
def with_padded_shard(names: Namespace) -> Iterator[None]:
    with group_of_one() as group:
        logits = 3 * torch.randn(2, 3, names["columns"])
        # Padding counts for nothing, whatever it holds.
        logits[..., 50257:] = 100.0
        targets = torch.randint(50257, (2, 3))
        names.update(logits_shard=logits.requires_grad_(), targets=targets, tensor_parallel_group=group)
        yield


def check_padded_shard(names: Namespace) -> None:
    shard, targets = names["logits_shard"], names["targets"]
    assert_differentiated(names["loss"], lambda logits: mixce_loss_reference(logits[..., :50257], targets, 0.5), shard)
    assert shard.grad[..., 50257:].eq(0).all()


@contextmanager
def with_mesh(names: Namespace) -> Iterator[None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    names.update(Shard=Shard, ColwiseParallel=ColwiseParallel, parallelize_module=parallelize_module)
    names.update(fused_mixce_loss=fused_mixce_loss, targets=names["tokens"])
    with group_of_one():
        names["mesh"] = init_device_mesh("cpu", (1,))
        yield


def check_mesh(names: Namespace) -> None:
    loss, tokens = names["loss"], names["tokens"]
    assert [placement.is_replicate() for placement in loss.placements] == [True]
    twin = new_model(torch.float64)
    expected = mixce_loss_reference(twin(tokens), tokens, 0.5)
    expected.backward()
    assert_near(loss.full_tensor(), expected)
    for name, grad in gradients(names["model"]).items():
        whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        assert_near(whole, gradients(twin)[name], name)


PAGE = Page("vocab_parallel.md", set_up, (Step(check_padded_shard, with_padded_shard), Step(check_mesh, with_mesh)))
