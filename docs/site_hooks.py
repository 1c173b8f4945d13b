"""Hooks of mkdocs: the plots of benchmarks/results, which pages show as `../benchmarks/results/NAME.png`.

That path is right on a code host. In the site the plots stand beside the pages, in benchmarks/results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "benchmarks/results"


def on_files(files: Any, config: Any) -> None:
    """Adds the plots to the files of the site."""
    for plot in sorted((ROOT / FOLDER).glob("*.png")):
        files.append(File.generated(config, f"{FOLDER}/{plot.name}", abs_src_path=str(plot)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page, whose plots are where `on_files` puts them."""
    return markdown.replace(f"](../{FOLDER}/", f"]({FOLDER}/")
