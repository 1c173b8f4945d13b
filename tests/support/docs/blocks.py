"""Finds the blocks of Python in a page of the documentation, and runs them.

The blocks of a page run in order in one namespace, to which a set-up gives the names that the page takes for granted.
After each block a check looks at what it left.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from support.paths import BENCHMARKS, EXAMPLES, RELEASE, ROOT, TESTS, python_path

Namespace = dict[str, Any]


class Block(NamedTuple):
    """A block of Python: the line of its first line in the page, from 0, and its text."""

    line: int
    code: str


def path_of(page: str) -> Path:
    return ROOT / page if page == "README.md" else ROOT / "docs" / page


def text_of(page: str) -> str:
    return path_of(page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[Block]:
    """The blocks of Python of a page, in order."""
    text = text_of(page)
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def no_preparation(names: Namespace) -> AbstractContextManager[None]:
    return nullcontext()


class Step(NamedTuple):
    """What belongs to a block.

    Attributes:
        check: looks at the names after the block, and raises where the page is wrong.
        prepare: the context of the block and its check; may set names.
        needs: packages without which the block is skipped.
        interpreted: it runs in a process of its own, with Triton's interpreter.
        skipped: why the block is not executed at all.
    """

    check: Callable[[Namespace], None]
    prepare: Callable[[Namespace], AbstractContextManager[None]] = no_preparation
    needs: tuple[str, ...] = ()
    interpreted: bool = False
    skipped: str = ""

    def missing(self) -> list[str]:
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


class Page(NamedTuple):
    """A page by its file's name, the names it takes for granted, and a step for each of its blocks."""

    name: str
    set_up: Callable[[], Namespace] = dict
    steps: tuple[Step, ...] = ()

    def new_names(self) -> Namespace:
        return {"__name__": self.name, **self.set_up()}


def run_block(page: Page, index: int, names: Namespace) -> None:
    """Executes a block and its check."""
    block, step = blocks_of(page.name)[index], page.steps[index]
    torch.manual_seed(index)
    for value in list(names.values()):
        if isinstance(value, nn.Module):
            value.zero_grad(set_to_none=True)
    with step.prepare(names):
        # Lines are those of the page, in tracebacks and warnings.
        exec(compile("\n" * block.line + block.code, str(path_of(page.name)), "exec", dont_inherit=True), names)
        step.check(names)


class Run:
    """A page's namespace, how many of its blocks are done, and the one that failed."""

    def __init__(self, page: Page) -> None:
        self.page, self.names, self.done = page, page.new_names(), 0
        self.failure: tuple[int, BaseException] | None = None

    def until(self, index: int) -> None:
        """Runs the blocks up to this one that are yet to run and can; raises what this or an earlier one raised."""
        while self.done <= index and self.failure is None:
            step, current = self.page.steps[self.done], self.done
            self.done += 1
            if step.interpreted or step.skipped or step.missing():
                continue
            try:
                run_block(self.page, current, self.names)
            except BaseException as error:
                self.failure = current, error
                raise
        if self.failure is not None:
            failed, error = self.failure
            if failed == index:
                raise error
            if failed < index:
                raise RuntimeError(f"block {failed} of {self.page.name} failed") from error


run_of = functools.cache(Run)


@functools.cache
def interpreted_blocks_of(page: Page) -> tuple[list[int], str]:
    """The interpreted blocks of a page that passed, and what became of the first that did not."""
    path = python_path(BENCHMARKS, EXAMPLES, RELEASE)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "support.docs.pages", page.name]
    ran = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=120)
    last = ran.stdout.strip().splitlines()[-1:]
    return (json.loads(last[0]) if last else []), ran.stderr


def run_interpreted_blocks(page: Page) -> None:
    """In this process; prints the numbers of those that passed as its last line."""
    names = page.new_names()
    passed: list[int] = []
    try:
        for index, step in enumerate(page.steps):
            if step.interpreted and not step.missing():
                run_block(page, index, names)
                passed.append(index)
    except Exception:
        traceback.print_exc()
    print("\n" + json.dumps(passed))
