"""The comparison of etas: its counts, its sampler, what is the same for every eta, and what it writes."""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

for extra in ("matplotlib", "tokenizers", "tqdm"):
    pytest.importorskip(extra, reason="needs the extra 'examples'")


import eta_report
import eta_results
import train_gpt
from compare_eta import DEFAULT_ETAS, check_comparison, choose, measure
from mixce_kernels import mixce_loss_reference
from sample_quality import held_out_qualities, sample, sample_qualities

VOCAB_SIZE = 97
TINY = ["--block-size=16", "--batch-size=4", "--layers=2", "--width=32", "--heads=2", "--steps=4", "--device=cpu"]
COMPARISON = [*TINY, "--vocab-size=300", "--prompt-tokens=6", "--samples=5", "--threads=1"]


def arguments(*more: str) -> argparse.Namespace:
    return train_gpt.parse_args([*TINY, *more])


@pytest.fixture
def model(one_thread: None) -> Any:
    """A model of random weights in float64; larger ones than at a training's start, so that logits differ by nats."""
    torch.manual_seed(0)
    gpt = train_gpt.GPT(VOCAB_SIZE, 16, layers=2, width=32, heads=2).double()
    with torch.no_grad():
        for embedding in (gpt.tokens, gpt.positions):
            embedding.weight.mul_(20)
    return gpt


class Chain:
    """A model whose next token depends on the last one by known probabilities, for every position [V, V]."""

    def __init__(self, transitions: Tensor) -> None:
        self.transitions = transitions
        self.seen: list[Tensor] = []

    def __call__(self, tokens: Tensor, cache: list[list[Tensor]] | None = None) -> Tensor:
        self.seen.append(tokens)
        return self.transitions.log()[tokens]


# Sequences, n, unique n-grams of all, repeated n-grams of each, all counted by hand.
COUNTED = [
    ([[7, 7, 7, 7, 7]], {1: (1, 5, 4), 2: (1, 4, 3), 3: (1, 3, 2), 4: (1, 2, 1)}),
    ([[1, 2, 3, 4, 5]], {1: (5, 5, 0), 2: (4, 4, 0), 3: (3, 3, 0), 4: (2, 2, 0)}),
    # The second repeats the first, which is a lack of diversity, and no repetition within a sequence.
    ([[1, 2, 3, 4], [1, 2, 3, 4]], {1: (4, 8, 0), 2: (3, 6, 0), 3: (2, 4, 0), 4: (1, 2, 0)}),
    # No n-gram runs from one sequence into the next: 4 5 and 5 1 would.
    ([[1, 2, 1, 2, 4], [5, 1, 2, 3, 1]], {1: (5, 10, 3), 2: (6, 8, 1), 3: (6, 6, 0), 4: (4, 4, 0)}),
]


@pytest.mark.parametrize(("sequences", "counted"), COUNTED)
def test_shares_of_ngrams_are_those_counted_by_hand(
    sequences: list[list[int]], counted: dict[int, tuple[int, int, int]]
) -> None:
    measured = sample_qualities(torch.tensor(sequences))
    for n, (unique, total, repeated) in counted.items():
        assert measured[f"distinct_{n}"] == pytest.approx(unique / total)
        assert measured[f"repetition_{n}"] == pytest.approx(repeated / total)


@pytest.mark.parametrize(
    ("tokens", "bits"), [([0, 0, 0, 0], 0.0), ([0, 3, 5, 9], 2.0), ([4, 4, 4, 4, 1, 1, 8, 9], 1.75)]
)
def test_entropy_of_known_frequencies(tokens: list[int], bits: float) -> None:
    assert sample_qualities(torch.tensor([tokens]))["entropy"] == pytest.approx(bits)


