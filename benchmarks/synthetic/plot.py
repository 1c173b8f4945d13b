"""Plot of the synthetic experiment, from its CSV alone.

    python -m synthetic.plot results/paper_synthetic.csv

writes, next to the CSV, `paper_synthetic.png`: both metrics against eta, one column for each vocabulary.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, stdev

from harness.plot import machine_name, pyplot, save
from harness.report import read_csv
from synthetic.report import LIKELIHOOD, METRICS, vocabularies

COLOURS = {"avg_js": "#1f77b4", "avg_0s": "#c0563f"}


def synthetic_plot(path: Path) -> Path:
    """Draws the plot of the CSV at `path`, and returns what was written."""
    rows = read_csv(path)
    panels = [one for one in vocabularies(rows) if one.seeds]
    plt = pyplot()
    columns = max(len(panels), 1)
    figure, axes = plt.subplots(len(METRICS), columns, figsize=(max(3.2 * columns, 5.4), 5.4), squeeze=False)
    for line, (metric, name) in zip(axes, METRICS.items(), strict=True):
        for axis, one in zip(line, panels, strict=False):
            places = range(len(one.etas))
            values = [one.values(eta, metric) for eta in one.etas]
            for place, of_eta in zip(places, values, strict=True):
                axis.plot([place] * len(of_eta), of_eta, ".", color=COLOURS[metric], alpha=0.35, markersize=5)
            spread = [stdev(of_eta) if len(of_eta) > 1 else 0.0 for of_eta in values]
            means = [mean(of_eta) for of_eta in values]
            # On a logarithmic axis, a bar down to 0 or below has no end: it is drawn to the least seed.
            down = [middle - max(middle - one_spread, min(of_eta))
                    for middle, one_spread, of_eta in zip(means, spread, values, strict=True)]  # fmt: skip
            axis.errorbar(places, means, [down, spread], marker="o", markersize=4, capsize=3, color=COLOURS[metric])
            if LIKELIHOOD in one.etas:
                axis.axhline(mean(one.values(LIKELIHOOD, metric)), color="#7a7a7a", linewidth=0.8, linestyle="--")
            axis.set_yscale("log")
            axis.set_xticks(places, [f"{eta:g}" for eta in one.etas], fontsize=7)
            axis.tick_params(which="both", labelsize=7)
            axis.set_xlabel("eta", fontsize=8)
            axis.set_ylabel(name, fontsize=8)
            plural = "s" * (len(one.seeds) != 1)
            axis.set_title(f"n = {one.n}, {len(one.seeds)} seed{plural}", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    title = "Learned against true transition matrix: mean, deviation and seeds; dashed: maximum likelihood"
    figure.suptitle(f"{title}\n({machine_name(rows[0])})", fontsize=8)
    return save(figure, path.with_name("paper_synthetic.png"))


if __name__ == "__main__":
    print(synthetic_plot(Path(sys.argv[1])))
