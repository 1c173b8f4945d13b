"""From runs of the synthetic experiment to tables and sentences: all of them computed from the CSV's rows."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, stdev

from harness.report import MACHINE, Row, groups, machine_line, text_table
from synthetic.data import transition_matrix
from synthetic.metrics import optimum_js

# What one run is of, with what sizes, then its results.
KEY = ("vocab", "eta", "seed")
SIZES = ("sequences", "held_out", "max_length", "max_epochs")
RESULTS = ("epochs", "best_epoch", "held_out_loss", "avg_js", "avg_0s", "seconds")
COLUMNS = (*KEY, *SIZES, *RESULTS)

# The paper's grid and sizes.
VOCABULARIES = (20, 50, 100, 500, 1000)
ETAS = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
SEEDS = (7, 42, 777, 4222, 99999)
PAPER_SIZES = {"sequences": 50_000, "held_out": 5_000, "max_length": 500, "max_epochs": 50}

METRICS = {"avg_js": "avg. js", "avg_0s": "avg. 0s"}
LIKELIHOOD = 1.0

WHAT_IS_MEASURED = """\
avg. js: the squared Jensen-Shannon distance of the rows of the learned and the true transition matrix, in nats, mean
over the rows. avg. 0s: the mean learned probability where the true one is 0. Both of the epoch with the least held-out
loss, mean ± standard deviation over the seeds; less is better. eta = 1 is maximum likelihood; "js less" and "0s less"
count the seeds in which an eta's number is less than that of eta = 1, with the same data, initial weights, order and
dropout.

"js of optimum" is what the loss asks for: the avg. js where its expected gradient is 0, of a model without limits and
data without end, mean over the seeds' matrices. Because q is a constant to the gradient, the optimum is the true matrix
for eta = 1 alone; for eta < 1 the likely symbols of a row become likelier than they are. At eta = 0 each single symbol
is an optimum.

