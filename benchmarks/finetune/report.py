"""Table, sentences and plot of the comparison, from its CSV alone.

    python benchmarks/finetune_eta.py

writes them with the CSV, also where nothing is left to run.
"""

from __future__ import annotations

from pathlib import Path

from eta_report import document, plot
from eta_report import table as table_of
from eta_results import ALL_METRICS
from finetune.plan import SIZES, label
from harness.report import Row, machine_line, read_csv

COLUMNS = (
    *("source", "eta", "weighting", "seed"),
    *ALL_METRICS,
    *("seconds", "model", *SIZES, "dtype", "train_tokens", "held_out_tokens"),
)
START = """\
Mean and sample standard deviation over the seeds. All losses start from the same pretrained weights; of one seed, they
see the same batches and their samples follow the same prompts. "Power" is eta = 0 with q^0.5 in the place of q,
"Entropy" is EAFT's weight, H / 3, in its place. The text may have been among what the model was pretrained on. MAUVE
compares prompts with their continuations to human text by the hidden states of the pretrained model, in a tenth as many
clusters as there are samples; that of human text is of other held-out human text. With so few samples it is noisy."""


def labelled(rows: list[Row]) -> list[Row]:
    """The lines with their labels in the place of eta, and only the seeds of which every line is there."""
    labels = [(label(row), row["seed"]) for row in rows]
    names = {name for name, _ in labels}
    whole = {seed for _, seed in labels if all((name, seed) in labels for name in names)}
    return [{**row, "eta": name} for row, (name, seed) in zip(rows, labels, strict=True) if seed in whole]


def table(rows: list[Row]) -> str:
    """The comparison side by side, for a terminal."""
    return table_of(labelled(rows))


def report(path: Path) -> list[Path]:
    """Writes table and plot of the CSV at `path` next to it; returns all three files."""
    rows = labelled(read_csv(path))
    table_path, plot_path = path.with_suffix(".md"), path.with_suffix(".png")
    table_path.write_text(summary(rows), encoding="utf-8")
    plot(rows, plot_path, settings(rows))
    return [path, table_path, plot_path]


def summary(rows: list[Row]) -> str:
    """The comparison in Markdown, of labelled lines."""
    return document(rows, machine_line(rows[0]), settings(rows), START)


def settings(rows: list[Row]) -> str:
    """Model, text and sizes of a run."""
    row = rows[0]
    seeds = ", ".join(dict.fromkeys(one["seed"] for one in rows))
    length = int(row["block_size"]) - int(row["prompt_tokens"])
    return (
        f"{row['model']}, fine-tuned in {row['dtype']} by {row['steps']} steps of {row['batch_size']} x "
        f"{row['block_size']} tokens of Python's documentation, learning rate {row['lr']}, seeds {seeds}; "
        f"{int(row['train_tokens']):,} training and {int(row['held_out_tokens']):,} held-out tokens. "
        f"{row['samples']} samples of {length} tokens after prompts of {row['prompt_tokens']}: "
        f"{int(row['samples']) * length:,} tokens."
    )
