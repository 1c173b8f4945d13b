"""docs/data_parallel.md: its code, run by two and three ranks, has the gradients of one process with all tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixce_kernels import fused_linear_mixce_loss, fused_mixce_loss, mixce_loss_reference
from support.paths import ROOT
from support.ranks import run_ranks

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "register_fsdp_forward_method"):
    pytest.skip("needs FSDP2", allow_module_level=True)

DOCUMENT = ROOT / "docs" / "data_parallel.md"
VOCAB_SIZE = 19
WIDTH = 8
ETA = 0.3
# The gradients of one process, in float64, by the plain formula: sums of some hundred terms in another order.
TOLERANCE = 1e-13


def document() -> dict[str, Any]:
    """What the document's code defines."""
    namespace: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(code, DOCUMENT.name, "exec"), namespace)
    return namespace


class Model(nn.Module):
    """Logits [B, T, V] of tokens [B, T], each position by itself."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Embedding(VOCAB_SIZE, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.lm_head = nn.Linear(WIDTH, VOCAB_SIZE, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.backbone(tokens))


def new_model(bias: bool = False) -> Model:
    torch.manual_seed(1)
    return Model(bias).double()


class Batch:
    """Sequences [B, T + 1], inputs, targets and weights [B, T]: of all ranks and, row by row, of each."""

    def __init__(self, ranks: int, ignored: str = "some") -> None:
        torch.manual_seed(2)
        # 2, 4 and 6 rows, in two micro-batches.
        self.rows = [range(rank * (rank + 1), (rank + 1) * (rank + 2)) for rank in range(ranks)]
        self.sequences = torch.randint(VOCAB_SIZE, (self.rows[-1].stop, 8))
        self.inputs = self.sequences[:, :-1]
        self.targets = self.sequences[:, 1:].clone()
        if ignored != "none":
            self.targets[0, 1:] = self.targets[1, ::2] = self.targets[-1, :2] = -100
        if ignored == "a rank":
            self.targets[self.rows[1]] = -100
        elif ignored == "all":
            self.targets[:] = -100
        self.weights = torch.rand(self.targets.shape, dtype=torch.float64)

    def of(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.inputs[self.rows[rank]], self.targets[self.rows[rank]], self.weights[self.rows[rank]]


def result_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The loss and the whole gradients, by names that all engines share."""
    named = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        named[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return named


def expected_of(batch: Batch, weights: Tensor | None = None, bias: bool = False) -> dict[str, Tensor]:
    """One process, all tokens, the plain formula."""
    model = new_model(bias)
    loss = mixce_loss_reference(model(batch.inputs), batch.targets, ETA, token_weights=weights)
    loss.backward()
    return result_of(loss, model)


def in_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def in_fsdp(model: nn.Module, **options: Any) -> nn.Module:
    fsdp.fully_shard(model.backbone[1], **options)
    return fsdp.fully_shard(model, **options)


def in_fsdp_resharded(model: nn.Module) -> nn.Module:
    return in_fsdp(model, reshard_after_forward=True)


ENGINES: dict[str, Callable[..., nn.Module]] = {"ddp": in_ddp, "fsdp": in_fsdp}


def inplace_loss_of(model: nn.Module, tokens: Tensor, targets: Tensor, eta: float, divisor: Tensor) -> Tensor:
    return fused_mixce_loss(model(tokens), targets, eta, num_items_in_batch=divisor, inplace_backward=True)


def loss_with_grad_of(model: nn.Module, tokens: Tensor, targets: Tensor, eta: float, divisor: Tensor) -> Tensor:
    return fused_mixce_loss(
        model(tokens), targets, eta, num_items_in_batch=divisor, inplace_backward=True, grad_in_forward=True
    )


def naive_loss_of(model: nn.Module, tokens: Tensor, targets: Tensor, eta: float, divisor: Tensor) -> Tensor:
    return fused_mixce_loss(model(tokens), targets, eta)


def results_of_all_cases() -> dict[str, Any]:
    """Every case on this rank, by name."""
    code = document()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    some, a_rank, every = (Batch(ranks, ignored) for ignored in ("some", "a rank", "all"))
    plain = code["loss_of"]
    results: dict[str, Any] = {}

    def run(case: str, model: nn.Module, function: str, *args: Any, loss_of: Any = plain) -> None:
        code["loss_of"] = loss_of
        loss = code[function](model, *args)
        code["loss_of"] = plain
        results[case] = result_of(code["mean_of_all"](loss), model)

    for engine, wrap in ENGINES.items():
        for name, loss_of in {"": plain, "linear ": code["linear_loss_of"]}.items():

            def model(wrap: Any = wrap, linear: bool = name != "") -> nn.Module:
                whole = new_model()
                return wrap(code["WithLoss"](whole.backbone, whole.lm_head) if linear else whole)

            for ignored, batch in {"some": some, "a rank": a_rank, "all": every}.items():
                tokens, targets, _ = batch.of(rank)
                run(f"{engine} {name}{ignored}", model(), "backward", tokens, targets, ETA, loss_of=loss_of)
                run(
                    f"{engine} {name}micro-batches {ignored}", model(), "backward_of_micro_batches",
                    tokens.tensor_split(2), targets.tensor_split(2), ETA, loss_of=loss_of,
                )  # fmt: skip
            part = code["part_of"](some.sequences, rank, ranks)
            run(f"{engine} {name}sequence", model(), "backward", *part, ETA, loss_of=loss_of)
        tokens, targets, weights = some.of(rank)
        run(f"{engine} weights", wrap(new_model()), "weighted_backward", tokens, targets, ETA, weights)
        run(f"{engine} naive", wrap(new_model()), "backward", tokens, targets, ETA, loss_of=naive_loss_of)

    tokens, targets, _ = some.of(rank)
    # The head's bias makes the logits a view, and FSDP2 warns of in-place operations on views.
    for engine, wrap in {"ddp": in_ddp, "fsdp": in_fsdp_resharded}.items():
        for name, loss_of in {"inplace": inplace_loss_of, "grad in forward": loss_with_grad_of}.items():
            run(f"{engine} {name}", wrap(new_model(bias=True)), "backward", tokens, targets, ETA, loss_of=loss_of)
    code["meets"] = lambda model, last: nullcontext()
    for engine, wrap in ENGINES.items():
        parts = tokens.tensor_split(2), targets.tensor_split(2)
        run(f"{engine} each micro-batch", wrap(new_model()), "backward_of_micro_batches", *parts, ETA)

    model = new_model()
    loss = code["backward_by_hand"](model, tokens, targets, ETA)
    results["by hand"] = result_of(code["mean_of_all"](loss) * ranks, model)
    model = in_fsdp(new_model())
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.set_gradient_divide_factor(1.0)
    loss = plain(model, tokens, targets, ETA, code["count_of"](targets))
    loss.backward()
    results["fsdp that adds up"] = result_of(code["mean_of_all"](loss.detach()) * ranks, model)

    # What would come of splitting sequences first: no target at the borders.
    first = some.sequences.tensor_split(ranks, dim=1)[rank]
    run("split first", in_ddp(new_model()), "backward", first[:, :-1], first[:, 1:], ETA)
    results |= statements_of_the_document(code, tokens, targets)
    return results


def statements_of_the_document(code: dict[str, Any], tokens: Tensor, targets: Tensor) -> dict[str, Any]:
    """What is said of heads and of divisors: gradients, or the type of the error, by name."""
    divisor = code["count_of"](targets) / dist.get_world_size()

    def outside(model: nn.Module, whole: nn.Module) -> Tensor:
        hidden = model(tokens)
        return fused_linear_mixce_loss(hidden, whole.lm_head.weight, targets, ETA, num_items_in_batch=divisor)

    class HiddenStates(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.backbone(tokens)

        def loss(self, tokens: Tensor) -> Tensor:
            return outside(self.backbone, self)

    def hidden_states() -> HiddenStates:
        model = HiddenStates().double()
        model.load_state_dict(new_model().state_dict())
        return model

    def sharded_head() -> Tensor:
        whole = new_model()
        fsdp.fully_shard(whole.lm_head)
        return in_fsdp(code["WithLoss"](whole.backbone, whole.lm_head))(tokens, targets, ETA, divisor)

    def fsdp_outside(**options: Any) -> Tensor:
        model = in_fsdp(hidden_states(), **options)
        return outside(model, model)

    def ddp_outside(find_unused_parameters: bool) -> Tensor:
        whole = hidden_states()
        model = nn.parallel.DistributedDataParallel(whole, find_unused_parameters=find_unused_parameters)
        loss = outside(model, whole)
        loss.backward()
        return loss

    found: dict[str, Any] = {}
    for name, attempt in {
        "sharded head": sharded_head,
        "outside": fsdp_outside,
        "outside resharded": lambda: fsdp_outside(reshard_after_forward=True),
        "outside ddp": lambda: ddp_outside(False),
        "outside ddp, unused": lambda: ddp_outside(True),
    }.items():
        try:
            attempt()
            found[name] = None
        except Exception as error:
            found[name] = type(error)

    model = in_fsdp(hidden_states())
    fsdp.register_fsdp_forward_method(model, "loss")
    loss = model.loss(tokens)
    loss.backward()
    found["method"] = result_of(code["mean_of_all"](loss.detach()), model)

    class Echo(nn.Linear):
        def forward(self, divisor: Tensor) -> Tensor:
            return divisor

    for casts in (True, False):
        policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=casts)
        echo = fsdp.fully_shard(Echo(2, 2), mp_policy=policy)
        found[f"divisor, cast {casts}"] = echo(torch.tensor(257.0, dtype=torch.float64)).item()
    return found


def expected_of_all_cases(ranks: int) -> dict[str, dict[str, Tensor]]:
    """What one process has, by the names of the cases."""
    expected = {"by hand": expected_of(Batch(ranks)), "fsdp that adds up": expected_of(Batch(ranks))}
    expected["method"] = expected["by hand"]
    for engine in ENGINES:
        for loss in ("", "linear "):
            for ignored in ("some", "a rank", "all"):
                case = expected_of(Batch(ranks, ignored))
                expected[f"{engine} {loss}{ignored}"] = expected[f"{engine} {loss}micro-batches {ignored}"] = case
            expected[f"{engine} {loss}sequence"] = expected_of(Batch(ranks, "none"))
        expected[f"{engine} each micro-batch"] = expected_of(Batch(ranks))
        expected[f"{engine} weights"] = expected_of(Batch(ranks), Batch(ranks).weights)
        for option in ("inplace", "grad in forward"):
            expected[f"{engine} {option}"] = expected_of(Batch(ranks), bias=True)
    return expected


def errors_of(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of the loss and of each gradient, in its largest value."""
    assert got.keys() == expected.keys()
    largest = {name: value.abs().max().item() for name, value in expected.items()}
    return {name: (got[name] - expected[name]).abs().max().item() / (largest[name] or 1.0) for name in expected}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_code_of_the_document(ranks: int, one_thread: None) -> None:
    """All cases in one test, because the ranks start once for it."""
    expected = expected_of_all_cases(ranks)
    for results in run_ranks(results_of_all_cases, ranks, timeout=180):
        for case, value in expected.items():
            got = results.pop(case)
            errors = errors_of(got, value)
            assert all(error <= TOLERANCE for error in errors.values()), f"{case}: {errors}"
        # What the document warns of: means of ranks, and sequences that are split before their targets are shifted.
        for case, ignored in {"ddp naive": "some", "fsdp naive": "some", "split first": "none"}.items():
            errors = errors_of(results.pop(case), expected_of(Batch(ranks, ignored)))
            assert all(error > 1e8 * TOLERANCE for error in errors.values()), f"{case}: {errors}"
        assert results == {
            "sharded head": TypeError,
            "outside": None,
            "outside resharded": TypeError,
            "outside ddp": None,
            "outside ddp, unused": RuntimeError,
            "divisor, cast True": 256,
            "divisor, cast False": 257,
        }
