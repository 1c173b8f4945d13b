"""The CSV of an experiment that goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from harness.report import Row, cell_text, machine, read_csv, write_csv


class Results:
    """The CSV: complete after each run, so that nothing is lost when a process ends."""

    def __init__(
        self,
        path: Path,
        columns: Iterable[str],
        sizes: Mapping[str, Any],
        key: Callable[[Row], Any],
        anew: bool = False,
    ) -> None:
        """Reads what stands there already.

        Args:
            path: the CSV.
            columns: its columns before those of the machine.
            sizes: columns that are the same in every line, since runs of other sizes cannot be compared.
            key: of a line, what says which run it is of; lines stand in its order.
            anew: whether nothing stays of what stands there.
        """
        self.path = path
        self.rows: list[Row] = [] if anew or not path.exists() else read_csv(path)
        self._columns = tuple(columns)
        self._key = key
        for row in self.rows:
            for name, size in sizes.items():
                if row[name] != str(size):
                    raise SystemExit(
                        f"expected runs with {name} {size} in {path}, got {row[name]}: "
                        "name another folder with --out, or replace them with --anew"
                    )
        # Before the first run, so that the commit is the one whose code runs.
        self._facts = machine(torch.device("cpu"))

    def has(self, run: Any) -> bool:
        """Whether the run stands there: a mapping, or an object with attributes, of what the key is made of."""
        fields = run if isinstance(run, Mapping) else vars(run)
        return self._key(_texts(fields)) in {self._key(row) for row in self.rows}

    def add(self, result: Mapping[str, Any]) -> None:
        """Writes the file anew with this run."""
        ordered = sorted([*self.rows, _texts({**result, **self._facts})], key=self._key)
        unfinished = self.path.with_suffix(".csv.part")
        write_csv(unfinished, ordered, {}, self._columns)
        unfinished.replace(self.path)
        self.rows = read_csv(self.path)


def _texts(fields: Mapping[str, Any]) -> Row:
    """The fields as the CSV has them."""
    return {name: cell_text(value) for name, value in fields.items()}
