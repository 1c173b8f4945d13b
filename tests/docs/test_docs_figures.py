"""The tables of README.md and docs/results.md hold the figures of the CSVs in benchmarks/results."""

from __future__ import annotations

import csv
import itertools
import re
import statistics
from collections.abc import Iterator

import pytest

from finetune.plan import label
from gpu_kernels.hot_loops import read_hot_loops_csv
from gpu_kernels.model import CHIPS, modelled
from gpu_kernels.tables import read_csv
from support.docs.blocks import text_of
from support.paths import ROOT

Row = dict[str, str]

# The names of contenders in the tables, and in the CSVs.
LOGITS = {
    "`fused_mixce_loss`": "fused-cpu",
    "eager": "eager",
    "`torch.compile`": "torch.compile",
    "`F.cross_entropy` (eta = 1 alone)": "F.cross_entropy",
}
WEIGHTINGS = {
    "MixCE": "fused-cpu",
    "`Power(0.5)`": "fused-cpu-power",
    "MixCE with statistics": "fused-cpu-stats",
    "`Entropy(1.0, 3.0)`": "fused-cpu-entropy",
    "eager, q^0.5": "eager-power",
    "eager, H / 3": "eager-entropy",
    "`torch.compile`, q^0.5": "torch.compile-power",
    "`torch.compile`, H / 3": "torch.compile-entropy",
}
LOGPROBS = {
    "`fused_token_logprobs`": "fused-cpu",
    "MixCE with statistics": "fused-cpu-stats",
    "eager `log_softmax`": "eager",
    "`torch.compile` of that": "torch.compile",
    "`fused_linear_token_logprobs`": "fused-linear",
    "`F.linear`, `log_softmax`": "eager-linear",
    "TRL's chunks": "trl-linear",
}
HIDDEN = {
    "`fused_linear_mixce_loss`": "fused-linear",
    "three matrix products": "three-matmuls",
    "eager, all logits": "eager",
    "`F.linear` and `fused_mixce_loss` in place": "fused-materialised",
    "`torch.compile`, all logits": "torch.compile",
    "`F.linear_cross_entropy`, chunked (eta = 1 alone)": "F.linear_cross_entropy",
}
PROCESSES = {
    "`vocab_parallel_mixce_loss`": "vocab-parallel-ce",
    "PyTorch's `loss_parallel`": "loss_parallel",
    "three all-reduces, as in Megatron-LM": "three-all-reduces",
}
SAMPLES = {
    "held-out perplexity": "perplexity",
    "perplexity of own samples": "own_perplexity",
    "distinct 2-grams": "distinct_2",
    "repeated 2-grams": "repetition_2",
    "distinct 4-grams": "distinct_4",
}
# The same of the pretrained model, on the two pages.
FINE_TUNED = {
    "held-out perplexity": "perplexity",
    "perplexity of own samples": "own_perplexity",
    "diversity": "diversity",
    "diversity of samples": "diversity",
    "repeated 2-grams": "repetition_2",
    "repeated 4-grams": "repetition_4",
    "MAUVE": "mauve",
}


def rows_of(name: str, **wanted: str) -> list[Row]:
    """The lines of a CSV that have these values; at least one."""
    with (ROOT / "benchmarks" / "results" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]
    assert rows, (name, wanted)
    return rows


def figure(name: str, column: str, **wanted: str) -> float:
    """The one value of a column among the lines that have one."""
    (value,) = {row[column] for row in rows_of(name, **wanted) if row[column]}
    return float(value)


