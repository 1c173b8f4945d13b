"""Rare calls of the sharded losses: sub-groups, transformations, huge numbers, ranks that differ in where they meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_gather_tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils.checkpoint import checkpoint

from conftest import EMULATED
from mixce_kernels import (
    fused_linear_mixce_loss,
    fused_mixce_loss,
    linear_mixce_loss_reference,
    mixce_loss_reference,
    vocab_parallel_mixce_loss,
)
from support.inputs import computed
from support.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(EMULATED), reason="of the backend cpu and the reference"),
]
RANKS = 3
TOKENS, VOCAB_SIZE, HIDDEN_SIZE = 7, 23, 8
CLOSE = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
BACKENDS = ("cpu", "reference")
MODES: tuple[dict[str, Any], ...] = (
    {},
    {"grad_in_forward": True},
    {"inplace_backward": True},
    {"grad_in_forward": True, "inplace_backward": True},
)


def _tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(TOKENS, VOCAB_SIZE, generator=generator)
    return logits, torch.randint(VOCAB_SIZE, (TOKENS,), generator=generator)


def _columns(group: dist.ProcessGroup | None = None, vocab_size: int = VOCAB_SIZE) -> tuple[int, int]:
    """The first column of this rank, and the one after its last."""
    group = dist.group.WORLD if group is None else group
    return tuple(vocab_size * (group.rank() + step) // group.size() for step in (0, 1))


def _holds(
    logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None = None, upstream: float = 1.0, **options: Any
) -> None:
    """Loss and gradient of this rank's columns are those of one process, with both backends."""
    begin, end = _columns(group, logits.shape[-1])
    whole = logits.clone().requires_grad_()
    expected = mixce_loss_reference(whole, targets, 0.3, **options)
    (grad,) = torch.autograd.grad(expected, whole, torch.full_like(expected, upstream))
    for backend in BACKENDS:
        shard = computed(logits[..., begin:end].clone())
        loss = vocab_parallel_mixce_loss(
            shard, targets, 0.3, group=group, vocab_start=begin, backend=backend, **options
        )
        torch.testing.assert_close(loss, expected, **CLOSE)
        (shard_grad,) = torch.autograd.grad(loss, shard, torch.full_like(loss, upstream))
        torch.testing.assert_close(shard_grad, grad[..., begin:end], **CLOSE)


def ignore_index_of_any_size() -> None:
    """Counted from a shard's first column, the smallest is no int64."""
    logits, targets = _tokens()
    for ignore_index in (-(2**63), 2**63 - 1, -1, 0, VOCAB_SIZE - 1):
        targets[1] = ignore_index
        for options in ({}, {"label_smoothing": 1.0, "softcap": 5.0}):
            _holds(logits, targets, ignore_index=ignore_index, **options)
            _holds(logits, targets, ignore_index=ignore_index, grad_in_forward=True, **options)


def sub_groups() -> None:
    """Groups that overlap; rank 2 is rank 1 of one of them."""
    logits, targets = _tokens()
    groups = [dist.new_group(ranks) for ranks in ([2, 0], [1, 2], [1])]
    for ranks, group in zip(([0, 2], [1, 2], [1]), groups, strict=True):
        if dist.get_rank() in ranks:
            _holds(logits, targets, group, label_smoothing=0.1)


def infinities_of_a_whole_shard() -> None:
    """In rows of their own: shards without a finite logit, a NaN, an infinity, a target without a probability."""
    logits, targets = _tokens()
    begin, end = VOCAB_SIZE // RANKS, 2 * VOCAB_SIZE // RANKS
    logits[0, begin:end] = -torch.inf
    logits[1] = -torch.inf
    logits[2, begin] = torch.nan
    logits[3, -1] = torch.inf
    logits[4, targets[4]] = -torch.inf
    logits[5, 1:] = -torch.inf
    for options in ({}, {"label_smoothing": 1.0}, {"softcap": 4.0, "z_loss": 0.01}):
        _holds(logits, targets, reduction="none", upstream=-0.5, **options)


