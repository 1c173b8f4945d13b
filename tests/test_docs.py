"""The documents: every block of Python runs and does what its page says; the tables' arguments exist; the site builds.

The blocks of a page run in order in one namespace, to which a set-up gives the names that the page takes for granted.
After each block a check looks at what it left. `python tests/test_docs.py PAGE` runs the blocks of a page that need
Triton's interpreter.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import mixce_kernels
from mixce_kernels import (
    MixCEStats,
    backends,
    fused_linear_mixce_loss,
    fused_mixce_loss,
    mixce_loss_reference,
    vocab_parallel_mixce_loss,
)

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 29
WIDTH = 8
# Of the largest value, against the plain formula in float64.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

Namespace = dict[str, Any]

if __name__ != "__main__":
    from conftest import EMULATED

    pytestmark = pytest.mark.skipif(EMULATED is not None, reason="documents are tried natively")


class Model(nn.Module):
    """Logits [B, T, V] of tokens [B, T], each position by itself; some targets are probable, some are not."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Embedding(VOCAB_SIZE, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.lm_head = nn.Linear(WIDTH, VOCAB_SIZE, bias=bias)
        # By a generator of its own: the same with and without a bias.
        nn.init.normal_(self.lm_head.weight, std=3.0, generator=torch.Generator().manual_seed(4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.backbone(tokens))


def new_model(dtype: torch.dtype, bias: bool = True) -> Model:
    torch.manual_seed(1)
    return Model(bias).to(dtype)


def new_tokens(rows: int = 4, length: int = 9, low: int = 0) -> Tensor:
    """[rows, length], the same every time: every other token is the one that `new_model` finds most probable."""
    tokens = torch.randint(low, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(2))
    model = new_model(torch.float64, bias=False)
    for position in range(1, length, 2):
        tokens[:, position] = model(tokens[:, position - 1])[:, low:].argmax(-1) + low
    return tokens


def new_targets(tokens: Tensor) -> Tensor:
    """The tokens, some of which are ignored: more in one row than in another."""
    targets = tokens.clone()
    targets[0, 1:] = targets[1, ::3] = -100
    return targets


# Comparisons


def tolerance_of(*tensors: Tensor) -> float:
    return max(TOLERANCE.get(tensor.dtype, TOLERANCE[torch.float32]) for tensor in tensors)


def assert_near(got: Tensor, expected: Tensor, what: str = "", tolerance: float = 0.0) -> None:
    """Within the tolerance of the types that they were computed in, or a larger one."""
    tolerance = max(tolerance, tolerance_of(got, expected))
    assert got.shape == expected.shape, what
    largest = expected.detach().abs().max().item() or 1.0
    error = (got.detach().double() - expected.detach().double()).abs().max().item()
    assert error <= tolerance * largest, f"{what}: {error} of {largest}"


def assert_far(got: Tensor, other: Tensor) -> None:
    """What a check has to tell apart, so that it can fail."""
    assert (got.detach().double() - other.detach().double()).abs().max() > 1e-3 * other.detach().abs().max()


def has_kernels() -> bool:
    """Whether the package was built with its extension; without, the plain formula serves."""
    return backends.resolve(None, torch.empty(1, 1)) != "reference"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those that there are, by name."""
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_trained(model: nn.Module, loss: Tensor | None, loss_of: Callable[[Any], Tensor]) -> None:
    """The loss and the gradients of `model` are those of `loss_of`, a plain formula, in float64."""
    twin = copy.deepcopy(model).double()
    twin.zero_grad(set_to_none=True)
    expected = loss_of(twin)
    expected.backward()
    if loss is not None:
        assert_near(loss, expected, "loss")
    got, wanted = gradients(model), gradients(twin)
    assert got
    assert got.keys() == wanted.keys()
    assert all(grad.abs().max() > 0 for grad in wanted.values())
    for name, grad in got.items():
        assert_near(grad, wanted[name], name)


# Pages


class Block(NamedTuple):
    """A block of Python: the line of its first line in the page, from 0, and its text."""

    line: int
    code: str


def blocks_of(page: str) -> list[Block]:
    """The blocks of Python of a page, in order."""
    text = path_of(page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def path_of(page: str) -> Path:
    return ROOT / page if page == "README.md" else ROOT / "docs" / page


def no_preparation(names: Namespace) -> AbstractContextManager[None]:
    return nullcontext()


class Step(NamedTuple):
    """What belongs to a block.

    Attributes:
        check: looks at the names after the block, and raises where the page is wrong.
        prepare: the context of the block and its check; may set names.
        needs: packages without which the block is skipped.
        interpreted: it runs in a process of its own, with Triton's interpreter.
        skipped: why the block is not executed at all.
    """

    check: Callable[[Namespace], None]
    prepare: Callable[[Namespace], AbstractContextManager[None]] = no_preparation
    needs: tuple[str, ...] = ()
    interpreted: bool = False
    skipped: str = ""

    def missing(self) -> list[str]:
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


class Page(NamedTuple):
    """The set-up of a page, and a step for each of its blocks."""

    set_up: Callable[[], Namespace]
    steps: list[Step]


# Pages whose blocks another test executes, and which: a page is here or among PAGES.
ELSEWHERE = {"data_parallel.md": "test_data_parallel.py"}


def run_block(page: str, index: int, names: Namespace) -> None:
    """Executes a block and its check."""
    block, step = blocks_of(page)[index], PAGES[page].steps[index]
    torch.manual_seed(index)
    for value in list(names.values()):
        if isinstance(value, nn.Module):
            value.zero_grad(set_to_none=True)
    with step.prepare(names):
        # Lines are those of the page, in tracebacks and warnings.
        exec(compile("\n" * block.line + block.code, str(path_of(page)), "exec", dont_inherit=True), names)
        step.check(names)


class Run:
    """A page's namespace, how far it has come, and which blocks failed."""

    def __init__(self, page: str) -> None:
        self.page, self.done = page, 0
        self.failed: dict[int, BaseException] = {}
        self.names: Namespace = {"__name__": page, **PAGES[page].set_up()}

    def until(self, index: int) -> None:
        """Runs the blocks up to this one that are yet to run and can; raises what this or an earlier one raised."""
        while self.done <= index and not self.failed:
            step, current = PAGES[self.page].steps[self.done], self.done
            self.done += 1
            if not step.interpreted and not step.skipped and not step.missing():
                try:
                    run_block(self.page, current, self.names)
                except BaseException as error:
                    self.failed[current] = error
                    raise
        for current, error in self.failed.items():
            if current == index:
                raise error
            if current < index:
                raise RuntimeError(f"block {current} of {self.page} failed") from error


run_of = functools.cache(Run)


@functools.cache
def interpreted_blocks_of(page: str) -> tuple[list[int], str]:
    """The interpreted blocks of a page that passed, and what became of the first that did not."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, page]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    last = ran.stdout.strip().splitlines()[-1:]
    return (json.loads(last[0]) if last else []), ran.stderr


def run_interpreted_blocks(page: str) -> None:
    """In this process; prints the numbers of those that passed as its last line."""
    names: Namespace = {"__name__": page, **PAGES[page].set_up()}
    passed: list[int] = []
    try:
        for index, step in enumerate(PAGES[page].steps):
            if step.interpreted and not step.missing():
                run_block(page, index, names)
                passed.append(index)
    except Exception:
        traceback.print_exc()
    print("\n" + json.dumps(passed))


# README.md and index.md


def readme() -> Namespace:
    tokens = new_tokens()
    batches = [tokens[:1, :3], tokens[1:, 3:]]
    return {
        "torch": torch,
        "model": new_model(torch.float64, bias=False),
        "tokens": tokens,
        "batch_tokens": [batch[:, :-1] for batch in batches],
        "batch_targets": [batch[:, 1:] for batch in batches],
        "eta": 0.3,
    }


@contextmanager
def with_logits(names: Namespace) -> Iterator[None]:
    targets = new_targets(new_tokens())
    logits = 3 * torch.randn(*targets.shape, VOCAB_SIZE, dtype=torch.float64)
    names.update(logits=logits.requires_grad_(), targets=targets)
    yield


def check_call(names: Namespace) -> None:
    twin = names["logits"].detach().clone().requires_grad_()
    expected = mixce_loss_reference(twin, names["targets"], 0.5)
    expected.backward()
    assert_near(names["loss"], expected)
    assert_near(names["logits"].grad, twin.grad)


def shifted_loss(tokens: Tensor, eta: float = 0.5) -> Callable[[nn.Module], Tensor]:
    """The plain loss of a model's next tokens."""
    return lambda model: mixce_loss_reference(model(tokens)[:, :-1], tokens[:, 1:], eta)


def check_training_step(names: Namespace) -> None:
    assert_trained(names["model"], names["loss"], shifted_loss(names["tokens"]))


def check_in_place(names: Namespace) -> None:
    """The gradient lies where the logits lay, and whoever needs these raises."""
    check_training_step(names)
    if not has_kernels():
        return
    model, tokens = names["model"], names["tokens"]
    twin = copy.deepcopy(model).double()(tokens)[:, :-1]
    (grad,) = torch.autograd.grad(mixce_loss_reference(twin, tokens[:, 1:], 0.5), twin)
    assert_near(names["logits"], grad)
    logits = model(tokens)[:, :-1]
    other = logits.square().sum()
    fused_mixce_loss(logits, tokens[:, 1:], inplace_backward=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def mean_of_all(tokens: list[Tensor], targets: list[Tensor], eta: float) -> Callable[[nn.Module], Tensor]:
    """One mean over the tokens of all micro-batches."""

    def loss_of(model: nn.Module) -> Tensor:
        logits = torch.cat([model(some).flatten(0, 1) for some in tokens])
        return mixce_loss_reference(logits, torch.cat([some.flatten() for some in targets]), eta)

    return loss_of


def check_accumulation(names: Namespace) -> None:
    batches = names["batch_tokens"], names["batch_targets"]
    assert_trained(names["model"], None, mean_of_all(*batches, names["eta"]))
    twin = copy.deepcopy(names["model"])
    twin.zero_grad()
    for tokens, targets in zip(*batches, strict=True):
        (mixce_loss_reference(twin(tokens), targets, names["eta"]) / len(batches[0])).backward()
    assert_far(gradients(names["model"])["lm_head.weight"], gradients(twin)["lm_head.weight"])


@contextmanager
def with_valid_logits(names: Namespace) -> Iterator[None]:
    with with_logits(names):
        names["targets"] = new_tokens()
        yield


def check_metrics(names: Namespace) -> None:
    logits, targets = names["logits"].detach(), names["targets"]
    assert_near(names["loss"], mixce_loss_reference(logits, targets, 1.0))
    log_p = logits.log_softmax(-1)
    assert_near(names["perplexity"], F.cross_entropy(logits.flatten(0, 1), targets.flatten()).exp())
    assert_near(names["accuracy"], (logits.argmax(-1) == targets).double().mean())
    assert_near(names["entropy"], -(log_p.exp() * log_p).sum(-1).mean())
    # "A schedule never recompiles": see the guide. Here, that the tensor is read at each call.
    names["eta"].fill_(0.25)
    assert_near(fused_mixce_loss(logits, targets, names["eta"]), mixce_loss_reference(logits, targets, 0.25))


@contextmanager
def with_causal_lm(names: Namespace) -> Iterator[None]:
    import transformers

    input_ids, labels = (torch.stack([row[name] for row in sequences(3)]) for name in ("input_ids", "labels"))
    names.update(Trainer=transformers.Trainer, dataset=sequences(3), input_ids=input_ids, labels=labels)
    names["arguments"] = transformers.TrainingArguments(**plain_training_options(max_steps=1))
    names["model"] = names["given"] = causal_lm()
    yield


def check_trainers(names: Namespace) -> None:
    """The loss in three places: with logits by the model and by its trainer, and without."""
    loss_of = plain_causal_loss(names["input_ids"], names["labels"], 0.5)
    batch = {"input_ids": names["input_ids"], "labels": names["labels"]}
    names["loss"].backward()
    assert names["model"] is not names["given"]
    assert names["model"](**batch).logits is None
    assert_trained(names["given"], names["loss"], loss_of)
    assert_near(names["given"](**batch).loss, names["loss"])
    assert_near(names["trainer"].compute_loss(names["given"], dict(batch)), names["loss"])


@contextmanager
def group_of_one() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@contextmanager
def with_group(names: Namespace) -> Iterator[None]:
    with with_logits(names), group_of_one() as group:
        names.update(logits_shard=names["logits"], group=group, first_column=0)
        yield


def check_shard_call(names: Namespace) -> None:
    names["loss"].backward()
    check_call(names)


def index() -> Namespace:
    return {}


def check_index_call(names: Namespace) -> None:
    with_float32 = names["logits"].detach().double().requires_grad_()
    expected = mixce_loss_reference(with_float32, names["targets"], 0.5)
    expected.backward()
    assert_near(names["loss"], expected)
    assert_near(names["logits"].grad, with_float32.grad)


def check_index_linear_call(names: Namespace) -> None:
    hidden, weight = (names[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    expected = mixce_loss_reference(hidden @ weight.T, names["targets"], 0.5)
    expected.backward()
    assert_near(names["loss"], expected)
    assert_near(names["hidden"].grad, hidden.grad)
    assert_near(names["weight"].grad, weight.grad)


# vocab_parallel.md


def vocab_parallel() -> Namespace:
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
    logits = shard.detach()[..., :50257].double().requires_grad_()
    expected = mixce_loss_reference(logits, targets, 0.5)
    expected.backward()
    assert_near(names["loss"], expected)
    assert_near(shard.grad[..., :50257], logits.grad)
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


# guide.md


def guide() -> Namespace:
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
    """One graph for all values of a tensor, of which each counted; one for each number."""
    model, tokens = copy.deepcopy(names["model"]).double(), names["tokens"]
    etas = [1.0 - 0.5 * step / 5 for step in range(5)]
    with torch.no_grad():
        expected = [shifted_loss(tokens, eta)(model).item() for eta in etas]
    assert names["losses"] == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 3) for loss in expected}) == 5
    assert graphs_compiled() == 1

    if not has_kernels():
        return
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(fused_mixce_loss, backend=counter)
    logits = names["logits"].detach()
    for eta in (0.75, 0.5, 0.75, 0.25):
        compiled(logits, names["targets"], eta)
    assert counter.frame_count == 3
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


def causal_lm(**changes: Any) -> Any:
    """A small model of Transformers, with the same weights every time."""
    import transformers

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    options = {"vocab_size": VOCAB_SIZE, "architectures": None, **sizes, **heads, **special, **changes}
    kind = "Mixtral" if "num_local_experts" in changes else "Llama"
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model.train()


def sequences(rows: int, length: int = 9) -> list[dict[str, Tensor]]:
    """A data set of token sequences, some of whose labels are ignored."""
    tokens = new_tokens(rows, length, low=3)
    return [{"input_ids": row, "labels": labels} for row, labels in zip(tokens, new_targets(tokens), strict=True)]


def plain_training_options(**more: Any) -> dict[str, Any]:
    """Steps of SGD on a CPU that leave nothing behind."""
    return {
        "output_dir": tempfile.gettempdir(),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        **more,
    }


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
    rows = names["eval_dataset"]
    tokens, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
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
    tokens, targets = ([batch[i] for batch in names["micro_batches"]] for i in (0, 1))
    mean_of_all(tokens, targets, 0.5)(before).backward()
    exact = before.lm_head.weight - 0.5 * before.lm_head.weight.grad
    assert_near(names["model"].lm_head.weight, exact)
    before.zero_grad()
    sum(mixce_loss_reference(before(*batch[:1]), batch[1], 0.5) for batch in names["micro_batches"]).backward()
    means = before.lm_head.weight - 0.5 * before.lm_head.weight.grad / len(tokens)
    assert_far(exact - before.lm_head.weight, means - before.lm_head.weight)


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


# migration.md


def migration() -> Namespace:
    tokens = new_tokens(low=3)
    tokens[1, 2:5] = 0
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    model = new_model(torch.float32 if interpreted else torch.float64)
    return {
        "model": model,
        "tokens": tokens,
        "targets": new_targets(tokens.roll(-1, 1)),
        "class_weight": torch.rand(VOCAB_SIZE, dtype=torch.float64) + 0.5,
        "hidden": lambda: model.backbone(tokens),
        "lm_head": model.lm_head,
        "results": [],
    }


RESULTS = ("z_loss", "accuracy", "z_losses")


def result_of(names: Namespace) -> dict[str, Tensor]:
    """The loss, what came with it, and the model's gradients."""
    losses = names.pop("losses", None)
    loss = names.pop("loss", None) if losses is None else losses.flatten()
    assert isinstance(loss, Tensor)
    # An upstream gradient other than 1, and one for each token.
    loss.backward(torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype) if loss.dim() else loss.new_tensor(0.7))
    more = {name: names.pop(name).flatten() for name in RESULTS if name in names}
    return {"loss": loss.detach(), **more, **gradients(names["model"])}