The held-out loss has the eta of training. For eta < 1 its value is not what training descends, because q is a constant
to the gradient: it can rise while the matrix is still getting better, and then an early epoch is selected."""


@dataclass(frozen=True)
class Vocabulary:
    """The runs with n symbols: of each eta and seed, its row. All numbers are of the seeds that every eta has."""

    n: int
    rows: dict[tuple[float, int], Row]

    @property
    def etas(self) -> list[float]:
        return sorted({eta for eta, _ in self.rows})

    @property
    def seeds(self) -> list[int]:
        return [seed for seed in self.every_seed if all((eta, seed) in self.rows for eta in self.etas)]

    @property
    def every_seed(self) -> list[int]:
        return list(dict.fromkeys(seed for _, seed in self.rows))

    @property
    def best(self) -> float:
        """The eta with the least mean of avg. js, as the paper picks it."""
        return min(self.etas, key=lambda eta: mean(self.values(eta, "avg_js")))

    def values(self, eta: float, metric: str) -> list[float]:
        """The metric of each seed."""
        return [float(self.rows[eta, seed][metric]) for seed in self.seeds]

    def optimum(self, eta: float) -> float:
        """The mean over the seeds of the avg. js that the loss asks for."""
        return mean(optimum_js(transition_matrix(self.n, seed), eta) for seed in self.seeds)

    def less(self, eta: float, metric: str) -> int | None:
        """In how many seeds the metric is less than that of maximum likelihood; None without that."""
        if LIKELIHOOD not in self.etas:
            return None
        return sum(a < b for a, b in zip(self.values(eta, metric), self.values(LIKELIHOOD, metric), strict=True))

    def more(self, eta: float, metric: str) -> int:
        """In how many seeds it is more."""
        return sum(a > b for a, b in zip(self.values(eta, metric), self.values(LIKELIHOOD, metric), strict=True))


def vocabularies(rows: list[Row]) -> list[Vocabulary]:
    """The rows of a CSV by their vocabulary."""
    return [
        Vocabulary(int(n), {(float(row["eta"]), int(row["seed"])): row for row in members})
        for (n,), members in groups(rows, ("vocab",)).items()
    ]


def synthetic_table(rows: list[Row]) -> str:
    """For reading on a terminal."""
    blocks = []
    for one in vocabularies(rows):
        body = _cells(one)
        blocks.append(
            "\n".join(["", _title(one), *([text_table([_titles(), *body])] if body else []), *sentences(one)])
        )
    return "\n".join([*blocks, "", *missing(rows)])


def synthetic_summary(rows: list[Row]) -> str:
    """The experiment in Markdown."""
    lines = [machine_line(members[0]) for members in groups(rows, MACHINE[:-1]).values()]
    lines += ["", WHAT_IS_MEASURED, "", *missing(rows)]
    for one in vocabularies(rows):
        lines += ["", f"**{_title(one)}**", ""]
        body = _cells(one)
        if body:
            lines += [f"| {' | '.join(_titles())} |", "|---" + "|---:" * (len(_titles()) - 1) + "|"]
            lines += [f"| {' | '.join(cells)} |" for cells in body] + [""]
        lines += [f"- {sentence}" for sentence in sentences(one)]
    return "\n".join([*lines, ""])


def missing(rows: list[Row]) -> list[str]:
    """What of the paper's grid was not run, and where sizes are not the paper's."""
    have = {(int(row["vocab"]), float(row["eta"]), int(row["seed"])) for row in rows}
    lines = []
    whole = len(ETAS) * len(SEEDS)
    counts = {n: sum((n, eta, seed) in have for eta in ETAS for seed in SEEDS) for n in VOCABULARIES}
    absent = [str(n) for n, count in counts.items() if count == 0]
    if absent:
        lines.append(f"Not run, of the paper's vocabularies: n = {', '.join(absent)}.")
    lines += [f"Run, of n = {n}: {count} of {whole} models." for n, count in counts.items() if 0 < count < whole]
    for name, size in PAPER_SIZES.items():
        found = sorted({int(row[name]) for row in rows} - {size})
        if found:
            lines.append(f"Not the paper's {name}: {', '.join(map(str, found))} instead of {size}.")
    return lines


def sentences(one: Vocabulary) -> list[str]:
    """What the numbers say, of each metric against maximum likelihood."""
    lines = []
    rest = [str(seed) for seed in one.every_seed if seed not in one.seeds]
    if rest:
        lines.append(f"Left out, because not every eta was run: seed {', '.join(rest)}.")
    if not one.seeds:
        return lines
    others = [eta for eta in one.etas if eta != LIKELIHOOD]
    if LIKELIHOOD in one.etas and others:
        lines.append(_best(one))
        lines += [_verdicts(one, metric, others) for metric in METRICS]
    longest = [one.rows[eta, seed] for eta in one.etas for seed in one.seeds]
    unfinished = sum(row["best_epoch"] == row["max_epochs"] for row in longest)
    lines.append(f"In {unfinished} of {len(longest)} runs the last epoch allowed was the best: more might have helped.")
    return lines


def _best(one: Vocabulary) -> str:
    likelihood = mean(one.values(LIKELIHOOD, "avg_js"))
    if one.best == LIKELIHOOD:
        return f"By avg. js the best eta is 1: MixCE does not beat maximum likelihood ({likelihood:.3g}) with any eta."
    found = mean(one.values(one.best, "avg_js"))
    return (
        f"By avg. js the best eta is {one.best:g}: {found:.3g} against {likelihood:.3g} of maximum likelihood, "
        f"{100 * (1 - found / likelihood):.2g} % less, and less in {one.less(one.best, 'avg_js')} of "
        f"{_count(one.seeds)}. It is picked by the true matrix, on these seeds, as in the paper: that flatters it."
    )


def _verdicts(one: Vocabulary, metric: str, etas: list[float]) -> str:
    """Of which etas all seeds say that the metric is less, or more, than that of maximum likelihood."""
    count = len(one.seeds)
    less = [f"{eta:g}" for eta in etas if one.less(eta, metric) == count]
    more = [f"{eta:g}" for eta in etas if one.more(eta, metric) == count]
    mixed = [f"{eta:g}" for eta in etas if f"{eta:g}" not in (*less, *more)]
    parts = [
        f"less in every seed with eta {', '.join(less)}" if less else "less in every seed with no eta",
        f"more in every seed with eta {', '.join(more)}" if more else "more in every seed with no eta",
        *([f"the seeds disagree at eta {', '.join(mixed)}"] if mixed else []),
    ]
    return f"{METRICS[metric]} against maximum likelihood: {'; '.join(parts)}."


def _titles() -> tuple[str, ...]:
    return ("eta", *METRICS.values(), "seeds", "js less", "0s less", "js of optimum", "best epoch")


def _cells(one: Vocabulary) -> list[tuple[str, ...]]:
    """The table's lines, one for each eta."""
    body = []
    for eta in one.etas if one.seeds else ():
        counts = ["" if eta == LIKELIHOOD else str(one.less(eta, metric) or 0) for metric in METRICS]
        if LIKELIHOOD not in one.etas:
            counts = [""] * len(METRICS)
        name = f"{eta:g}" + (" (best)" if eta == one.best else "")
        numbers = [_spread(one.values(eta, metric)) for metric in METRICS]
        epoch = f"{mean(one.values(eta, 'best_epoch')):.3g}"
        optimum = f"{round(one.optimum(eta), 12):.3g}" if eta > 0 else ""
        body.append((name, *numbers, str(len(one.seeds)), *counts, optimum, epoch))
    return body


def _spread(values: list[float]) -> str:
    deviation = f" ± {stdev(values):.1g}" if len(values) > 1 else ""
    return f"{mean(values):.3g}{deviation}"


def _title(one: Vocabulary) -> str:
    return f"n = {one.n}, {_count(one.seeds)}"


def _count(seeds: list[int]) -> str:
    return f"{len(seeds)} seed{'s' * (len(seeds) != 1)}"