def any_shape() -> None:
    """Columns of one logit, no dimension of tokens, none of them, targets of other strides and type."""
    logits, targets = _tokens()
    _holds(logits[:, :RANKS], targets % RANKS, z_loss=0.1)
    _holds(logits[0], targets[0])
    _holds(logits[:0].reshape(0, 2, VOCAB_SIZE), targets[:0].reshape(0, 2))
    _holds(logits[:6].reshape(2, 3, -1).transpose(0, 1), targets[:6].int().reshape(2, 3).t())


def checkpoints() -> None:
    """Both kinds, which meet once more in backward."""
    logits, targets = _tokens()
    begin, end = _columns()
    whole = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mixce_loss_reference(whole, targets, 0.3), whole)
    for mode in MODES:
        for reentrant in (True, False):
            shard = logits[:, begin:end].clone().requires_grad_()

            def loss_of(shard: Tensor, mode: dict[str, Any] = mode) -> Any:
                return vocab_parallel_mixce_loss(shard * 1.0, targets, 0.3, group=None, vocab_start=begin, **mode)

            checkpoint(loss_of, shard, use_reentrant=reentrant).backward()
            torch.testing.assert_close(shard.grad, grad[:, begin:end], **CLOSE)


def transformations() -> None:
    """`torch.func.grad` of both losses and backends; and of the linear loss once more."""
    logits, targets = _tokens()
    begin, end = _columns()
    expected = torch.func.grad(lambda logits: mixce_loss_reference(logits, targets, 0.3))(logits)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN_SIZE, generator=generator).double()
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator).double()

    def twice(loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        grad = torch.func.grad(loss_of)
        return grad(hidden), torch.func.grad(lambda hidden: grad(hidden).sum())(hidden)

    expected_twice = twice(lambda hidden: linear_mixce_loss_reference(hidden, weight, targets, 0.3))
    for backend in BACKENDS:
        call = {"group": dist.group.WORLD, "vocab_start": begin, "backend": backend}
        for mode in MODES:
            found = torch.func.grad(
                lambda shard, mode=mode, call=call: vocab_parallel_mixce_loss(shard, targets, 0.3, **call, **mode)
            )(logits[:, begin:end])
            torch.testing.assert_close(found, expected[:, begin:end], **CLOSE)
        found_twice = twice(
            lambda hidden, call=call: fused_linear_mixce_loss(hidden, weight[begin:end], targets, 0.3, **call)
        )
        torch.testing.assert_close(found_twice, expected_twice)


def tensors_in_flight() -> None:
    """Logits that a collective has yet to fill, as PyTorch's parallel layers hand them on; of targets, too."""
    logits, targets = _tokens()
    logits, targets = logits[: 2 * RANKS], targets[: 2 * RANKS]
    whole = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mixce_loss_reference(whole, targets, 0.3), whole)
    mesh = init_device_mesh("cpu", (RANKS,))
    for mode in MODES:
        leaf = distribute_tensor(logits.clone(), mesh, [Shard(0)]).requires_grad_()
        gathered = (leaf * 1.0).redistribute(placements=[Replicate()], async_op=True)
        fused_mixce_loss(gathered, targets, 0.3, **mode).backward()
        torch.testing.assert_close(leaf.grad.full_tensor(), grad, **CLOSE)
        leaf = distribute_tensor(logits.clone(), mesh, [Shard(0)]).requires_grad_()
        local = (leaf * 1.0).redistribute(placements=[Replicate()], async_op=True).to_local()
        flying = all_gather_tensor(targets[2 * dist.get_rank() :][:2].clone(), 0, dist.group.WORLD)
        assert type(local) is type(flying) is AsyncCollectiveTensor
        fused_mixce_loss(local, flying, 0.3, **mode).backward()
        torch.testing.assert_close(leaf.grad.full_tensor(), grad, **CLOSE)
        begin, end = _columns()
        shard = logits[:, begin:end].clone().requires_grad_()
        flying = all_gather_tensor(targets[2 * dist.get_rank() :][:2].clone(), 0, dist.group.WORLD)
        vocab_parallel_mixce_loss(shard * 1.0, flying, 0.3, group=None, vocab_start=begin, **mode).backward()
        torch.testing.assert_close(shard.grad, grad[:, begin:end], **CLOSE)