def keep_before(names: Namespace) -> None:
    names["results"].append(result_of(names))


def compare_with_before(names: Namespace) -> None:
    """The block "after" has the loss and the gradients of the block "before"."""
    before, after = names["results"].pop(), result_of(names)
    assert before.keys() == after.keys()
    # Gradients of float64 parameters went through float32 where the loss is float32.
    tolerance = tolerance_of(before["loss"])
    for name, value in after.items():
        wanted = before[name].reshape(value.shape)
        assert wanted.abs().max() > 0, name
        assert_near(value, wanted, name, tolerance)


def compare_with_plain_tokens(names: Namespace) -> None:
    """What flash-attention's loss is by its source: each token's loss with its z-loss, and the z-loss."""
    after = result_of(names)
    model = copy.deepcopy(names["model"])
    model.zero_grad()
    logits, targets = 0.5 * model(names["tokens"]).flatten(0, 1), names["targets"].flatten()
    z_losses = torch.where(targets == -100, 0.0, 1e-3 * logits.logsumexp(-1).square())
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1) + z_losses
    names["results"].append(result_of({"model": model, "losses": losses, "z_losses": z_losses}))
    before = names["results"].pop()
    for name, value in after.items():
        assert_near(value, before[name], name)


@contextmanager
def with_sft(names: Namespace) -> Iterator[None]:
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{token}": token for token in range(3, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    names["tokenizer"] = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    rows = zip(new_tokens(4, 9, low=3).tolist(), (9, 4, 7, 5), strict=True)
    names["train_dataset"] = Dataset.from_list([{"input_ids": row[:length]} for row, length in rows])
    names["training_options"] = plain_training_options(
        max_steps=2, per_device_train_batch_size=2, learning_rate=1.0, bf16=False, gradient_checkpointing=False
    )
    names["causal_lm"] = causal_lm
    with warnings.catch_warnings():
        # "TRL calls compute_loss_func deprecated": so says the page.
        warnings.simplefilter("ignore", FutureWarning)
        yield


