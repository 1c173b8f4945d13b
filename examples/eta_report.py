"""Table, conclusions and plot of a comparison of etas, from its CSV alone.

    python examples/eta_report.py benchmarks/results/compare_eta.csv

writes, next to the CSV, its table in Markdown and its plot.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt

from eta_results import ALL_METRICS, Row, etas_of, metrics_of, read_csv, values_of

# The plot's panels, row by row.
PANELS = (
    ("perplexity", "own_perplexity", "accuracy", "mean_q", "entropy"),
    ("distinct_1", "distinct_2", "distinct_3", "distinct_4", "diversity"),
    ("repetition_1", "repetition_2", "repetition_3", "repetition_4", "mauve"),
)
START = """\
Mean and sample standard deviation over the seeds. Of one seed, all etas start from the same random weights and see the
same batches."""
LEGEND = """\
Samples are drawn at temperature 1 from the whole distribution, after prompts of held-out text; human text is what
follows the same prompts there, in as many tokens. Distinct: unique n-grams over all n-grams of all sequences. Repeated:
n-grams that occurred before in the same sequence (seq-rep-n). Nearest to human text is best, not most. The perplexity
of own samples is under the model that drew them: that of a model which knows the text's distribution is its held-out
perplexity, that of one which is too sure of itself is lower. No count says whether a text makes sense, and whatever
sharpens a model lowers its diversity."""


def _mean_text(values: list[float], digits: int) -> str:
    if not values:
        return ""
    # A perplexity that has exploded has no digits worth a column's width.
    form = ".2g" if max(values) >= 1e6 else f".{digits}f"
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def named(eta: str) -> str:
    """A column's models: of an eta, or what stands in an eta's place in words."""
    return f"eta = {eta}" if is_eta(eta) else eta


def is_eta(name: str) -> bool:
    """Whether this is an eta, and not words in an eta's place."""
    return name[:1].isdigit()


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def _cells(rows: list[Row]) -> list[list[str]]:
    """The table, its titles first: a line for each metric, a column for human text and each eta."""
    etas = etas_of(rows)
    body = [["", "human text", *map(named, etas)]]
    for name, metric in metrics_of(rows).items():
        body.append([metric.title, *(_mean_text(values_of(rows, eta, name), metric.digits) for eta in ("", *etas))])
    return body


def table(rows: list[Row]) -> str:
    """The comparison side by side, for a terminal."""
    body = _cells(rows)
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in body)


def markdown(rows: list[Row]) -> str:
    """The comparison in Markdown: machine and settings, the table, the meaning of its lines, and conclusions."""
    return document(rows, _made_with(rows[0]), _settings(rows), START)


def document(rows: list[Row], made_with: str, settings: str, start: str) -> str:
    """Likewise of a comparison with another machine's line, settings and start."""
    titles, *body = _cells(rows)
    lines = [made_with, "", settings, "", f"| | {' | '.join(titles[1:])} |"]
    lines.append("|---|" + "---:|" * (len(titles) - 1))
    lines += [f"| {' | '.join(line)} |" for line in body]
    lines += ["", start, "", LEGEND, "", *(f"- {sentence}" for sentence in conclusions(rows)), ""]
    return "\n".join(lines)


def _made_with(row: Row) -> str:
    where = row["cpu"] if row["device"] == "cpu" else f"{row['device']}, {row['cpu']}"
    versions = ", ".join(f"{name} {row[name]}" for name in ("mixce_kernels", "torch", "python"))
    commit = f", commit {row['commit']}" if row["commit"] else ""
    return f"{where}; {versions}{commit}; {row['date']}."


def _settings(rows: list[Row]) -> str:
    row = rows[0]
    seeds = list(dict.fromkeys(one["seed"] for one in rows))
    length = int(row["block_size"]) - int(row["prompt_tokens"])
    weighting = row.get("weighting", "Probability()")
    weighted = "" if weighting == "Probability()" else f" with the weighting {weighting}"
    return (
        f"{row['text']}: {int(row['train_tokens']):,} training and {int(row['held_out_tokens']):,} held-out tokens, "
        f"vocabulary of {int(row['vocab_size']):,}. GPT of {row['layers']} layers, width {row['width']}, "
        f"{row['heads']} heads; {row['steps']} steps of {row['batch_size']} x {row['block_size']} tokens, loss "
        f"{row['loss']}{weighted}, learning rate {row['lr']}, {row['dtype']}, seeds {', '.join(seeds)}. "
        f"{row['samples']} samples of {length} tokens after prompts of {row['prompt_tokens']}: "
        f"{int(row['samples']) * length:,} tokens."
    )


def conclusions(rows: list[Row]) -> list[str]:
    """Sentences about the numbers: the best eta by each metric, with how many seeds, and a count over all metrics."""
    etas = etas_of(rows)
    seeds = len(values_of(rows, etas[0], "entropy"))
    sentences = []
    nearest: Counter[str] = Counter()
    beats_one = 0
    for name, metric in metrics_of(rows).items():
        if not metric.best:
            continue
        losses = {eta: _losses(rows, eta, name) for eta in etas}
        means = {eta: statistics.mean(losses[eta]) for eta in etas}
        ranked = sorted(etas, key=means.__getitem__)
        sentences.append(_sentence(name, ranked, losses, rows))
        if metric.best == "human" and list(means.values()).count(means[ranked[0]]) == 1:
            nearest[ranked[0]] += 1
            beats_one += is_eta(ranked[0]) and "1" in ranked[1:] and _wins(losses[ranked[0]], losses["1"]) == seeds
    sentences.append(_sureness(rows, etas))
    measures = sum(metric.best == "human" for metric in metrics_of(rows).values())
    counted = ", ".join(f"{named(eta)} in {nearest[eta]}" for eta in etas)
    shared = f", and several alike in {measures - nearest.total()}" if nearest.total() < measures else ""
    sentences.append(f"Of {measures} measures of the samples, nearest to human text is {counted}{shared}.")
    if "1" in etas and len(etas) > 1:
        sentences.append(
            f"In {beats_one} of {measures} it is a smaller eta, and nearer than eta = 1 with each of {_seeds(seeds)}."
        )
    return sentences