def one_graph() -> None:
    """Two losses of one graph, and a second backward."""
    logits, targets = _tokens()
    begin, end = _columns()
    whole = logits.clone().requires_grad_()
    (3 * mixce_loss_reference(whole, targets, 0.3) + mixce_loss_reference(2 * whole, targets, 0.7)).backward()
    for mode in MODES[:2]:
        shard = logits[:, begin:end].clone().requires_grad_()
        one, other = (
            vocab_parallel_mixce_loss(part, targets, eta, group=None, vocab_start=begin, **mode)
            for part, eta in ((shard, 0.3), (2 * shard, 0.7))
        )
        (one + other).backward(retain_graph=True)
        (2 * one).backward()
        torch.testing.assert_close(shard.grad, whole.grad[:, begin:end], **CLOSE)


# What rank 1 does otherwise, which would leave the ranks in different collectives.
DIFFERENCES: dict[str, dict[str, Any]] = {
    "backend='reference'": {"backend": "reference"},
    "validate": {"validate": True},
    "max_chunk_bytes": {"max_chunk_bytes": 256},
}


def differences() -> None:
    """A sentence on every rank, from both losses, and the group is as good as before."""
    logits, targets = _tokens()
    begin, end = _columns()
    hidden = torch.randn(TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def plain(group: dist.ProcessGroup, **options: Any) -> None:
        vocab_parallel_mixce_loss(logits[:, begin:end], targets, 0.3, group=group, vocab_start=begin, **options)

    def linear(group: dist.ProcessGroup, **options: Any) -> None:
        for vocab_size in (None, VOCAB_SIZE):
            fused_linear_mixce_loss(
                hidden, torch.ones(end - begin, HIDDEN_SIZE), targets, 0.3, group=group, vocab_start=begin,
                vocab_size=vocab_size, **options,
            )  # fmt: skip

    for loss_of in (plain, linear):
        for name, changes in DIFFERENCES.items():
            if loss_of is plain and name == "max_chunk_bytes":
                continue
            group = dist.new_group()
            with pytest.raises(ValueError, match=rf"the same (answer to )?{name} on every rank of the group, got"):
                loss_of(group, **{"backend": "cpu", **(changes if dist.get_rank() == 1 else {})})
            loss_of(group, backend="cpu")


def hidden_states_that_one_rank_differentiates() -> None:
    """Backward adds up their gradient: a sentence on every rank, at a group's first call and at later ones."""
    _, targets = _tokens()
    begin, end = _columns()
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(2))[begin:end]
    for met in (False, True):
        for vocab_size in (None, VOCAB_SIZE):
            for backend in BACKENDS:
                group = dist.new_group()

                def call(requires_grad: bool) -> None:
                    hidden = torch.ones(TOKENS, HIDDEN_SIZE, requires_grad=requires_grad)
                    fused_linear_mixce_loss(
                        hidden, weight.clone().requires_grad_(), targets, 0.3, group=group, vocab_start=begin,  # noqa: B023
                        vocab_size=vocab_size, backend=backend,  # noqa: B023
                    ).backward()  # fmt: skip

                if met and backend == "reference":
                    continue
                if met:
                    call(True)
                with pytest.raises(ValueError, match="whether the hidden states require a gradient on every rank"):
                    call(dist.get_rank() == 1)
                call(False)