def keep_sft(names: Namespace) -> None:
    trainer = names.pop("trainer")
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    names["results"].append({"loss": losses, **copy.deepcopy(dict(trainer.model.state_dict()))})


def compare_sft(names: Namespace) -> None:
    """Equal losses and, after training, equal weights; others than before and than cross-entropy would have given."""
    keep_sft(names)
    after, before = names["results"].pop(), names["results"].pop()
    assert before["loss"].shape == (2,)
    assert before.keys() == after.keys()
    start = causal_lm().state_dict()
    for name, value in after.items():
        assert_near(value, before[name], name)
    assert_far(after["lm_head.weight"], start["lm_head.weight"])


# integrations.md


def integrations() -> Namespace:
    names: Namespace = {"model": new_model(torch.float32), "tokens": new_tokens(low=3)}
    if importlib.util.find_spec("transformers"):
        names["causal_lm"] = causal_lm()
    return names


def plain_causal_loss(tokens: Tensor, labels: Tensor, eta: float) -> Callable[[Any], Tensor]:
    def loss_of(model: Any) -> Tensor:
        return mixce_loss_reference(model(input_ids=tokens).logits[:, :-1], labels[:, 1:], eta)

    return loss_of


def check_loss_function(names: Namespace) -> None:
    tokens = names["tokens"]
    assert_trained(names["causal_lm"], names["loss"], plain_causal_loss(tokens, tokens, 0.5))