def table_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table with figures under a heading, without its line of dashes."""
    return tables_of(page, heading)[0]


def tables_of(page: str, heading: str) -> list[list[list[str]]]:
    """Likewise all tables with figures."""
    _, found, text = text_of(page).partition(f"\n## {heading}\n")
    assert found, (page, heading)
    tables = re.findall(r"(?:^\|.*\n)+", text.partition("\n## ")[0], re.MULTILINE)
    cells = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for table in tables
        if "---:" in table
    ]
    return [[line for line in table if not line[0].startswith("---")] for table in cells]


def sections(table: list[list[str]]) -> Iterator[tuple[Row, list[list[str]]]]:
    """The parts of a table below a line such as **float32, 1024 x 50257**, and what that says."""
    for is_title, lines in itertools.groupby(table[1:], lambda line: line[0].startswith("**")):
        if is_title:
            (title,) = lines
            dtype, rows, vocab = re.fullmatch(r"\*\*(\w+), (\d+) x (\d+)\*\*", title[0]).groups()
            size = {"dtype": dtype, "rows": rows, "vocab": vocab}
            if title[-1]:
                yield size, [title]
        else:
            yield size, list(lines)


def assert_rounded(text: str, value: float) -> None:
    """Fails unless the text is the value, rounded to the digits that the text has."""
    digits, _, exponent = text.removesuffix(" MB").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    assert abs(float(text.removesuffix(" MB")) - value) <= 0.5001 * unit, (text, value)


@pytest.mark.parametrize(("page", "heading", "sizes"), [("README.md", "Results", 2), ("results.md", "Logits", 3)])
def test_logits(page: str, heading: str, sizes: int) -> None:
    table = table_of(page, heading)
    modes = ("forward", "both", "inplace", "grad_in_forward_inplace")
    seen = 0
    for size, lines in sections(table):
        for name, *cells, copy in lines:
            setting = {**size, "threads": "2", "allocator": "warm"}
            if name.startswith("**"):
                assert_rounded(copy, figure("bench", "median_ms", **setting, contender="copy"))
                seen += 1
                continue
            assert cells[1]
            for mode, cell in zip(modes, cells, strict=True):
                if cell:
                    assert_rounded(cell, figure("bench", "median_ms", **setting, contender=LOGITS[name], mode=mode))
    assert seen == sizes


def test_weightings() -> None:
    size = {"dtype": "float32", "rows": "1024", "vocab": "50257", "threads": "1", "allocator": "warm"}
    lines = table_of("weightings.md", "What it costs")[1:]
    assert [line[0] for line in lines] == list(WEIGHTINGS)
    for name, *cells in lines:
        for mode, cell in zip(("forward", "both"), cells, strict=True):
            assert_rounded(cell, figure("bench", "median_ms", **size, contender=WEIGHTINGS[name], mode=mode))


def test_logprobs() -> None:
    """Times and peak memory of logits, then of hidden states, with the errors of both results."""
    lines = table_of("logprobs.md", "What it costs")[1:]
    sizes = {
        "**logits, float32, 1024 x 50257, one thread**": {"level": "logits", "dtype": "float32", "threads": "1"},
        "**hidden states, bfloat16, 256 x 768 x 50257**": {"level": "hidden", "dtype": "bfloat16"},
    }
    seen = []
    for name, forward, both, peak, logprobs, entropy in lines:
        if name in sizes:
            size = sizes[name]
            continue
        seen.append(name)
        wanted = {**size, "contender": LOGPROBS[name]}
        assert_rounded(forward, figure("logprobs", "median_ms", **wanted, mode="forward"))
        assert_rounded(both, figure("logprobs", "median_ms", **wanted, mode="both"))
        assert_rounded(peak, figure("logprobs", "peak_bytes", **wanted, mode="both") / 1e6)
        for cell, column in ((logprobs, "logprobs_error"), (entropy, "entropy_error")):
            if cell:
                assert_rounded(cell, figure("logprobs", column, **wanted, mode="both"))
    assert seen == list(LOGPROBS)


def test_share_of_a_read() -> None:
    _, _, text = text_of("results.md").partition("**A pure read**")
    shares = re.findall(r"(\d+) %", text.partition("\n\n")[0])
    settings = [
        {"dtype": dtype, "rows": rows, "vocab": "50257", "threads": threads, "allocator": "warm"}
        for dtype, rows in (("float32", "1024"), ("bfloat16", "2048"))
        for threads in ("1", "2")
    ]
    for share, setting in zip(shares, settings, strict=True):
        ours = {**setting, "contender": "fused-cpu", "mode": "forward"}
        assert_rounded(share, figure("bench", "percent_of_read", **ours))


def test_hidden_states() -> None:
    both = {"hidden_size": "768", "mode": "both"}
    lines = table_of("results.md", "Hidden states")[1:]
    assert [line[0] for line in lines] == list(HIDDEN)
    for name, *cells in lines:
        for (rows, vocab), part in (("2048", "50257"), cells[:3]), (("1024", "128256"), cells[3:]):
            wanted = {**both, "dtype": "float32", "rows": rows, "vocab": vocab, "contender": HIDDEN[name]}
            for allocator, cell in zip(("default", "warm"), part[:2], strict=True):
                if cell:
                    assert_rounded(cell, figure("linear", "median_ms", **wanted, allocator=allocator) / 1e3)
            assert_rounded(part[2], figure("linear", "peak_bytes", **wanted, allocator="peaks") / 1e6)
    _, _, text = text_of("results.md").partition("**bfloat16**")
    seconds = re.findall(r"(\d\.\d+) s", text.partition("\n\n")[0])
    for found, contender in zip(seconds, ("fused-linear", "eager", "fused-materialised"), strict=True):
        wanted = {**both, "dtype": "bfloat16", "rows": "2048", "vocab": "50257", "contender": contender}
        assert_rounded(found, figure("linear", "median_ms", **wanted, allocator="warm") / 1e3)


def test_several_processes() -> None:
    seen = 0
    for size, lines in sections(table_of("results.md", "Several processes")):
        for name, *times, collectives, sent, peak in lines:
            wanted = {**size, "ranks": "2", "contender": PROCESSES[name]}
            for mode, cell in zip(("forward", "backward", "both"), times, strict=True):
                assert_rounded(cell, figure("parallel", "median_ms", **wanted, mode=mode))
            assert_rounded(collectives, figure("parallel", "collectives", **wanted, mode="forward"))
            assert_rounded(sent, figure("parallel", "sent_per_token", **wanted, mode="forward"))
            assert_rounded(peak, figure("parallel", "peak_bytes", **wanted, mode="both") / 1e6)
            seen += 1
    assert seen == 2 * len(PROCESSES)


def test_synthetic_experiment() -> None:
    lines = table_of("results.md", "The paper's synthetic experiment")[1:]
    assert len(lines) == 6
    for eta, *cells in lines:
        columns = itertools.product(("20", "50"), ("avg_js", "avg_0s"))
        for (vocab, column), cell in zip(columns, cells, strict=True):
            values = [float(row[column]) for row in rows_of("paper_synthetic", vocab=vocab, eta=eta)]
            assert len(values) == 5
            assert_rounded(cell, statistics.mean(values))


def test_samples() -> None:
    titles, *lines = table_of("results.md", "From random weights, by eta")
    assert [line[0] for line in lines] == list(SAMPLES)
    etas = ["", *(title.removeprefix("eta = ") for title in titles[2:])]
    for name, *cells in lines:
        for eta, cell in zip(etas, cells, strict=True):
            if cell:
                values = [float(row[SAMPLES[name]]) for row in rows_of("compare_eta", eta=eta)]
                assert_rounded(cell, statistics.mean(values))


@pytest.mark.parametrize(
    ("page", "heading", "columns"), [("README.md", "Results", 8), ("results.md", "A pretrained model, by eta", 10)]
)
def test_samples_of_the_pretrained_model(page: str, heading: str, columns: int) -> None:
    """The last table of README.md's section, and the only one of the other's."""
    titles, *lines = tables_of(page, heading)[-1]
    names = {"human": "", "human text": "", "untuned": "not fine-tuned"}
    labels = [names.get(title, title.removeprefix("eta = ")) for title in titles[1:]]
    assert len(labels) == columns
    by_label: dict[str, list[Row]] = {}
    for row in rows_of("finetune_eta"):
        by_label.setdefault(label(row), []).append(row)
    assert set(labels) <= set(by_label)
    assert len(lines) == columns - 4
    for name, *cells in lines:
        for one, cell in zip(labels, cells, strict=True):
            values = [float(row[FINE_TUNED[name]]) for row in by_label[one] if row[FINE_TUNED[name]]]
            assert len(values) == 2 * bool(cell)
            if values:
                assert_rounded(cell, statistics.mean(values))


def test_limits_of_chips() -> None:
    """Of two ways to read the logits twice the page has the second: both times from memory."""
    results = ROOT / "benchmarks" / "results"
    counts, loops = read_csv(results / "kernels.csv"), read_hot_loops_csv(results / "hot_loops.csv")
    found = {(one.count.step, one.count.vocab, one.chip): one.limits for one in modelled(counts, loops, "cuda")}
    titles, *lines = table_of("kernels.md", "What limits them: a model")
    assert len(lines) == 4
    for name, *cells in lines:
        step, _, vocab = name.partition(", V = ")
        for title, chip, cell in zip(titles[1:], CHIPS, cells, strict=True):
            assert chip.name.startswith(title)
            limits = found[step, int(vocab.partition(" ")[0] or 50257), chip]
            for text, value in zip(cell.split(" / "), (limits.memory, limits.issue, limits.special), strict=True):
                assert_rounded(text, value)


def test_machine_instructions() -> None:
    loops = {loop.key: loop for loop in read_hot_loops_csv(ROOT / "benchmarks" / "results" / "hot_loops.csv")}
    _, *lines = table_of("kernels.md", "The machine code of the loops")
    assert len(lines) == 10
    for name, *cells in lines:
        backend, kernel, dtype, option = re.fullmatch(r"(CUDA|Triton) `(\w+)`, (\w+)(?:, (entropy))?", name).groups()
        part = "gradient" if kernel == "logits_grad_kernel" else "statistics"
        variant = ", ".join(filter(None, (option, "V = 50257" * (backend == "Triton"))))
        for target, cell in zip(("sm_80", "sm_90", "sm_100", "sm_120"), cells, strict=True):
            loop = loops[backend.lower(), target, kernel, dtype, variant, part]
            for text, value in zip(cell.split(" / "), (loop.instructions, loop.kinds["special"]), strict=True):
                assert_rounded(text, value / loop.logits)