def test_samples_follow_the_models_distribution() -> None:
    """Counts of each transition within 5 deviations of a binomial: by chance one of 9 fails in some 10^5 seeds.

    With this seed they are within 1.3. With a temperature of 0.9 one is 8 deviations off; where the least likely token
    of the first row is cut off, as by a nucleus of 0.95, 15.
    """
    transitions = torch.tensor([[0.02, 0.08, 0.9], [0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    chain = Chain(transitions)
    prompts = torch.arange(3).repeat(2000).view(-1, 1)
    drawn, log_probs = sample(chain, prompts, 8, torch.Generator().manual_seed(0))
    assert drawn.shape == log_probs.shape == (6000, 8)
    before = torch.cat((prompts, drawn[:, :-1]), 1)
    torch.testing.assert_close(log_probs, transitions.log()[before, drawn])
    for last in range(3):
        followers = drawn[before == last]
        for token in range(3):
            p = transitions[last, token].item()
            deviation = math.sqrt(len(followers) * p * (1 - p))
            assert abs((followers == token).sum().item() - len(followers) * p) <= 5 * deviation, (last, token)


def test_a_token_that_was_drawn_is_what_comes_next() -> None:
    """A chain without choice: each token is followed by the next number."""
    chain = Chain(torch.eye(5).roll(1, 1))
    drawn, log_probs = sample(chain, torch.tensor([[4, 0], [1, 3]]), 4, torch.Generator())
    assert drawn.tolist() == [[1, 2, 3, 4], [4, 0, 1, 2]]
    assert log_probs.tolist() == [[0.0] * 4] * 2
    assert [tuple(tokens.shape) for tokens in chain.seen] == [(2, 2), (2, 1), (2, 1), (2, 1)]


def test_cache_gives_the_logits_of_the_whole_sequence(model: Any) -> None:
    """float64 sums in another order. Positions, order and length of the past all show: the context changes nats."""
    tokens = torch.randint(VOCAB_SIZE, (3, 16))
    whole = model(tokens)
    cache: list[list[Tensor]] = []
    parts = [model(step, cache) for step in (tokens[:, :5], *tokens[:, 5:].split(1, 1))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    assert cache[1][0].shape[2] == 16
    other = model(torch.cat((tokens[:, 1:2], tokens[:, 1:]), 1))[:, -1]
    assert (other - whole[:, -1]).abs().max() > 1e-2


def test_samples_are_scored_as_the_whole_sequence_scores_them(model: Any) -> None:
    prompts = torch.randint(VOCAB_SIZE, (4, 3))
    drawn, log_probs = sample(model, prompts, 13, torch.Generator().manual_seed(1))
    whole = model(torch.cat((prompts, drawn), 1))[:, 2:-1].log_softmax(-1)
    expected = whole.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    # The sampler's logarithms are float32: some epsilons of logits up to 100.
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-4)


def test_held_out_qualities_are_those_of_plain_pytorch(model: Any) -> None:
    windows = torch.randint(VOCAB_SIZE, (5, 17))
    measured = held_out_qualities(model, windows, batch_size=2)
    logits, targets = model(windows[:, :-1]), windows[:, 1:]
    _, stats = mixce_loss_reference(logits, targets, return_stats=True)
    assert measured["perplexity"] == pytest.approx(stats.nll.mean().exp().item(), rel=1e-6)
    assert measured["mean_q"] == pytest.approx(stats.q.mean().item(), rel=1e-6)
    assert measured["accuracy"] == (logits.argmax(-1) == targets).double().mean().item()


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_a_seed_gives_every_eta_the_same_start_and_batches(eta: float, one_thread: None) -> None:
    """The first loss is that of the same weights and batch: with eta = 1 nll, else its mixture with q nll."""
    corpus = train_gpt.Corpus(0, torch.randint(7, (2000,)).cumsum(0) % VOCAB_SIZE, torch.arange(64), VOCAB_SIZE)

    def curve(of_eta: float, seed: int) -> Tensor:
        args = arguments(f"--eta={of_eta}", f"--seed={seed}")
        model = train_gpt.new_model(corpus, args)
        return torch.tensor([one.loss for one in train_gpt.train(model, corpus.train_tokens, corpus.held_out, args)])

    once = curve(eta, 0)
    torch.rand(1)
    assert torch.equal(once, curve(eta, 0))
    assert not torch.equal(once, curve(eta, 1))
    # Nearly uniform at first: the mixture is about eta + (1 - eta) / V of nll, where another batch would be off.
    assert once[0] == pytest.approx(curve(1.0, 0)[0].item() * (eta + (1 - eta) / VOCAB_SIZE), rel=0.02)
    assert torch.equal(choose(50, 20, 3), choose(50, 20, 3))
    assert not torch.equal(choose(50, 20, 3), choose(50, 20, 4))


def test_comparison_writes_csv_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        " ".join(f"The {n % 13} quick foxes jump over {n % 7} lazy dogs, {n} times." for n in range(900)),
        encoding="utf-8",
    )
    threads = torch.get_num_threads()
    train_gpt.main([*COMPARISON, f"--text={text}", f"--out={tmp_path}", "--compare", "1", "0.5", "--seeds", "0", "4"])
    torch.set_num_threads(threads)

    with (tmp_path / "compare_eta.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["source"], row["eta"], row["seed"]) for row in rows] == [
        (source, eta, seed) for seed in ("0", "4") for source, eta in (("human", ""), ("model", "1"), ("model", "0.5"))
    ]
    for row in rows:
        assert row["torch"] == torch.__version__
        assert (row["text"], row["steps"], row["samples"], row["prompt_tokens"]) == ("text.txt", "4", "5", "6")
        measured = {name: row[name] for name in eta_results.METRICS}
        for name, value in measured.items():
            of_model_alone = name in ("perplexity", "own_perplexity", "accuracy", "mean_q")
            assert bool(value) == (row["source"] == "model" or not of_model_alone)
    # Models after 4 steps draw nearly all tokens alike, and the human text does not.
    assert all(float(row["entropy"]) < float(rows[1]["entropy"]) for row in rows if row["source"] == "human")

    held_out = train_gpt.load_corpus(arguments(f"--text={text}", "--vocab-size=300")).held_out
    for row in rows[::3]:
        starts = choose((len(held_out) - 1) // 16, 5, int(row["seed"])) * 16
        # What follows the prompts of 6 tokens, to the end of a block of 16.
        human_text = torch.stack([held_out[start + 6 : start + 16] for start in starts])
        for name, value in sample_qualities(human_text).items():
            assert float(row[name]) == pytest.approx(value, rel=1e-5)

    human = [float(row["distinct_2"]) for row in rows if row["source"] == "human"]
    table = (tmp_path / "compare_eta.md").read_text(encoding="utf-8")
    assert "| | human text | eta = 1 | eta = 0.5 |" in table
    assert f"| distinct 2-grams | {sum(human) / 2:.3f} ± {abs(human[0] - human[1]) / math.sqrt(2):.3f} |" in table
    assert (tmp_path / "compare_eta.png").read_bytes().startswith(b"\x89PNG")
    assert "distinct 2-grams" in capsys.readouterr().out
    assert str(tmp_path) not in table


def test_samples_of_a_model_are_measured_after_its_own_prompts(model: Any) -> None:
    """What `measure` says is what sampling the chosen prompts by hand says."""
    args = arguments("--prompt-tokens=6", "--samples=5")
    windows = torch.randint(VOCAB_SIZE, (9, 17))
    chosen = choose(9, 5, 2)
    measured = measure(model, windows, chosen, 2, args)
    drawn, log_probs = sample(model, windows[chosen, :6], 10, torch.Generator("cpu").manual_seed(2))
    assert measured["own_perplexity"] == pytest.approx(math.exp(-log_probs.double().mean().item()))
    assert {name: measured[name] for name in sample_qualities(drawn)} == sample_qualities(drawn)


def rows_of(values: dict[str, list[float]]) -> list[dict[str, str]]:
    """Lines of a CSV in which every metric has these values, by eta ("" is human text), one for each seed."""
    return [
        {
            "source": "model" if eta else "human",
            "eta": eta,
            "seed": str(seed),
            **dict.fromkeys(eta_results.METRICS, f"{v}"),
        }
        for eta, of_eta in values.items()
        for seed, v in enumerate(of_eta)
    ]


def test_conclusions_name_the_nearest_not_the_largest() -> None:
    said = eta_report.conclusions(rows_of({"": [0.5, 0.5], "1": [0.9, 0.7], "0.5": [0.3, 0.4], "0": [0.1, 0.1]}))
    by_title = dict(sentence.split(": ", 1) for sentence in said if ": " in sentence)
    assert by_title["Distinct 2-grams"] == (
        "nearest to human text (0.500 ± 0.000) is eta = 0.5 (0.350 ± 0.071, off by 0.150 ± 0.071), then eta = 1 "
        "(0.800 ± 0.141, off by 0.300 ± 0.141); the first is ahead of the second with 2 of 2 seeds."
    )
    assert by_title["Held-out perplexity"].startswith("lowest is eta = 0 (0.1 ± 0.0)")
    assert by_title["Held-out top-1 accuracy"].startswith("highest is eta = 1 (0.800 ± 0.141)")
    # As sure as right, where the two perplexities are the same.
    assert by_title["Perplexity of own samples over held-out perplexity"] == (
        "1.00 ± 0.00 for eta = 1, 1.00 ± 0.00 for eta = 0.5, 1.00 ± 0.00 for eta = 0; nearest to 1 is eta = 1."
    )
    assert said[-2:] == [
        "Of 9 measures of the samples, nearest to human text is eta = 1 in 0, eta = 0.5 in 9, eta = 0 in 0.",
        "In 9 of 9 it is a smaller eta, and nearer than eta = 1 with each of 2 seeds.",
    ]


def test_models_that_are_too_sure_of_themselves_are_named() -> None:
    rows = rows_of({"": [0.5], "1": [100.0], "0": [3e7]})
    rows[0]["perplexity"] = rows[0]["own_perplexity"] = ""
    rows[1]["own_perplexity"], rows[2]["own_perplexity"] = "125", "1"
    said = eta_report.conclusions(rows)[-3]
    assert said.endswith("held-out perplexity: 1.25 for eta = 1, 0.00 for eta = 0; nearest to 1 is eta = 1.")
    assert "| held-out perplexity |  | 100.0 | 3e+07 |" in eta_report.markdown(
        [{**settings_of_a_run(), **row} for row in rows]
    )


def settings_of_a_run() -> dict[str, str]:
    """What else stands on a line of the CSV."""
    numbers = ("train_tokens", "held_out_tokens", "vocab_size", "steps", "batch_size", "block_size", "layers", "width")
    texts = ("text", "loss", "dtype", "device", "cpu", "python", "torch", "mixce_kernels", "commit", "date")
    return {
        **dict.fromkeys((*numbers, "heads", "lr", "prompt_tokens", "samples"), "1"),
        **dict.fromkeys(texts, "some"),
    }


def test_conclusions_do_not_hide_that_eta_one_wins_or_that_seeds_disagree() -> None:
    said = eta_report.conclusions(rows_of({"": [0.5, 0.5], "1": [0.5, 0.6], "0": [0.9, 0.9]}))
    assert said[-1].startswith("In 0 of 9 it is a smaller eta")
    said = eta_report.conclusions(rows_of({"": [0.5, 0.5], "1": [0.5, 0.9], "0": [0.6, 0.6]}))
    assert "nearest to human text is eta = 1 in 0, eta = 0 in 9." in said[-2]
    assert said[-1].startswith("In 0 of 9 it is a smaller eta")
    assert "with 1 of 2 seeds" in said[-4]
    said = eta_report.conclusions(rows_of({"": [0.5], "1": [0.4], "0": [0.4]}))
    assert said[-2].endswith("is eta = 1 in 0, eta = 0 in 0, and several alike in 9.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "1", "0.5", "1.0"], "expected each number of --compare once, got 1 0.5 1"),
        (["--compare", "1", "--seeds", "3", "3"], "expected each number of --seeds once, got 3 3"),
        (
            ["--compare", "--loss=cross_entropy"],
            "expected a loss that knows eta with --compare, got --loss cross_entropy",
        ),
        (["--compare", "--prompt-tokens=13"], "expected --prompt-tokens from 1 to 12"),
        (["--compare", "--prompt-tokens=0"], "expected --prompt-tokens from 1 to 12"),
        (["--compare", "--prompt-tokens=8", "--samples=0"], "expected --samples of 1 or more, got 0"),
    ],
)
def test_arguments_that_do_not_fit_together_end_in_a_sentence(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        train_gpt.main([*TINY, *options])


def test_etas_outside_their_range_and_too_many_samples_end_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_gpt.main(["--compare", "1", "-0.5"])
    assert "expected a number in [0, 1], got -0.5" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes it a dull text, and a short one. " * 300, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"expected --samples of at most \d+, the windows of 16 tokens"):
        train_gpt.main([*COMPARISON, "--samples=500", f"--text={text}", f"--out={tmp_path}", "--compare"])
    with pytest.raises(SystemExit, match="expected over 16 held-out tokens, got 9"):
        train_gpt.main([*COMPARISON, "--held-out-tokens=9", f"--text={text}", f"--out={tmp_path}", "--compare"])


def test_without_numbers_the_comparison_has_its_own() -> None:
    args = arguments("--compare", "--seed=5", "--prompt-tokens=8")
    check_comparison(args)
    assert tuple(args.compare) == DEFAULT_ETAS
    assert args.compare[0] == 1.0
    assert args.seeds == [5]