@contextmanager
def with_accumulating_trainer(names: Namespace) -> Iterator[None]:
    names["causal_lm"] = causal_lm()
    names["start"] = copy.deepcopy(names["causal_lm"])
    names["training_options"] = plain_training_options(max_steps=1, per_device_train_batch_size=1)
    names["train_dataset"] = sequences(2)
    yield


def check_accumulating_trainer(names: Namespace) -> None:
    """Two micro-batches of other numbers of tokens: the step of one mean over both."""
    start = names["start"].double()
    tokens, labels = (torch.stack([row[name] for row in names["train_dataset"]]) for name in ("input_ids", "labels"))
    plain_causal_loss(tokens, labels, 0.5)(start).backward()
    step = names["causal_lm"].lm_head.weight - start.lm_head.weight
    expected = -0.05 * start.lm_head.weight.grad
    assert (step - expected).abs().max() <= 1e-3 * expected.abs().max()
    check_routers(tokens, labels)


def check_routers(tokens: Tensor, labels: Tensor) -> None:
    """The table: who keeps the router's loss, and whose outputs hold logits."""
    import transformers

    from mixce_kernels.integrations.transformers import MixCEForCausalLMLoss, with_linear_mixce_loss

    loss = MixCEForCausalLMLoss(eta=0.5)
    experts = causal_lm(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5)
    plain = loss(experts(input_ids=tokens), labels)
    trainer = transformers.Trainer(
        experts, transformers.TrainingArguments(**plain_training_options(max_steps=1)), compute_loss_func=loss
    )
    assert_near(trainer.compute_loss(experts, {"input_ids": tokens, "labels": labels}), plain)
    experts.loss_function = loss
    outputs = experts(input_ids=tokens, labels=labels)
    assert_near(outputs.loss, plain + 0.5 * outputs.aux_loss)
    assert_far(outputs.loss, plain)
    assert outputs.logits is not None
    with pytest.raises(ValueError, match="output_router_logits"):
        with_linear_mixce_loss(experts, eta=0.5)(input_ids=tokens, labels=labels)


