"""docs/guide.md."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from mixce_kernels import MixCEStats, fused_mixce_loss, mixce_loss_reference
from support.docs.blocks import Namespace, Page, Step
from support.docs.checks import assert_far, assert_near, check_in_place, gradients, has_kernels
from support.docs.models import VOCAB_SIZE, mean_of_all, mean_of_means, new_model, new_targets, new_tokens, shifted_loss
from support.docs.trainers import TRAINER, causal_lm, plain_training_options, sequences, stacked


def set_up() -> Namespace:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = new_model(torch.float32)
    tokens = new_tokens()
    micro_batches = [(batch[:, :-1], new_targets(batch[:, 1:])) for batch in (tokens[:2, :4], tokens[2:])]
    return {
        "model": model,
        "tokens": tokens,
        "micro_batches": micro_batches,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5),
    }


def check_weighted_gradient(names: Namespace) -> None:
    logits, targets = names["logits"].detach(), names["targets"]
    assert_near(names["loss"], mixce_loss_reference(logits.double(), targets, 0.25, reduction="sum"))
    q = logits.double().softmax(-1).gather(1, targets[:, None])[:, 0]
    assert_near(names["stats"].q, q)
    assert q.min() < 0.1, "improbable tokens are tried"
    assert q.max() > 0.5, "and probable ones"
    # "An untrained model": q of about 1 / V, and next to no gradient at eta = 0.
    flat = torch.zeros(3, 50257, requires_grad=True)
    loss, stats = fused_mixce_loss(flat, torch.tensor([0, 7, 9]), eta=0.0, reduction="sum", return_stats=True)
    loss.backward()
    assert_near(stats.weight, torch.full((3,), 1 / 50257, dtype=torch.float64))
    assert flat.grad.abs().max() < 1e-4


def check_eta_of_tokens(names: Namespace) -> None:
    logits, targets = names["logits"].detach().double(), names["targets"]
    half = targets.numel() // 2
    first = F.cross_entropy(logits[:half], targets[:half], reduction="sum")
    second = mixce_loss_reference(logits[half:], targets[half:], 0.5, reduction="sum")
    assert_near(names["loss"], (first + second) / targets.numel())


def graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check_schedule(names: Namespace) -> None:
    """One graph for all values of a tensor, of which each counted; two for a number that changes and is not static."""
    model, tokens = copy.deepcopy(names["model"]).double(), names["tokens"]
    etas = [1.0 - 0.5 * step / 5 for step in range(5)]
    with torch.no_grad():
        expected = [shifted_loss(tokens, eta)(model).item() for eta in etas]
    assert names["losses"] == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 3) for loss in expected}) == 5
    assert graphs_compiled() == 1

    if not has_kernels():
        return
    logits = names["logits"].detach()
    for dynamic, n_graphs in ((None, 2), (False, 4)):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(fused_mixce_loss, dynamic=dynamic, backend=counter)
        for eta in (0.75, 0.5, 0.75, 0.25, 0.3):
            compiled(logits, names["targets"], eta)
        assert counter.frame_count == n_graphs
    torch._dynamo.reset()


def check_module(names: Namespace) -> None:
    assert_near(names["loss"], mixce_loss_reference(names["logits"].detach().double(), names["targets"], 0.5))


def check_callback(names: Namespace) -> None:
    class Record:
        eta = torch.tensor(-1.0)

    class State:
        max_steps = 5

    etas = []
    schedule = names["EtaSchedule"](Record)
    for State.global_step in range(5):
        schedule.on_step_begin(None, State, None)
        etas.append(Record.eta.item())
    assert etas == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5])


@contextmanager
def with_ignored_targets(names: Namespace) -> Iterator[None]:
    names["targets"] = new_targets(names["tokens"][:, 1:]).flatten()
    yield


def check_nll(names: Namespace) -> None:
    logits, targets = names["logits"].detach().double(), names["targets"]
    assert (targets == -100).any()
    assert_near(names["nll"], F.cross_entropy(logits, targets))
    # "The loss depends on eta", and nll does not.
    losses = [fused_mixce_loss(logits, targets, eta, return_stats=True) for eta in (0.2, 0.9)]
    assert losses[0][0] < losses[1][0] < F.cross_entropy(logits, targets)
    assert torch.equal(losses[0][1].nll, losses[1][1].nll)


def check_token_metrics(names: Namespace) -> None:
    logits, targets = names["logits"].detach().double(), names["targets"]
    valid = targets != -100
    nll = F.cross_entropy(logits, targets)
    q = logits[valid].softmax(-1).gather(1, targets[valid][:, None])
    log_p = logits[valid].log_softmax(-1)
    expected = {
        "nll": nll,
        "perplexity": nll.exp(),
        "q": q.mean(),
        "weight": (0.5 + 0.5 * q).mean(),
        "entropy": -(log_p.exp() * log_p).sum(-1).mean(),
        "accuracy": (logits.argmax(-1)[valid] == targets[valid]).double().mean(),
        "tokens": valid.sum(),
    }
    assert names["means"] == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)
    assert names["metrics"].compute() == {}
    # The statistics of the page's table are fields, and so are the rows of the metrics.
    assert {"nll", "q", "weight", "entropy", "correct"} <= set(MixCEStats._fields)


@contextmanager
def with_trainer(names: Namespace) -> Iterator[None]:
    import transformers

    options = plain_training_options(
        max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2, per_device_train_batch_size=2
    )
    names.update(causal_lm=causal_lm(), training_arguments=transformers.TrainingArguments(**options))
    names.update(train_dataset=sequences(8), eval_dataset=sequences(3))
    yield


def check_trainer(names: Namespace) -> None:
    history = names["trainer"].state.log_history
    trained = [entry for entry in history if "perplexity" in entry]
    evaluated = [entry for entry in history if "eval_perplexity" in entry]
    assert [entry["step"] for entry in trained] == [entry["step"] for entry in evaluated] == [2, 4]
    metrics = {"nll", "perplexity", "q", "weight", "entropy", "accuracy", "tokens"}
    assert all(metrics <= entry.keys() for entry in trained)
    assert all({"eval_" + name for name in metrics} <= entry.keys() for entry in evaluated)
    # The last evaluation is of the model as it is now.
    model = copy.deepcopy(names["causal_lm"]).double().eval()
    tokens, labels = stacked(names["eval_dataset"])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert evaluated[-1]["eval_nll"] == pytest.approx(nll.item(), rel=1e-4)
    assert evaluated[-1]["eval_tokens"] == (labels[:, 1:] != -100).sum()
    # The schedule has ended at its last value, and the loss was that of the schedule: w is known from q and eta.
    assert names["loss_func"].eta == 0.5
    weight = 0.5 + 0.5 * evaluated[-1]["eval_q"]
    assert evaluated[-1]["eval_weight"] == pytest.approx(weight, rel=1e-5)
    assert evaluated[0]["eval_weight"] > 2 / 3


def check_autocast(names: Namespace) -> None:
    logits, targets = names["logits"], names["tokens"][:, 1:]
    assert logits.dtype == torch.bfloat16
    assert names["loss"].dtype == torch.float32
    # Rounded once: bfloat16 of the gradient of the same logits in float32.
    given = logits.detach().requires_grad_()
    twin = logits.detach().float().requires_grad_()
    fused_mixce_loss(given, targets, 0.5).backward()
    fused_mixce_loss(twin, targets, 0.5).backward()
    assert given.grad.dtype == torch.bfloat16
    assert torch.equal(given.grad, twin.grad.to(torch.bfloat16))
    assert_near(names["loss"], mixce_loss_reference(twin.detach().double(), targets, 0.5))
    assert all(grad.dtype == torch.float32 for grad in gradients(names["model"]).values())


@contextmanager
def with_kept_weights(names: Namespace) -> Iterator[None]:
    names["kept"] = copy.deepcopy(names["model"].state_dict())
    yield


def check_micro_batches(names: Namespace) -> None:
    """The step is that of one mean over all tokens, and another than that of a mean of means."""
    before = new_model(torch.float64)
    before.load_state_dict(names["kept"])
    weight = before.lm_head.weight
    tokens, targets = ([batch[i] for batch in names["micro_batches"]] for i in (0, 1))
    exact, means = (
        -0.5 * torch.autograd.grad(mean(tokens, targets, 0.5)(before), weight)[0]
        for mean in (mean_of_all, mean_of_means)
    )
    assert_near(names["model"].lm_head.weight, weight + exact)
    assert_far(exact, means)


def check_nothing_valid(names: Namespace) -> None:
    assert names["loss"].item() == 0.0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(names["model"]).values())
    assert gradients(names["model"]).keys() == dict(names["model"].named_parameters()).keys()
    logits = names["logits"].detach().flatten(0, 1)
    assert F.cross_entropy(logits, names["nothing"].flatten()).isnan(), "PyTorch's is NaN"
    with pytest.raises(IndexError):
        fused_mixce_loss(logits[:1], torch.tensor([VOCAB_SIZE]))
    # z-loss without eta or q.
    z_loss = fused_mixce_loss(logits, names["tokens"][:, 1:].flatten(), eta=0.0, z_loss=0.5)
    plain = fused_mixce_loss(logits, names["tokens"][:, 1:].flatten(), eta=0.0)
    assert_near(z_loss - plain, 0.5 * logits.double().logsumexp(-1).square().mean())


PAGE = Page(
    "guide.md",
    set_up,
    (
        Step(check_weighted_gradient),
        Step(check_eta_of_tokens),
        Step(check_schedule),
        Step(check_module),
        Step(check_callback, needs=("transformers",)),
        Step(check_nll, with_ignored_targets),
        Step(check_token_metrics),
        Step(check_trainer, with_trainer, needs=TRAINER),
        Step(check_autocast),
        Step(check_micro_batches, with_kept_weights),
        Step(check_in_place),
        Step(check_nothing_valid),
    ),
)
