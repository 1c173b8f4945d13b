"""The blocks of docs/logprobs.md on trainers: `set_up`'s names are set by each step, `STEPS` belong to the blocks."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.docs.blocks import Namespace, Step
from support.docs.checks import assert_far, assert_near, gradients
from support.docs.models import VOCAB_SIZE
from support.docs.trainers import TRAINER, causal_lm, sft_names


def plain(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of tokens by the formula."""
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, tokens[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@contextmanager
def with_grpo(names: Namespace) -> Iterator[None]:
    from datasets import Dataset

    names |= sft_names(max_steps=1, per_device_train_batch_size=8)
    names["prompts"] = Dataset.from_dict({"prompt": ["w3 w4 w5", "w6 w7", "w8 w9 w10 w11"]})
    names["causal_lm"] = causal_lm()
    yield


def check_grpo(names: Namespace) -> None:
    """The one step beside TRL's own trainer."""
    import trl

    trained, logged = names["causal_lm"], names["trainer"].state.log_history[0]
    own = causal_lm()
    start = copy.deepcopy(own)
    trainer = trl.GRPOTrainer(
        own,
        reward_funcs=names["distinct_tokens"],
        args=names["trainer"].args,
        train_dataset=names["prompts"],
        processing_class=names["tokenizer"],
    )
    trainer.train()
    expected = trainer.state.log_history[0]
    for name in ("loss", "entropy", "grad_norm", "rewards/distinct_tokens/mean"):
        assert_near(torch.tensor(logged[name]), torch.tensor(expected[name]), name)
    for weight, wanted, first in zip(trained.parameters(), own.parameters(), start.parameters(), strict=True):
        assert_near(weight, wanted)
        if wanted is own.lm_head.weight:
            assert_far(wanted, first)


def check_loop(names: Namespace) -> None:
    """The reward grows, and the last loss and its gradients are those of the plain formula on logits."""
    rewards = names["mean_rewards"]
    assert sum(rewards[-3:]) > 1.5 * sum(rewards[:3])
    policy, targets, scored = names["policy"], names["targets"], names["scored"]
    for weight in policy.parameters():
        weight.grad = None
    logprobs, entropy = policy.logprobs(names["tokens"], targets)
    found = loss_of(names, logprobs, entropy)
    found.backward()
    twin = copy.deepcopy(policy).double()
    twin.zero_grad(set_to_none=True)
    logits = twin.lm_head(twin.hidden(names["tokens"])[:, :-1])
    wanted = loss_of(names, *plain(logits, targets.clamp(min=0), names["temperature"]))
    wanted.backward()
    assert_near(found, wanted, "loss")
    assert not logprobs[~scored].any()
    assert not entropy[~scored].any()
    of_twin = gradients(twin)
    for name, grad in gradients(policy).items():
        assert_near(grad, of_twin[name], name, 1e-4)


def loss_of(names: Namespace, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """The loss of the loop."""
    scored, advantages = names["scored"], names["advantages"]
    ratio = (logprobs - names["old_logprobs"]).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(gain[scored].mean() + 0.01 * entropy[scored].mean())


def verl_s_class() -> Any:
    """Verl's own class, read from its file; None where verl is not installed. To import verl needs a lot besides."""
    found = importlib.util.find_spec("verl")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0], "utils", "experimental", "torch_functional.py")
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FusedLinearForPPO


def check_verl_class(names: Namespace) -> None:
    """Both shapes that verl calls it with, as it calls it, beside the plain formula and verl's own class."""
    generator = torch.Generator().manual_seed(1)
    own = verl_s_class()
    for shape in ((6,), (2, 5)):
        hidden = torch.randn(*shape, 8, generator=generator, requires_grad=True)
        weight = torch.randn(VOCAB_SIZE, 8, generator=generator, requires_grad=True)
        tokens = torch.randint(VOCAB_SIZE, shape, generator=generator)
        call = {"hidden_states": hidden, "vocab_weights": weight, "input_ids": tokens, "temperature": 0.7}
        upstream = torch.randn(2, *shape, generator=generator)

        def results(outputs: Any, leaves: list[Tensor], upstream: Tensor = upstream) -> list[Tensor]:
            log_probs, entropy = outputs
            loss = (log_probs * upstream[0] + entropy * upstream[1]).sum()
            return [log_probs.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]

        found = results(names["FusedLinearForPPO"](impl_backend="torch").forward(**call), [hidden, weight])
        assert found[0].dtype == found[1].dtype == torch.float32
        leaves = [one.detach().double().requires_grad_() for one in (hidden, weight)]
        wanted = [results(plain(leaves[0] @ leaves[1].T, tokens, 0.7), leaves)]
        if own is not None:
            wanted.append(results(own(impl_backend="torch").forward(**call), [hidden, weight]))
        for others in wanted:
            for one, other in zip(found, others, strict=True):
                assert_near(one, other)


@contextmanager
def with_verl_s_module(names: Namespace) -> Iterator[None]:
    """Modules of these names that stand for verl's."""
    parts = ["verl", "utils", "experimental", "torch_functional"]
    stubs = {".".join(parts[: count + 1]): types.ModuleType(parts[count]) for count in range(len(parts))}
    for name, module in stubs.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(stubs[parent], last, module)
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def check_verl_s_module(names: Namespace) -> None:
    """Who imports the class afterwards, as verl's models do at each call, gets this one."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    assert FusedLinearForPPO is names["FusedLinearForPPO"]
    assert issubclass(FusedLinearForPPO, nn.Module)


def check_verl_functions(names: Namespace) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, VOCAB_SIZE, generator=generator, requires_grad=True)
    labels = torch.randint(VOCAB_SIZE, (2, 5), generator=generator)
    wanted = plain(logits.detach().double(), labels)
    for one, other in zip(names["logprobs_and_entropy_from_logits"](logits, labels), wanted, strict=True):
        assert one.dtype == torch.float32
        assert_near(one, other)
    # As verl calls it: of logits that nothing else needs.
    scaled = logits / 1.0
    log_probs = names["logprobs_from_logits"](logits=scaled, labels=labels, inplace_backward=True)
    assert_near(log_probs, wanted[0])
    log_probs.sum().backward()
    one_hot = torch.nn.functional.one_hot(labels, VOCAB_SIZE)
    assert_near(logits.grad, one_hot - logits.detach().double().softmax(-1))


STEPS = (
    Step(check_grpo, with_grpo, needs=("trl", "datasets", *TRAINER)),
    Step(check_loop),
    Step(check_verl_class),
    Step(check_verl_s_module, with_verl_s_module),
    Step(check_verl_functions),
)