def check_linear_lm(names: Namespace) -> None:
    tokens = names["tokens"]
    model, linear = names["causal_lm"], names["linear_lm"]
    assert_trained(model, names["outputs"].loss, plain_causal_loss(tokens, tokens, 0.5))
    assert linear.lm_head.weight is model.lm_head.weight
    assert torch.equal(linear(input_ids=tokens).logits, model(input_ids=tokens).logits)
    linear.mixce_loss.eta = 1.0
    assert_near(linear(input_ids=tokens, labels=tokens).loss, plain_causal_loss(tokens, tokens, 1.0)(model))


# The micro-batches of each step.
MICRO_BATCHES = ((0, 2), (2, 4), (4, 5))


@contextmanager
def with_lightning(names: Namespace) -> Iterator[None]:
    tokens = new_tokens(10, 9)
    targets = new_targets(tokens[:, 1:])
    targets[2:4, 2:] = -100
    counts = [(targets[2 * first : 2 * last] != -100).sum() for first, last in MICRO_BATCHES]
    batches = [
        {"tokens": tokens[2 * i : 2 * i + 2, :-1], "targets": targets[2 * i : 2 * i + 2], "num_items": count}
        for (first, last), count in zip(MICRO_BATCHES, counts, strict=True)
        for i in range(first, last)
    ]
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    names["trainer_options"] = {"accelerator": "cpu", "logger": False, **silent}
    names["batches"] = torch.utils.data.DataLoader(batches, batch_size=None)
    names["model"] = new_model(torch.float64)
    with warnings.catch_warnings():
        # Of how few batches and workers there are.
        warnings.simplefilter("ignore")
        yield


