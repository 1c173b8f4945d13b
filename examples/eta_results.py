"""The measurements of a comparison of etas, with machine and versions, as lines of a CSV."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mixce_kernels

Row = dict[str, str]


class Metric(NamedTuple):
    """How a column is shown, and its best value: "human" (nearest to human text), "low", "high", or "" for none."""

    title: str
    digits: int
    best: str


METRICS = {
    "perplexity": Metric("held-out perplexity", 1, "low"),
    "own_perplexity": Metric("perplexity of own samples", 1, ""),
    "accuracy": Metric("held-out top-1 accuracy", 3, "high"),
    "mean_q": Metric("held-out mean q", 3, "high"),
    "entropy": Metric("entropy of token frequencies, bits", 2, "human"),
    **{f"distinct_{n}": Metric(f"distinct {n}-grams", 3, "human") for n in (1, 2, 3, 4)},
    **{f"repetition_{n}": Metric(f"repeated {n}-grams", 3, "human") for n in (1, 2, 3, 4)},
}
# What is measured where a pretrained model can judge texts: benchmarks/finetune_eta.py.
MORE_METRICS = {
    "diversity": Metric("diversity, the mean of distinct n-grams", 3, "human"),
    "mauve": Metric("MAUVE", 3, "high"),
}
ALL_METRICS = {**METRICS, **MORE_METRICS}
KEY = ("source", "eta", "seed")


def facts(device: str) -> dict[str, str]:
    """The machine and the versions of a run."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mixce_kernels": mixce_kernels.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _commit() -> str:
    """The commit of the checkout, marked where its examples or its package differ; nothing outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    folders = [name for name in ("examples", "mixce_kernels", "csrc") if (root / name).exists()]
    git = ("git", "-C", str(root))
    try:
        head = subprocess.run((*git, "rev-parse", "--short", "HEAD"), capture_output=True, text=True, check=True)
        changed = subprocess.run(
            (*git, "status", "--porcelain", "--", *folders), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def write_csv(path: Path, rows: list[dict[str, Any]], common: dict[str, Any]) -> None:
    """Writes one line for each model and for each seed's human text; settings and facts stand on every line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*KEY, *metrics_of(rows), *common])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in {**row, **common}.items()})


def read_csv(path: Path) -> list[Row]:
    """The lines of a CSV of `write_csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def metrics_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """Those that were measured."""
    return {name: metric for name, metric in ALL_METRICS.items() if any(name in row for row in rows)}


def etas_of(rows: list[Row]) -> list[str]:
    """The etas in the order of the run."""
    return list(dict.fromkeys(row["eta"] for row in rows if row["source"] != "human"))


def values_of(rows: list[Row], eta: str, metric: str) -> list[float]:
    """A metric with each seed, of the models of an eta, or of human text for an eta of ""; none if not measured."""
    return [float(row[metric]) for row in rows if row["eta"] == eta and row[metric]]
