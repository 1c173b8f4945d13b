"""The losses of DTensors on meshes of two to four ranks: any placement, parallel modules, FSDP, and what is refused."""

from __future__ import annotations

import itertools
import math
import re
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from test_linear_parallel import assert_all_close, check_linear_statistics, collectives_of, raised
from torch import Tensor, nn

from conftest import EMULATED, INTERPRETED
from mixce_kernels import MixCEStats, fused_linear_mixce_loss, fused_mixce_loss, vocab_parallel_mixce_loss
from support import cases
from support.cases import BFLOAT16
from support.inputs import build
from support.linear_cases import LINEAR, build_linear, check_linear
from support.loss_checks import check, check_statistics
from support.ranks import run_ranks, what_goes_wrong
from support.shards import everyone

parallel = pytest.importorskip("torch.distributed.tensor.parallel", reason="needs tensor parallelism")
fully_shard = pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2").fully_shard
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

pytestmark = pytest.mark.slow

WORLD = 4
# The ranks have CPU tensors.
NAMES = [EMULATED] if EMULATED else ["reference", "cpu"]
Placements = tuple[Placement, ...]


class Turn(NamedTuple):
    """A case, and where it is tried."""

    number: int
    case: Any  # Case or LinearCase
    mesh: str
    placements: Any  # of the logits, or of hidden states and weight
    backend: str


# Of [B, T, V]: any on one dimension of the mesh, and any two on two, of which one may split the vocabulary.
_EACH = (Replicate(), Shard(0), Shard(1), Shard(2))
LAYOUTS: list[tuple[str, Placements]] = [(mesh, (one,)) for mesh in ("2", "3", "4") for one in _EACH]
LAYOUTS += [("2x2", pair) for pair in itertools.product(_EACH, _EACH) if pair != (Shard(2), Shard(2))]
# Of hidden states [B, T, D], and of the weight [V, D].
LINEAR_LAYOUTS: list[tuple[str, tuple[Placements, Placements]]] = [
    (mesh, ((one,), (other,))) for mesh in ("2", "3", "4") for one in _EACH[:3] for other in (Replicate(), Shard(0))
]
LINEAR_LAYOUTS += [
    ("2x2", (pair, weight))
    for pair in itertools.product(_EACH[:3], _EACH[:3])
    for weight in ((Replicate(), Replicate()), (Shard(0), Replicate()), (Replicate(), Shard(0)))
]  # fmt: skip


def _short(placements: Any) -> str:
    return "".join(re.sub(r"[()]", "", str(one)) for one in placements)


def _turns(table: Sequence[Any], layouts: Sequence[Any]) -> dict[str, Turn]:
    """By name: the cases on all layouts, over and over; layouts and backends take turns."""
    if EMULATED:
        table = [case for case in table if math.prod(getattr(case, "plain", case).shape) <= 10_000]
        table = table[:: 16 if INTERPRETED else 4]
    turns = {}
    for number, case in enumerate(table):
        mesh, placements = layouts[number % len(layouts)]
        backend = NAMES[0 if number % 3 == 1 else -1]
        shown = placements if isinstance(placements[0], Placement) else placements[0] + placements[1]
        turns[f"{number}-{case}-{_short(shown)}_on_{mesh}-{backend}"] = Turn(number, case, mesh, placements, backend)
    return turns


TABLE = _turns(
    [case for case in cases.RANDOM + cases.REDUCTIONS[::2] if len(case.shape) == 3]
    # A vocabulary of fewer columns than ranks, on every layout.
    + [case for case in cases.RANDOM if case.shape[-1] == 3] * 2,
    LAYOUTS,
)
LINEAR_TABLE = _turns(
    [case for case in LINEAR if len(case.plain.shape) == 3 and case.plain.shape[1] > 0][::3], LINEAR_LAYOUTS
)


class Meshes:
    """The meshes of the tests: made once by all ranks, and used by those that are in them."""

    def __init__(self) -> None:
        self.by_name = {str(size): DeviceMesh("cpu", torch.arange(size)) for size in (2, 3, 4)}
        names = ("dp", "tp")
        self.by_name["2x2"] = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=names)
        self.groups = {name: dist.new_group(list(range(mesh.size()))) for name, mesh in self.by_name.items()}

    def __getitem__(self, name: str) -> DeviceMesh:
        return self.by_name[name]