def check_lightning(names: Namespace) -> None:
    """Three steps of one mean over the tokens of all micro-batches each, by the scheduled eta."""
    batches = list(names["batches"])
    start = new_model(torch.float64)

    def train(loss_of: Callable[..., Callable[[nn.Module], Tensor]], steps: int = 3) -> Model:
        model = copy.deepcopy(start)
        for (first, last), eta in list(zip(MICRO_BATCHES, (1.0, 0.75, 0.5), strict=True))[:steps]:
            model.zero_grad()
            tokens, targets = ([batch[name] for batch in batches[first:last]] for name in ("tokens", "targets"))
            loss_of(tokens, targets, eta)(model).backward()
            with torch.no_grad():
                for weight in model.parameters():
                    weight -= 0.1 * weight.grad
        return model

    def mean_of_means(tokens: list[Tensor], targets: list[Tensor], eta: float) -> Callable[[nn.Module], Tensor]:
        return lambda model: sum(
            mixce_loss_reference(model(some), wanted, eta) / 2 for some, wanted in zip(tokens, targets, strict=True)
        )

    trained = names["language_model"]
    assert trained.global_step == 3
    assert trained.eta == 0.5
    assert "eta" in trained.state_dict()
    step, exact, means = (
        model.lm_head.weight - start.lm_head.weight
        for model in (trained.model, train(mean_of_all), train(mean_of_means))
    )
    assert_near(step, exact)
    assert_far(means, exact)
    # Logged of the last batch, before the last step.
    before_last = train(mean_of_all, steps=2)(batches[-1]["tokens"]).flatten(0, 1)
    assert_near(names["trainer"].logged_metrics["nll"], F.cross_entropy(before_last, batches[-1]["targets"].flatten()))


def check_torchtitan_loss(names: Namespace) -> None:
    """As torchtitan's trainer calls it: logits, labels, the number of tokens of the whole step."""
    model, tokens = names["model"], names["tokens"]
    labels = new_targets(tokens)
    loss, metrics = (
        names["MixCELoss"].Config(eta=0.3).build(compile_config=None)(model(tokens), labels, torch.tensor(50.0))
    )
    loss.backward()
    assert metrics == {}
    assert_trained(model, loss, lambda twin: mixce_loss_reference(twin(tokens), labels, 0.3, reduction="sum") / 50)


@contextmanager
def with_titan_config(names: Namespace) -> Iterator[None]:
    class Config:
        loss: Any = None

    names["config"] = Config()
    names["model"] = new_model(torch.float32)
    yield


def check_torchtitan_config(names: Namespace) -> None:
    """The wrapper's gradients of head and hidden states are those of the logits as a whole."""
    model, tokens = names["model"], new_tokens(3, 16)
    labels = new_targets(tokens)
    wrapper = names["config"].loss.build(compile_config=None)
    wrapper.set_lm_head(model.lm_head)
    loss, _ = wrapper(model.backbone(tokens), labels, torch.tensor(20.0))
    loss.backward()
    assert_trained(model, loss, lambda twin: mixce_loss_reference(twin(tokens), labels, 0.5, reduction="sum") / 20)


TITAN = ("torchtitan", "spmd_types", "tyro")
LIGER = {"needs": ("liger_kernel", "triton"), "interpreted": True}
SFT = {"prepare": with_sft, "needs": ("trl", "datasets", "transformers")}

