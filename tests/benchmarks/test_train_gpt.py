"""The example trains: the fused loss gives the curve of the plain formula, and the script does what it says."""

from __future__ import annotations

import argparse
import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support.paths import EXAMPLES

for extra in ("matplotlib", "tokenizers", "tqdm"):
    pytest.importorskip(extra, reason="needs the extra 'examples'")

SCRIPT = EXAMPLES / "train_gpt.py"


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_gpt", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_gpt = load_example()
VOCAB_SIZE = 997
TINY = ["--block-size=16", "--batch-size=4", "--layers=1", "--width=32", "--heads=2", "--steps=8", "--device=cpu"]


def arguments(*more: str) -> argparse.Namespace:
    return train_gpt.parse_args([*TINY, *more])


def train_tiny(dtype: torch.dtype, *more: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out losses, each [8], of a tiny model's first steps; the same start and batches every time."""
    args = arguments(*more)
    torch.manual_seed(0)
    model = train_gpt.GPT(VOCAB_SIZE, args.block_size, args.layers, args.width, args.heads).to(dtype)
    tokens = torch.randint(7, (2000,)).cumsum(0) % VOCAB_SIZE
    curve = train_gpt.train(model, tokens[:-100], tokens[-100:], args)
    _, losses, perplexities = torch.tensor(curve, dtype=torch.float64).unbind(1)
    return losses, perplexities.log()


def test_a_weighting_trains_otherwise(one_thread: None) -> None:
    """As the plain formula does, and not as MixCE; its name stands in the title."""
    fused, plain = (
        train_tiny(torch.float32, f"--loss={loss}", "--weighting=Focal(2)")[0] for loss in ("fused", "reference")
    )
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    assert (fused - train_tiny(torch.float32)[0]).abs().max() > 0.1
    assert train_gpt.title(arguments("--weighting=Focal(2)")) == "fused Focal(gamma=2), eta = 0.5"
    assert train_gpt.title(arguments()) == "fused MixCE, eta = 0.5"


def test_weightings_that_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for given, sentence in (
        (["--weighting=Powers(2)"], "expected one of Probability, Power"),
        (["--weighting=Power(-1)"], "expected alpha to be finite and not negative, got -1"),
        (["--weighting=Variance", "--loss=cross_entropy"], "expected a loss that knows weightings"),
    ):
        with pytest.raises(SystemExit):
            arguments(*given)
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_fused_and_reference_losses_train_alike(eta: float, one_thread: None) -> None:
    """Both float32 curves err from the float64 one by rounding, which AdamW carries from step to step.

    So the fused curve may err by twice what the plain formula's does, plus one float32 epsilon of the curve's largest
    value: the rule of the loss itself, for a curve. That this is tight shows in an eta off by a hundredth, whose
    training losses it must tell apart.
    """
    exact, plain, fused, off = (
        train_tiny(dtype, f"--loss={loss}", f"--eta={eta_given}")
        for dtype, loss, eta_given in (
            (torch.float64, "reference", eta),
            (torch.float32, "reference", eta),
            (torch.float32, "fused", eta),
            (torch.float32, "fused", abs(eta - 0.01)),
        )
    )
    tolerances = [
        2 * (plain_curve - curve).abs().max() + torch.finfo(torch.float32).eps * curve.max()
        for plain_curve, curve in zip(plain, exact, strict=True)
    ]
    for fused_curve, curve, tolerance in zip(fused, exact, tolerances, strict=True):
        assert (fused_curve - curve).abs().max() <= tolerance
    assert (off[0] - exact[0]).abs().max() > tolerances[0]


def test_cross_entropy_is_eta_one(one_thread: None) -> None:
    """F.cross_entropy in float64 against the reference at eta = 1: 8 steps of sums of 64 tokens, rounded to 2^-53."""
    expected = train_tiny(torch.float64, "--loss=cross_entropy")
    for curve, expected_curve in zip(train_tiny(torch.float64, "--loss=reference", "--eta=1"), expected, strict=True):
        torch.testing.assert_close(curve, expected_curve, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_script_trains_on_a_text_file(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 100, encoding="utf-8")
    options = [f"--text={text}", "--vocab-size=300", f"--dtype={dtype}", f"--out={tmp_path}", "--threads=1"]
    threads = torch.get_num_threads()
    train_gpt.main([*TINY, *options])
    torch.set_num_threads(threads)

    said = capsys.readouterr().out
    assert "vocabulary of 300," in said
    assert "held-out perplexity" in said
    with (tmp_path / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[-1]["perplexity"]) < float(rows[0]["perplexity"])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_script_refuses_an_eta_outside_its_range(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_gpt.main(["--eta=1.5"])
    assert "expected a number in [0, 1], got 1.5" in capsys.readouterr().err


@pytest.mark.slow
def test_default_text_supports_the_default_vocabulary() -> None:
    vocab_size = arguments().vocab_size
    assert vocab_size >= 16384
    tokens, reached = train_gpt.tokenize(train_gpt.python_documentation(), vocab_size)
    assert reached == vocab_size
    assert tokens.max() < vocab_size