def compiled_numbers_and_batches() -> None:
    """A number that changes from call to call is the call's own in compiled code; and `torch.vmap` of a batch."""
    logits, targets = _tokens()
    begin, end = _columns()

    def loss_of(logits: Tensor, targets: Tensor, eta: float, **options: Any) -> Any:
        return vocab_parallel_mixce_loss(
            logits, targets, eta, group=None, vocab_start=begin, vocab_size=VOCAB_SIZE, **options
        )

    def scaled(shard: Tensor, number: float) -> Tensor:
        return loss_of(shard, targets, 1 - number / 10, logit_scale=1 / number, label_smoothing=number / 20) * number

    torch._dynamo.reset()
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for number in (1.0, 2.0, 3.0, 4.0, 2.0):
        torch.testing.assert_close(compiled(logits[:, begin:end], number), scaled(logits[:, begin:end], number))
    batch = torch.stack([logits, logits.flip(0), -logits])[..., begin:end]
    expected = torch.stack([loss_of(shard, targets, 0.3) for shard in batch])
    batched = torch.vmap(lambda shard: loss_of(shard, targets, 0.3))(batch)
    torch.testing.assert_close(batched, expected, **CLOSE)


def gathered_vocabularies() -> None:
    """Whole logits, or the whole weight, on every rank, with the columns of a shard: no part of a larger vocabulary.

    Unless the size of the vocabulary says so; and alike in every number they are at a training's first step.
    """
    logits, targets = _tokens()
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(2))
    hidden, start = torch.ones(TOKENS, HIDDEN_SIZE), dist.get_rank() * VOCAB_SIZE
    every = RANKS * VOCAB_SIZE

    def plain(values: Tensor, **keywords: Any) -> Any:
        return vocab_parallel_mixce_loss(values, targets, group=dist.new_group(), vocab_start=start, **keywords)

    def linear(values: Tensor, **keywords: Any) -> Any:
        return fused_linear_mixce_loss(
            hidden, values, targets, group=dist.new_group(), vocab_start=start, **keywords
        )  # fmt: skip

    for call, values, what in ((plain, logits, "logits"), (linear, weight, "weight")):
        for options in ({}, {"backend": "reference"}, {"validate": True}):
            with pytest.raises(ValueError, match=rf"own columns, got the same {what} on all {RANKS} ranks .*={every} "):
                call(values, **options)
            with pytest.raises(ValueError, match=rf"of vocab_size={VOCAB_SIZE}, got the same {what} of {VOCAB_SIZE} "):
                call(values, vocab_size=VOCAB_SIZE, **options)
            call(values, vocab_size=every, **options)
            call(torch.zeros_like(values), **options)
            call(values, check_group=False, **options)
    # Of ignored tokens nothing is known, and -inf is no number to compare by.
    masked = torch.full_like(logits, -torch.inf)
    masked[:, dist.get_rank()] = 0.0
    plain(masked)


def another_life() -> None:
    """Groups, and all of torch.distributed, may end and begin anew: the first call is compared again."""
    logits, targets = _tokens()
    begin, _ = _columns()
    for _ in range(2):
        group = dist.new_group()
        _holds(logits, targets, group)
        dist.destroy_process_group(group)
        group = dist.new_group()
        with pytest.raises(ValueError, match="hold each column"):
            vocab_parallel_mixce_loss(logits, targets, 0.3, group=group, vocab_start=begin)
        dist.destroy_process_group(group)


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        ignore_index_of_any_size, sub_groups, infinities_of_a_whole_shard, any_shape, checkpoints, transformations,
        tensors_in_flight, one_graph, differences, hidden_states_that_one_rank_differentiates, gathered_vocabularies,
        compiled_numbers_and_batches,
        another_life,
    )
}  # fmt: skip


def try_all() -> dict[str, str]:
    """What went wrong, by the case's name. No rank goes on alone: an error of one would hang the others."""
    wrong = {}
    for name, case in CASES.items():
        try:
            case()
        except AssertionError as error:
            wrong[name] = str(error)
        dist.barrier()
    return wrong


@pytest.fixture(scope="module")
def wrong() -> list[dict[str, str]]:
    return run_ranks(try_all, RANKS)


@pytest.mark.parametrize("name", CASES)
def test_edge_cases(name: str, wrong: list[dict[str, str]]) -> None:
    """As in one process, or a sentence on every rank."""
    for rank, found in enumerate(wrong):
        assert name not in found, f"rank {rank}: {found[name]}"