PAGES: dict[str, Page] = {
    "README.md": Page(
        readme,
        [
            Step(check_call, with_logits),
            Step(check_in_place),
            Step(check_accumulation),
            Step(check_metrics, with_valid_logits),
            Step(check_training_step),
            Step(check_trainers, with_causal_lm, needs=("transformers", "accelerate")),
            Step(check_shard_call, with_group),
        ],
    ),
    "index.md": Page(index, [Step(check_index_call), Step(check_index_linear_call)]),
    "guide.md": Page(
        guide,
        [
            Step(check_weighted_gradient),
            Step(check_eta_of_tokens),
            Step(check_schedule),
            Step(check_module),
            Step(check_callback, needs=("transformers",)),
            Step(check_nll, with_ignored_targets),
            Step(check_token_metrics),
            Step(check_trainer, with_trainer, needs=("transformers", "accelerate")),
            Step(check_autocast),
            Step(check_micro_batches, with_kept_weights),
            Step(check_in_place),
            Step(check_nothing_valid),
        ],
    ),
    "migration.md": Page(
        migration,
        [
            Step(keep_before),
            Step(compare_with_before),
            Step(keep_before),
            Step(compare_with_before),
            Step(keep_before, **LIGER),
            Step(compare_with_before, **LIGER),
            Step(keep_before, **LIGER),
            Step(compare_with_before, **LIGER),
            Step(keep_before, needs=("cut_cross_entropy",)),
            Step(compare_with_before, needs=("cut_cross_entropy",)),
            Step(keep_before, skipped="flash-attention runs on GPUs alone"),
            Step(compare_with_plain_tokens),
            Step(keep_sft, **SFT),
            Step(compare_sft, **SFT),
        ],
    ),
    "integrations.md": Page(
        integrations,
        [
            Step(check_loss_function, needs=("transformers",)),
            Step(check_accumulating_trainer, with_accumulating_trainer, needs=("transformers", "accelerate")),
            Step(check_linear_lm, needs=("transformers",)),
            Step(check_lightning, with_lightning, needs=("lightning",)),
            Step(check_torchtitan_loss, needs=TITAN),
            Step(check_torchtitan_config, with_titan_config, needs=TITAN),
        ],
    ),
    "vocab_parallel.md": Page(
        vocab_parallel, [Step(check_padded_shard, with_padded_shard), Step(check_mesh, with_mesh)]
    ),
    "linear.md": Page(dict, []),
    "kernels.md": Page(dict, []),
    "reference.md": Page(dict, []),
}


def test_every_page_and_block_has_a_step() -> None:
    pages = {"README.md", *(path.name for path in (ROOT / "docs").glob("*.md"))}
    assert pages == PAGES.keys() | ELSEWHERE.keys()
    assert not PAGES.keys() & ELSEWHERE.keys()
    assert not list((ROOT / "docs").glob("*/**/*.md")), "pages in folders are not looked at"
    for name, page in PAGES.items():
        assert len(page.steps) == len(blocks_of(name)), name
    for name, test in ELSEWHERE.items():
        assert f'"{name}"' in (ROOT / "tests" / test).read_text(encoding="utf-8")
        assert blocks_of(name)
    for name in pages:
        # No other spelling of a block of Python goes by unseen.
        fences = re.findall(r"^\s*(?:```|~~~)(\S*)", path_of(name).read_text(encoding="utf-8"), re.MULTILINE)
        assert set(fences[::2]) <= {"python", "sh"}, name
        assert set(fences[1::2]) <= {""}, name


@pytest.mark.parametrize(
    ("page", "index"),
    [pytest.param(page, index, id=f"{page}-{index}") for page in PAGES for index in range(len(PAGES[page].steps))],
)
def test_block(page: str, index: int, one_thread: None) -> None:
    step = PAGES[page].steps[index]
    if step.skipped:
        compile(blocks_of(page)[index].code, page, "exec")
        pytest.skip(step.skipped)
    if missing := step.missing():
        pytest.skip(f"needs {', '.join(missing)}")
    if step.interpreted:
        passed, errors = interpreted_blocks_of(page)
        assert index in passed, errors
    else:
        run_of(page).until(index)


# The tables of migration.md


class Section(NamedTuple):
    """A table of migration.md: whose arguments are its rows, and in which of our functions their counterparts are."""

    theirs: Callable[[], set[str]]
    ours: tuple[Callable[..., Any], ...]


def cross_entropy_arguments() -> set[str]:
    return set(inspect.signature(F.cross_entropy).parameters)


def liger_arguments() -> set[str]:
    functional = pytest.importorskip("liger_kernel.transformers.functional", exc_type=ImportError)
    return set(inspect.signature(functional.liger_cross_entropy).parameters)


def liger_linear_arguments() -> set[str]:
    liger = pytest.importorskip("liger_kernel.transformers", exc_type=ImportError)
    module = liger.LigerFusedLinearCrossEntropyLoss
    found = set(inspect.signature(module).parameters) | set(inspect.signature(module.forward).parameters)
    return found - {"self"}