def one_entry_a_token(number: int, tensor: Tensor, mesh: DeviceMesh, as_tokens: Placements) -> Tensor:
    """A tensor [...] or what broadcasts to it: plain, whole on every rank, placed as the tokens are, or otherwise."""
    everywhere = (Replicate(),) * mesh.ndim
    placements = [None, everywhere, as_tokens, (Shard(0),) * mesh.ndim][number % 4]
    if placements is None:
        return tensor
    fits = all(not one.is_shard() or one.dim < tensor.dim() for one in placements)
    return distribute_tensor(tensor.contiguous(), mesh, placements if fits else everywhere)


def of_tokens(placements: Placements, n_dims: int) -> Placements:
    """Where the tokens of logits [..., V] are."""
    return tuple(Replicate() if one.is_shard(n_dims - 1) else one for one in placements)


def distributed_tokens(turn: Turn, inputs: Any, mesh: DeviceMesh, placements: Placements) -> tuple[Any, Any, dict]:
    """Targets, eta and keywords, plain or distributed in turn."""
    number, keywords = turn.number, dict(inputs.keywords)
    targets = one_entry_a_token(number, inputs.targets, mesh, placements)
    eta = inputs.eta
    if isinstance(eta, Tensor):
        eta = one_entry_a_token(number // 2, eta, mesh, placements)
    if "token_weights" in keywords:
        keywords["token_weights"] = one_entry_a_token(number // 3, keywords["token_weights"], mesh, placements)
    if isinstance(keywords.get("num_items_in_batch"), Tensor) and number % 2 == 0:
        keywords["num_items_in_batch"] = one_entry_a_token(1, keywords["num_items_in_batch"], mesh, placements)
    return targets, eta, keywords


def whole(tensor: Tensor, placements: Placements) -> Tensor:
    """All of a DTensor, which must be placed so."""
    assert isinstance(tensor, DTensor), type(tensor)
    assert tensor.placements == placements, (tensor.placements, placements)
    return tensor.full_tensor()


def as_in_one_process(mesh: DeviceMesh, turn: Turn) -> None:
    """Loss and gradient by the accuracy rule; every result's placements."""
    inputs = build(turn.case)
    # No leaf: it may be overwritten.
    logits = distribute_tensor(inputs.logits.detach().contiguous(), mesh, turn.placements).requires_grad_() * 1
    tokens = of_tokens(turn.placements, logits.dim())
    targets, eta, keywords = distributed_tokens(turn, inputs, mesh, tokens)
    with_stats = turn.number % 2 == 1
    loss = fused_mixce_loss(logits, targets, eta, backend=turn.backend, return_stats=with_stats, **keywords)
    stats = None
    if with_stats:
        loss, stats = loss
        stats = MixCEStats(*(whole(one, tokens) for one in stats))
    placements = tokens if turn.case.reduction == "none" else (Replicate(),) * mesh.ndim
    # Of another placement than the loss, in turn.
    upstream = one_entry_a_token(1 + turn.number % 3, inputs.upstream, mesh, placements)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    loss, grad = whole(loss, placements).detach(), whole(grad, turn.placements)
    if mesh.get_rank() != mesh.size() - 1:
        return
    fresh = build(turn.case)
    extra = 1 if INTERPRETED and turn.case.dtype == BFLOAT16 else 0
    check(fresh, fresh.oracle(), loss, grad, extra)
    if stats is not None:
        check_statistics(turn.case, stats)


def linear_as_in_one_process(mesh: DeviceMesh, turn: Turn) -> None:
    """Loss and gradients by the accuracy rule; every result's placements."""
    inputs = build_linear(turn.case)
    of_hidden, of_weight = turn.placements
    leaves = [
        distribute_tensor(one.detach().contiguous(), mesh, placements).requires_grad_()
        for one, placements in zip(inputs.leaves, (of_hidden, of_weight, of_weight), strict=False)
    ]
    # Where the weight is sharded, each rank has all hidden states of the others.
    tokens = tuple(Replicate() if one.is_shard() else two for one, two in zip(of_weight, of_hidden, strict=True))
    targets, eta, keywords = distributed_tokens(turn, inputs.tokens, mesh, tokens)
    keywords = {name: value for name, value in {**inputs.keywords, **keywords}.items() if name in inputs.keywords}
    bias = leaves[2] if len(leaves) > 2 else None
    loss, stats = fused_linear_mixce_loss(
        *leaves[:2], targets, eta, bias=bias, backend=turn.backend, return_stats=True, **keywords
    )
    whole_stats = MixCEStats(*(whole(one, tokens) for one in stats))
    placements = tokens if turn.case.plain.reduction == "none" else (Replicate(),) * mesh.ndim
    upstream = one_entry_a_token(1 + turn.number % 3, inputs.tokens.upstream, mesh, placements)
    grads = torch.autograd.grad(loss, leaves, upstream)
    loss = whole(loss, placements).detach()
    full = [whole(one, leaf.placements) for one, leaf in zip(grads, leaves, strict=True)]
    if mesh.get_rank() == mesh.size() - 1:
        check_linear(inputs, loss, full, 1 if INTERPRETED and turn.case.plain.dtype == BFLOAT16 else 0)
        check_linear_statistics(inputs, whole_stats)


def small(
    mesh: DeviceMesh, placements: Placements, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, DTensor, Tensor]:
    """Logits [2, 4, 10] as one tensor, the same distributed, and targets."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((2, 4, 10), generator=generator, dtype=dtype)
    targets = torch.randint(10, (2, 4), generator=generator)
    targets[0, 2] = targets[1, 1:] = -100
    return logits.clone().requires_grad_(), distribute_tensor(logits, mesh, placements).requires_grad_(), targets


def collectives(mesh: DeviceMesh) -> None:
    """One all-gather where the vocabulary is split, none where nothing is; where tokens are, sums over all of them."""
    for placement, forward in (
        (Replicate(), {}), (Shard(-1), {"all_gather": 1}), (Shard(0), {"all_reduce": 2}), (Shard(1), {"all_reduce": 2}),
    ):  # fmt: skip
        _, logits, targets = small(mesh, (placement,))
        losses: list[Tensor] = []
        for keywords, count in (
            ({}, forward), ({"return_stats": True}, forward), ({"grad_in_forward": True}, forward),
            ({"num_items_in_batch": 5}, {"all_reduce": 1} if "all_reduce" in forward else forward),
            ({"reduction": "sum"}, {"all_reduce": 1} if "all_reduce" in forward else forward),
            ({"reduction": "none"}, {} if "all_reduce" in forward else forward),
        ):  # fmt: skip
            found = collectives_of(lambda: losses.append(fused_mixce_loss(logits, targets, backend="cpu", **keywords)))  # noqa: B023
            assert found == count, (placement, keywords, found)
            loss = losses.pop()
            loss = loss[0] if isinstance(loss, tuple) else loss
            found = collectives_of(lambda: torch.autograd.grad(loss.to_local().sum(), logits))  # noqa: B023
            assert found == {}, (placement, keywords, found)


def overwritten_logits_are_known_to_autograd(mesh: DeviceMesh, backend: str) -> None:
    """Who saved them gets PyTorch's error, and nobody else; a second backward, too."""
    for placements in ((Replicate(),), (Shard(0),), (Shard(2),)):
        for keywords in ({"inplace_backward": True}, {"inplace_backward": True, "grad_in_forward": True}):
            _, leaf, targets = small(mesh, placements)
            logits = 2 * leaf
            other = logits.square().sum()
            loss = fused_mixce_loss(logits, targets, backend=backend, **keywords)
            (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            for again in (other, loss):
                error = raised(lambda: torch.autograd.grad(again, leaf, retain_graph=True))  # noqa: B023
                assert "modified by an inplace operation" in error, (placements, keywords, error)
            # Without a gradient to compute they are left alone.
            before = logits.full_tensor().detach().clone()
            version = logits._version
            with torch.no_grad():
                fused_mixce_loss(logits, targets, backend=backend, **keywords)
            assert torch.equal(before, logits.full_tensor())
            assert logits._version == version
            # With a graph of its own the gradient has memory of its own, too.
            (first,) = torch.autograd.grad(
                fused_mixce_loss(2 * leaf, targets, backend=backend, inplace_backward=True), leaf, create_graph=True
            )
            assert_all_close([first.full_tensor().detach()], [grad.full_tensor()])


def overwritten_logits_are_freed(mesh: DeviceMesh, backend: str) -> None:
    """With the graph, and without the collector of garbage."""
    for keywords in ({"inplace_backward": True}, {"inplace_backward": True, "grad_in_forward": True}):
        _, leaf, targets = small(mesh, (Shard(2),))
        logits = 2 * leaf
        watched = weakref.ref(logits)
        loss = fused_mixce_loss(logits, targets, backend=backend, **keywords)
        loss.backward()
        del logits, loss
        assert watched() is None


def second_derivative(mesh: DeviceMesh, backend: str) -> None:
    for first, second in ((Shard(0), Shard(2)), (Shard(2), Shard(1)), (Replicate(), Shard(2)), (Shard(0), Replicate())):
        for reduction in ("mean", "none"):
            logits, distributed, targets = small(mesh, (first, second), torch.float64)
            results = []
            for one, of in ((distributed, backend), (logits, "reference")):
                loss = fused_mixce_loss(one, targets, 0.3, reduction=reduction, z_loss=0.01, backend=of)
                (grad,) = torch.autograd.grad(loss.sum(), one, create_graph=True)
                results.append(torch.autograd.grad(grad.square().sum(), one)[0])
            assert_all_close([whole(results[0], (first, second))], [results[1]], 256)


def compiled_equals_eager(mesh: DeviceMesh, backend: str) -> None:
    """As one graph, of a split vocabulary; of the head's weight, too, with hidden states split by the sequence."""
    hidden = distribute_tensor(torch.ones(2, 4, 6), mesh, (Shard(1),)).requires_grad_()
    weight = distribute_tensor(torch.arange(60.0).sin().view(10, 6), mesh, (Shard(0),)).requires_grad_()
    _, logits, targets = small(mesh, (Shard(2),))

    def loss(logits: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        own = fused_mixce_loss(2 * logits, targets, 0.3, inplace_backward=True, backend=backend)
        return own + fused_linear_mixce_loss(torch.sin(hidden), weight, targets, backend=backend)

    torch.use_deterministic_algorithms(False)
    try:
        leaves = [logits, hidden, weight]
        results = []
        for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
            found = function(*leaves)
            grads = [
                whole(one, of.placements) for one, of in zip(torch.autograd.grad(found, leaves), leaves, strict=True)
            ]
            results.append([found.to_local().detach(), *grads])
        assert_all_close(*results)
    finally:
        torch.use_deterministic_algorithms(True)


def assert_raise(mesh: DeviceMesh, sentence: str, call: Callable[[], Any]) -> None:
    """Every rank raises this one sentence, without a collective."""
    errors: list[str] = []
    counts = collectives_of(lambda: errors.append(raised(call)))
    assert re.fullmatch(sentence, errors[0], re.DOTALL), errors[0]
    assert counts == {}, (sentence, counts)


def what_is_refused(meshes: Meshes) -> None:
    """One sentence each, on every rank, before any of them waits for another."""
    line, square = meshes["4"], meshes["2x2"]
    everywhere = (Replicate(),)
    logits, whole_logits, targets = small(line, everywhere)
    distributed = distribute_tensor(targets, line, everywhere)
    partial_logits = DTensor.from_local(logits.detach(), line, (Partial(),), run_check=False)
    twice = distribute_tensor(logits.detach(), square, (Shard(2), Shard(2)))
    elsewhere = distribute_tensor(targets, square, (Replicate(), Replicate()))
    plain_needed = (
        "TypeError: expected logits to be a DTensor where targets, eta or token_weights are, got a plain tensor"
    )
    of_weight = (Shard(0),)
    hidden = distribute_tensor(torch.zeros(2, 4, 6), line, everywhere)
    weight, bias = (distribute_tensor(torch.zeros(10, *rest), line, of_weight) for rest in ((6,), ()))
    calls: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: fused_mixce_loss(partial_logits, targets),
            "ValueError: expected logits .*replicated or sharded, got P.*",
        ),
        (
            lambda: fused_mixce_loss(twice, targets),
            "ValueError: expected logits .*over one dimension of the mesh, got .*",
        ),
        (lambda: fused_mixce_loss(logits, distributed), plain_needed),
        (
            lambda: fused_mixce_loss(logits, targets, distribute_tensor(torch.tensor(0.5), line, everywhere)),
            plain_needed,
        ),
        (lambda: fused_mixce_loss(logits, targets, token_weights=distributed.double()), plain_needed),
        (
            lambda: fused_mixce_loss(whole_logits, elsewhere),
            "ValueError: expected all DTensors on one mesh, .*, got .*",
        ),
        (
            lambda: fused_mixce_loss(whole_logits, targets[:, :3]),
            r"ValueError: expected targets of shape \[2, 4\] for logits of shape \[2, 4, 10\], got \[2, 3\]",
        ),
        (lambda: fused_mixce_loss(whole_logits, targets, 1.5), r"ValueError: expected eta in \[0, 1\], got 1.5"),
        (
            lambda: fused_mixce_loss(whole_logits, targets, token_weights=torch.ones(2)),
            r"ValueError: expected token_weights of targets' shape \[2, 4\], got \[2\]",
        ),
        (
            lambda: vocab_parallel_mixce_loss(whole_logits, targets, group=None, vocab_start=0),
            "TypeError: expected a rank's own columns as a plain tensor, got a DTensor, which fused_mixce_loss takes",
        ),
        (
            lambda: vocab_parallel_mixce_loss(logits, distributed, group=None, vocab_start=0),
            "TypeError: expected a rank's own columns as a plain tensor, got a DTensor, which fused_mixce_loss takes",
        ),
        (
            lambda: fused_linear_mixce_loss(torch.zeros(2, 4, 6), weight, targets),
            "TypeError: expected hidden, weight, bias to be all DTensors or all plain tensors, got a plain hidden .*",
        ),
        (
            lambda: fused_linear_mixce_loss(hidden, torch.zeros(10, 6), targets),
            "TypeError: expected hidden, weight, bias .*got a plain weight .*",
        ),
        (
            lambda: fused_linear_mixce_loss(hidden, weight, targets, bias=torch.zeros(10)),
            "TypeError: expected hidden, weight, bias .*got a plain bias .*",
        ),
        (
            lambda: fused_linear_mixce_loss(hidden, weight, targets, bias=distribute_tensor(torch.zeros(10), line)),
            "ValueError: expected bias placed as weight, .*, got .*",
        ),
        (
            lambda: fused_linear_mixce_loss(hidden, distribute_tensor(torch.zeros(10, 6), line, (Shard(1),)), targets),
            "ValueError: expected a weight that is sharded by its rows alone, got .*",
        ),
        (
            lambda: fused_linear_mixce_loss(
                distribute_tensor(torch.zeros(2, 4, 6), line, (Shard(2),)),
                distribute_tensor(torch.zeros(10, 6), line, everywhere),
                targets,
            ),
            "ValueError: expected hidden .*, got .*",
        ),
        (
            lambda: fused_linear_mixce_loss(hidden, distribute_tensor(torch.zeros(10, 5), line, of_weight), targets),
            r"ValueError: expected weight of shape \[V, D\] = \[V, 6\] .*, got \[10, 5\]",
        ),
        (
            lambda: fused_linear_mixce_loss(
                distribute_tensor(torch.zeros(2, 4, 6), line, (Shard(1),)), weight, targets[:, :3], bias=bias
            ),
            r"ValueError: expected targets of shape \[2, 4\] for hidden of shape \[2, 4, 6\], got \[2, 3\]",
        ),
        (
            lambda: fused_linear_mixce_loss(
                hidden, distribute_tensor(torch.zeros(10, 6), square, (Shard(0), Replicate())), targets
            ),
            "ValueError: expected weight on the mesh .*, got .*",
        ),
        (
            lambda: fused_linear_mixce_loss(hidden, weight, targets, bias=bias, path="tiles"),
            "ValueError: expected path 'chunks' with a sharded weight, got 'tiles'",
        ),
        (
            lambda: fused_linear_mixce_loss(hidden, weight, targets, group=dist.group.WORLD, vocab_start=0),
            "ValueError: expected group=None with DTensors, .*",
        ),
        (
            lambda: fused_linear_mixce_loss(hidden, weight, targets, vocab_size=10),
            "ValueError: expected vocab_size=None with DTensors, .*, got 10",
        ),
    ]
    for call, sentence in calls:
        assert_raise(line, sentence, call)


def strided_shards_are_refused(mesh: DeviceMesh) -> None:
    """What FSDP makes of a sharded parameter: its columns are no range."""
    placement = pytest.importorskip("torch.distributed.tensor.placement_types")._StridedShard(2, split_factor=2)
    logits = DTensor.from_local(torch.zeros(2, 4, 5), mesh, (placement,), run_check=False, shape=torch.Size((2, 4, 10)),
                                stride=(40, 10, 1))  # fmt: skip
    sentence = "ValueError: expected logits that are replicated or sharded, got .*"
    assert_raise(mesh, sentence, partial(fused_mixce_loss, logits, torch.zeros(2, 4).long()))


def shards_of_other_sizes_are_refused(mesh: DeviceMesh) -> None:
    """DTensor splits as torch.chunk does; what was put together otherwise would have its columns elsewhere."""
    own = torch.zeros(2, 4, 4 if mesh.get_local_rank() == 0 else 6)
    shape = {"shape": torch.Size((2, 4, 10)), "stride": (40, 10, 1)}
    logits = DTensor.from_local(own, mesh, (Shard(2),), run_check=False, **shape)
    sentence = "ValueError: expected 5 of 10 columns here, as DTensor splits them, got [46]"
    assert_raise(mesh, sentence, partial(fused_mixce_loss, logits, torch.zeros(2, 4).long()))


def bad_targets(mesh: DeviceMesh, backend: str) -> None:
    """IndexError on every rank, in the words of one process, also of a rank that has other tokens."""
    for placement, distributed in itertools.product((Replicate(), Shard(0), Shard(1), Shard(2)), (False, True)):
        _, logits, targets = small(mesh, (placement,))
        targets[1, 0] = 10
        if distributed:
            targets = distribute_tensor(targets, mesh, (Replicate() if placement == Shard(2) else placement,))
        for validate in (True, False):
            call = partial(fused_mixce_loss, logits, targets, backend=backend, validate=validate)
            errors = set(everyone(mesh.get_group(), raised(call)))
            assert errors == {"IndexError: expected targets in [0, 10) or ignore_index=-100, got 10 in row 4"}, errors


# A vocabulary that neither 2 nor 4 ranks share evenly, and batches with different numbers of tokens that count.
VOCAB, WIDTH = 13, 6


class Model(nn.Module):
    """Embedding, a layer and a head; with targets, their loss from within."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, loss_of: Callable[[Tensor, nn.Linear], Tensor] | None = None) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        return self.lm_head(hidden) if loss_of is None else loss_of(hidden, self.lm_head)


def new_model(**keywords: Any) -> Model:
    torch.manual_seed(4)
    return Model(**keywords).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Of three steps: tokens [4, 5] and targets, which the first rows ignore more often."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(3):
        tokens = torch.randint(VOCAB, (4, 5), generator=generator)
        targets = torch.randint(VOCAB, (4, 5), generator=generator)
        targets[0, :4] = -100
        found.append((tokens, targets))
    return found


def trained(model: Model, loss_of: Callable[[Model, Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """The whole parameters after three steps, in which a gradient's scale counts; and the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for tokens, targets in batches():
        optimizer.zero_grad()
        loss = loss_of(model, tokens, targets)
        loss.backward()
        optimizer.step()
    found = {name: full(parameter.detach()) for name, parameter in model.named_parameters()}
    return {**found, "loss": full(loss.detach())}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_trained_alike(got: dict[str, Tensor], *, tied: bool = False, is_mean: bool = True) -> None:
    """As by one process, in float64: three steps of sums in another order."""
    expected = trained(
        new_model(tied=tied), lambda model, tokens, targets: fused_mixce_loss(model(tokens), targets, 0.3)
    )
    assert got.keys() == expected.keys()
    for name, value in got.items():
        if name != "loss" or is_mean:
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


def parallel_head(mesh: DeviceMesh, backend: str) -> None:
    """`ColwiseParallel`: logits as DTensors and as local tensors, and the linear loss of its weight."""
    whole_chunk = -(-VOCAB // mesh.size())

    def of_dtensors(model: Model, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(tokens)
        assert isinstance(logits, DTensor)
        return fused_mixce_loss(logits, targets, 0.3, backend=backend)

    def of_local(model: Model, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(tokens)
        assert not isinstance(logits, DTensor)
        return vocab_parallel_mixce_loss(
            logits, targets, 0.3, group=mesh.get_group(), vocab_start=mesh.get_local_rank() * whole_chunk,
            vocab_size=VOCAB, backend=backend,
        )  # fmt: skip

    def of_hidden(model: Model, tokens: Tensor, targets: Tensor) -> Tensor:
        def loss_of(hidden: Tensor, head: nn.Linear) -> Tensor:
            hidden = DTensor.from_local(hidden, mesh, (Replicate(),), run_check=False)
            return fused_linear_mixce_loss(hidden, head.weight, targets, 0.3, bias=head.bias, backend=backend)

        return model(tokens, loss_of)

    for tied in (False, True):
        for loss_of in (of_dtensors, of_local, of_hidden):
            model = new_model(tied=tied)
            head = parallel.ColwiseParallel(use_local_output=loss_of is of_local)
            plan = {"lm_head": head}
            if tied:
                plan["embedding"] = parallel.RowwiseParallel(input_layouts=Replicate())
            parallel.parallelize_module(model, mesh, plan)
            if tied:
                model.lm_head.weight = model.embedding.weight
            assert_trained_alike(trained(model, loss_of), tied=tied)


def sharded_by_fsdp(mesh: DeviceMesh, backend: str) -> None:
    """Each rank has its part of the batch; the loss outside of the model's forward, and inside of it."""
    rank, size = mesh.get_local_rank(), mesh.size()

    def losses(model: Model, tokens: Tensor, targets: Tensor, *, inside: bool) -> Tensor:
        # FSDP divides by the number of ranks, and so the loss must not.
        keywords = {"num_items_in_batch": (targets != -100).sum() / size, "backend": backend}
        own_tokens, own_targets = (one.chunk(size)[rank] for one in (tokens, targets))
        if not inside:
            return fused_mixce_loss(model(own_tokens), own_targets, 0.3, inplace_backward=True, **keywords)
        return model(
            own_tokens,
            lambda hidden, head: fused_linear_mixce_loss(
                hidden, head.weight, own_targets, 0.3, bias=head.bias, **keywords
            ),
        )

    for inside in (False, True):
        model = new_model()
        fully_shard(model.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model.lm_head.weight, DTensor)
        assert_trained_alike(trained(model, partial(losses, inside=inside)), is_mean=False)
    # Outside of its forward a module's parameters are DTensors.
    error = raised(partial(fused_linear_mixce_loss, torch.zeros(3, WIDTH), model.lm_head.weight, torch.zeros(3).long()))
    assert error.startswith("TypeError: expected hidden, weight, bias to be all DTensors or all plain"), error


def fsdp_of_a_parallel_head(mesh: DeviceMesh, backend: str) -> None:
    """Data parallel over one dimension of the mesh, the vocabulary over the other."""
    copies, shards = mesh["dp"], mesh["tp"]
    rank, size = copies.get_local_rank(), copies.size()

    def losses(model: Model, tokens: Tensor, targets: Tensor, *, inside: bool) -> Tensor:
        keywords = {"num_items_in_batch": (targets != -100).sum() / size, "backend": backend}
        own_tokens, own_targets = (one.chunk(size)[rank] for one in (tokens, targets))

        def loss_of(hidden: Tensor, head: nn.Linear) -> Tensor:
            hidden = DTensor.from_local(hidden, shards, (Replicate(),), run_check=False)
            return fused_linear_mixce_loss(hidden, head.weight, own_targets, 0.3, bias=head.bias, **keywords)

        if inside:
            return model(own_tokens, loss_of)
        logits = model(own_tokens)
        assert logits.placements == (Shard(2),)
        return fused_mixce_loss(logits, own_targets, 0.3, inplace_backward=True, **keywords)

    for inside in (False, True):
        model = new_model()
        parallel.parallelize_module(model, shards, {"lm_head": parallel.ColwiseParallel(use_local_output=False)})
        fully_shard(model.layer, mesh=copies)
        fully_shard(model, mesh=copies)
        assert_trained_alike(trained(model, partial(losses, inside=inside)), is_mean=False)


# Each on a mesh.
CHECKS: dict[Callable[..., None], str] = {
    overwritten_logits_are_known_to_autograd: "2",
    overwritten_logits_are_freed: "2",
    second_derivative: "2x2",
    compiled_equals_eager: "2",
    bad_targets: "3",
    parallel_head: "4",
    sharded_by_fsdp: "2",
    fsdp_of_a_parallel_head: "2x2",
}
WITHOUT_BACKENDS: dict[Callable[..., None], str] = {
    collectives: "2",
    strided_shards_are_refused: "2",
    shards_of_other_sizes_are_refused: "2",
    what_is_refused: "4",
}
# The reference overwrites nothing, and its compilation is PyTorch's.
OF_KERNELS = (overwritten_logits_are_known_to_autograd, overwritten_logits_are_freed, compiled_equals_eager)
# Those in which an emulated kernel, which is slow, may do what others do not.
OF_EMULATIONS = (overwritten_logits_are_known_to_autograd, fsdp_of_a_parallel_head)
RUNS = [
    f"{check.__name__}-{name}"
    for check in (OF_EMULATIONS if EMULATED else CHECKS)
    for name in NAMES
    if name != "reference" or check not in OF_KERNELS
]
RUNS += [check.__name__ for check in WITHOUT_BACKENDS if not EMULATED]


def try_all() -> dict[str, str]:
    """What went wrong on this rank, by name; empty where it went well."""
    meshes = Meshes()
    calls: dict[str, tuple[str, Callable[[], None]]] = {}
    for function, table in ((as_in_one_process, TABLE), (linear_as_in_one_process, LINEAR_TABLE)):
        calls |= {name: (turn.mesh, partial(function, meshes[turn.mesh], turn)) for name, turn in table.items()}
    for check_, mesh in CHECKS.items():
        for backend in NAMES:
            calls[f"{check_.__name__}-{backend}"] = mesh, partial(check_, meshes[mesh], backend)
    for check_, mesh in WITHOUT_BACKENDS.items():
        calls[check_.__name__] = mesh, partial(check_, meshes if check_ is what_is_refused else meshes[mesh])
    tried = {*TABLE, *LINEAR_TABLE, *RUNS}
    return what_goes_wrong(
        {name: call for name, (mesh, call) in calls.items() if name in tried and dist.get_rank() < meshes[mesh].size()}
    )


@pytest.fixture(scope="module")
def wrong() -> list[dict[str, str]]:
    """What went wrong on each rank."""
    return run_ranks(try_all, WORLD, timeout=240.0)


@pytest.mark.parametrize("name", [*TABLE, *LINEAR_TABLE, *RUNS])
def test_on_ranks(name: str, wrong: list[dict[str, str]]) -> None:
    """A case as in one process, or what one of the functions above finds."""
    assert any(name in of_rank for of_rank in wrong)
    text = "".join(of_rank.get(name, "") for of_rank in wrong)
    assert not text, text