def _sureness(rows: list[Row], etas: list[str]) -> str:
    ratios = {
        eta: [
            own / held_out
            for own, held_out in zip(
                values_of(rows, eta, "own_perplexity"), values_of(rows, eta, "perplexity"), strict=True
            )
        ]
        for eta in etas
    }
    nearest = min(etas, key=lambda eta: statistics.mean(abs(math.log(ratio)) for ratio in ratios[eta]))
    listed = ", ".join(f"{_mean_text(ratios[eta], 2)} for {named(eta)}" for eta in etas)
    return f"Perplexity of own samples over held-out perplexity: {listed}; nearest to 1 is {named(nearest)}."


def _losses(rows: list[Row], eta: str, name: str) -> list[float]:
    """With each seed, how far an eta is from the best: from the human text of the same prompts, or from 0."""
    values = values_of(rows, eta, name)
    if ALL_METRICS[name].best == "human":
        return [abs(value - human) for value, human in zip(values, values_of(rows, "", name), strict=True)]
    return values if ALL_METRICS[name].best == "low" else [-value for value in values]


def _wins(one: list[float], other: list[float]) -> int:
    return sum(mine < theirs for mine, theirs in zip(one, other, strict=True))


def _sentence(name: str, ranked: list[str], losses: dict[str, list[float]], rows: list[Row]) -> str:
    metric = ALL_METRICS[name]

    def says(eta: str) -> str:
        value = _mean_text(values_of(rows, eta, name), metric.digits)
        distance = f", off by {_mean_text(losses[eta], metric.digits)}" if metric.best == "human" else ""
        return f"{named(eta)} ({value}{distance})"

    human = _mean_text(values_of(rows, "", name), metric.digits)
    aim = {"human": f"nearest to human text ({human})", "low": "lowest", "high": "highest"}[metric.best]
    first, *others = ranked
    sentence = f"{metric.title[0].upper()}{metric.title[1:]}: {aim} is {says(first)}"
    if others:
        seeds = len(losses[first])
        won = _wins(losses[first], losses[others[0]])
        tied = statistics.mean(losses[first]) == statistics.mean(losses[others[0]])
        sentence += f", {'as good is' if tied else 'then'} {says(others[0])}"
        sentence += f"; the first is ahead of the second with {won} of {_seeds(seeds)}"
        if "1" in others[1:]:
            sentence += f", and of {says('1')} with {_wins(losses[first], losses['1'])} of {seeds}"
    return f"{sentence}."


def report(path: Path) -> list[Path]:
    """Writes table and plot of the CSV at `path` next to it; returns all three files."""
    rows = read_csv(path)
    table_path, plot_path = path.with_suffix(".md"), path.with_suffix(".png")
    table_path.write_text(markdown(rows), encoding="utf-8")
    plot(rows, plot_path, _settings(rows))
    return [path, table_path, plot_path]


def plot(rows: list[Row], path: Path, settings: str) -> None:
    """Draws each metric against eta, with human text as a line."""
    etas = etas_of(rows)
    figure, axes = plt.subplots(len(PANELS), 5, figsize=(16, 8.5), layout="constrained")
    figure.suptitle(
        f"Models trained with eta, and human text (dashed): mean and deviation over seeds (dots). {settings}",
        fontsize=9,
        wrap=True,
    )
    panels = [[name for name in names if name in metrics_of(rows)] for names in PANELS]
    long = max(map(len, etas)) > 4
    for names, row_axes in zip(panels, axes, strict=True):
        for axis in row_axes[len(names) :]:
            axis.remove()
        for name, axis in zip(names, row_axes, strict=False):
            values = [values_of(rows, eta, name) for eta in etas]
            for position, points in enumerate(values):
                axis.plot([position] * len(points), points, ".", color="#9a9a9a")
            means = [statistics.mean(points) for points in values]
            deviations = [statistics.stdev(points) if len(points) > 1 else 0.0 for points in values]
            axis.errorbar(range(len(etas)), means, deviations, fmt="o-", color="#1f77b4", capsize=3)
            human = values_of(rows, "", name)
            if human:
                axis.axhline(statistics.mean(human), color="#b5493f", linestyle="--")
                axis.axhspan(min(human), max(human), color="#b5493f", alpha=0.15)
            axis.set_xticks(range(len(etas)), etas, rotation=40 * long, ha="right" if long else "center")
            axis.set_xlabel("eta", fontsize=8)
            axis.tick_params(labelsize=8, which="both")
            axis.set_title(ALL_METRICS[name].title, fontsize=9)
            if "perplexity" in name:
                axis.set_yscale("log")
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    print(*report(Path(sys.argv[1])), sep="\n")
