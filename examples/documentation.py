"""The English text inside every Python: real prose to train a language model on, without a download."""

from __future__ import annotations

import ast
import pydoc_data.topics
import random
import sysconfig
from pathlib import Path


def python_documentation() -> str:
    """The documentation that ships with this Python, as one text of shuffled passages."""
    passages = list(pydoc_data.topics.topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "pydoc_data"}.isdisjoint(path.relative_to(library).parts):
            passages += docstrings(path)
    passages = list(dict.fromkeys(passages))
    # Shuffled, so that the end of the text, which is held out, is of the same kind as the rest.
    random.Random(0).shuffle(passages)
    return "\n\n".join(passages)


def docstrings(path: Path) -> list[str]:
    """The docstrings of a source file; none where it is no valid Python (the library has such files, for its tools)."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in found if text]
