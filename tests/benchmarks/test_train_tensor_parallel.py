"""The tensor-parallel example: sharded or whole, the model has the same gradients, and the script prints the same."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from support.paths import EXAMPLES
from support.ranks import run_ranks

pytest.importorskip("torch.distributed.tensor.parallel", reason="needs tensor parallelism")

SCRIPT = EXAMPLES / "train_tensor_parallel.py"
TINY = ["--block-size=16", "--batch-size=4", "--layers=1", "--width=24", "--device=cpu", "--dtype=float64"]


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tensor_parallel", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(shards: int) -> dict[str, Tensor]:
    """The loss of a tiny model and the gradients of its whole parameters, sharded over so many of this test's ranks."""
    example = load_example()
    torch.manual_seed(0)
    model = example.GPT(block_size=16, layers=2, width=24, heads=12).double()
    tokens = torch.randint(example.VOCAB_SIZE, (2, 17))
    mesh = None
    if shards > 1:
        mesh = example.init_device_mesh("cpu", (4 // shards, shards), mesh_dim_names=("copies", "shards"))["shards"]
        example.parallelize(model, mesh)
    logits = model(tokens[:, :-1])
    assert logits.shape == (2, 16, example.PADDED_VOCAB_SIZE // shards)
    loss = example.loss_of(logits, tokens[:, 1:], 0.5, mesh)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}
    return {"loss": loss.detach(), **whole}


def of_two_and_four() -> list[dict[str, Tensor]]:
    return [gradients(2), gradients(4)]


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_model(one_thread: None) -> None:
    """What a training with Adam, which does not mind the scale of a parameter's gradient, would not tell.

    float64: sums of at most 264 terms in another order, 2^-53 each, through two layers.
    """
    expected = gradients(1)
    assert not expected["lm_head.weight"][257:].any()
    for of_rank in run_ranks(of_two_and_four, 4):
        for got in of_rank:
            assert got.keys() == expected.keys()
            for name, value in got.items():
                largest = expected[name].abs().max().item()
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-13 * largest, msg=name)


def losses_of(table: str, shards: int) -> list[float]:
    """Those of the 6 steps that the script printed."""
    heading, columns, *rows = (line.split() for line in table.splitlines())
    assert heading == [str(shards), "shards" if shards > 1 else "shard", "of", "the", "vocabulary"]
    assert columns == ["step", "loss"]
    assert [step for step, _ in rows] == ["1", "2", "3", "4", "5", "6"]
    return [float(loss) for _, loss in rows]


@pytest.mark.slow
def test_script_prints_the_same_losses_for_any_number_of_processes(
    one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """float64, whose rounding six steps of Adam carry to some 1e-12: what may differ is the last of eight digits.

    That this is tight shows in an eta off by 1e-6.
    """
    arguments = [*TINY, "--steps=6", "--print-every=1"]
    example = load_example()
    example.main(arguments)
    expected = losses_of(capsys.readouterr().out, 1)
    assert expected[-1] < expected[0]
    example.main([*arguments, "--eta=0.500001"])
    assert losses_of(capsys.readouterr().out, 1) != pytest.approx(expected, rel=0, abs=1.5e-8)

    for processes in (2, 4):
        # A rendezvous of its own at a free port: tests may run side by side.
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "destroy_process_group" not in done.stderr
        assert losses_of(done.stdout, processes) == pytest.approx(expected, rel=0, abs=1.5e-8)


def test_script_refuses_heads_that_do_not_split() -> None:
    with pytest.raises(SystemExit, match="got a width of 24 and 5 heads"):
        load_example().main([*TINY, "--heads=5"])