def cut_cross_entropy_arguments() -> set[str]:
    """Of the release, and those that the page marks as newer."""
    cce = pytest.importorskip("cut_cross_entropy", exc_type=ImportError)
    newer = {"bias", "return_lse", "filter_e_grad", "filter_c_grad", "accum_e_fp32", "accum_c_fp32"}
    return set(inspect.signature(cce.linear_cross_entropy).parameters) | newer | {"vocab_parallel_options"}


def flash_attention_arguments() -> set[str]:
    """Of flash_attn/ops/triton/cross_entropy.py, as of flash-attention's commit 058ad35a."""
    scales = {"label_smoothing", "logit_scale", "lse_square_scale"}
    return {"logits", "labels", "precomputed_lse", *scales, "ignore_index", "inplace_backward", "process_group"}


def trl_arguments() -> set[str]:
    """Of TRL 1.0's `dft_loss`, and of the configuration."""
    trl = pytest.importorskip("trl", exc_type=ImportError)
    options = {"loss_type", "label_smoothing_factor"}
    assert options <= set(inspect.signature(trl.SFTConfig).parameters)
    return {"outputs", "labels", "num_items_in_batch", *options}


def transformers_loss_arguments(eta: float, logits: Tensor, labels: Tensor) -> None:
    """Stands in where Transformers is not installed: see `names_of`."""


def names_of(functions: tuple[Callable[..., Any], ...]) -> set[str]:
    """The arguments of our functions."""
    names = {name for function in functions for name in inspect.signature(function).parameters}
    if transformers_loss_arguments in functions:
        module = pytest.importorskip("mixce_kernels.integrations.transformers", exc_type=ImportError)
        loss = module.MixCEForCausalLMLoss
        names = {*inspect.signature(loss).parameters, *inspect.signature(loss.__call__).parameters} - {"self"}
    return names


SECTIONS = {
    "torch.nn.functional.cross_entropy": Section(cross_entropy_arguments, (fused_mixce_loss,)),
    "Liger: liger_cross_entropy, LigerCrossEntropyLoss": Section(liger_arguments, (fused_mixce_loss,)),
    "Liger: LigerFusedLinearCrossEntropyLoss": Section(liger_linear_arguments, (fused_linear_mixce_loss,)),
    "cut-cross-entropy: linear_cross_entropy": Section(cut_cross_entropy_arguments, (fused_linear_mixce_loss,)),
    "flash-attention: cross_entropy_loss": Section(
        flash_attention_arguments, (fused_mixce_loss, vocab_parallel_mixce_loss)
    ),
    'TRL: loss_type="dft"': Section(trl_arguments, (transformers_loss_arguments,)),
}


def tables() -> dict[str, list[tuple[str, str]]]:
    """The rows of each section's table, heading and rule left out."""
    found: dict[str, list[tuple[str, str]]] = {}
    for section in path_of("migration.md").read_text(encoding="utf-8").split("\n## ")[1:]:
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
    arguments = names_of(SECTIONS[heading].ours)
    known = arguments | set(mixce_kernels.__all__)
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


# The site


def build_site(configuration: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict`, where nothing can be fetched."""
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers"):
        pytest.importorskip(package)
    nowhere = "http://127.0.0.1:9"
    proxies = {"http_proxy": nowhere, "https_proxy": nowhere, "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere}
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", configuration, "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, **proxies, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_site_builds(tmp_path: Path) -> None:
    built = build_site(ROOT / "mkdocs.yml", tmp_path / "site")
    assert built.returncode == 0, built.stderr
    for page in (ROOT / "docs").glob("*.md"):
        html = (tmp_path / "site" / f"{page.stem}.html").read_text(encoding="utf-8")
        # Links lead elsewhere; nothing is loaded from there.
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//", html)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|preload|icon)[^>]*(?:https?:)?//", html)
        assert not loaded, page.name
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    for name in mixce_kernels.__all__:
        assert f'id="mixce_kernels.{name}"' in reference, name


def test_site_does_not_build_with_a_broken_link(tmp_path: Path) -> None:
    """The configuration's own, so that the test above can fail."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[there](nowhere.md), [here](index.md#nowhere)\n", encoding="utf-8")
    configuration = tmp_path / "mkdocs.yml"
    lines = [f"INHERIT: {ROOT / 'mkdocs.yml'}", "docs_dir: docs", "nav: [index.md]", "plugins: [search]"]
    configuration.write_text("\n".join(lines) + "\n", encoding="utf-8")
    built = build_site(configuration, tmp_path / "site")
    assert built.returncode != 0
    assert "nowhere.md" in built.stderr
    assert "#nowhere" in built.stderr


if __name__ == "__main__":
    run_interpreted_blocks(sys.argv[1])
