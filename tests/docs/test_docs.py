"""README.md and the pages in docs/: every block of Python runs and does what its page says."""

from __future__ import annotations

import re

import pytest

from conftest import EMULATED
from support.docs.blocks import blocks_of, interpreted_blocks_of, run_of, text_of
from support.docs.pages import PAGES
from support.paths import ROOT, TESTS

pytestmark = pytest.mark.skipif(EMULATED is not None, reason="documents are tried natively")

# Pages whose blocks another test executes, and which: a page is here or among PAGES.
ELSEWHERE = {"data_parallel.md": "docs/test_data_parallel.py"}


def test_every_page_and_block_has_a_step() -> None:
    pages = {"README.md", *(path.name for path in (ROOT / "docs").glob("*.md"))}
    assert pages == PAGES.keys() | ELSEWHERE.keys()
    assert not PAGES.keys() & ELSEWHERE.keys()
    assert not list((ROOT / "docs").glob("*/**/*.md")), "pages in folders are not looked at"
    for name, page in PAGES.items():
        assert len(page.steps) == len(blocks_of(name)), name
    for name, test in ELSEWHERE.items():
        assert f'"{name}"' in (TESTS / test).read_text(encoding="utf-8")
        assert blocks_of(name)
    for name in pages:
        # No other spelling of a block of Python goes by unseen.
        fences = re.findall(r"^\s*(?:```|~~~)(\S*)", text_of(name), re.MULTILINE)
        assert set(fences[::2]) <= {"python", "sh"}, name
        assert set(fences[1::2]) <= {""}, name


@pytest.mark.parametrize(
    ("name", "index"),
    [
        pytest.param(name, index, id=f"{name}-{index}")
        for name, page in PAGES.items()
        for index in range(len(page.steps))
    ],
)
def test_block(name: str, index: int, one_thread: None) -> None:
    page = PAGES[name]
    step = page.steps[index]
    if step.skipped:
        compile(blocks_of(name)[index].code, name, "exec")
        pytest.skip(step.skipped)
    if missing := step.missing():
        pytest.skip(f"needs {', '.join(missing)}")
    if step.interpreted:
        passed, errors = interpreted_blocks_of(page)
        assert index in passed, errors
    else:
        run_of(page).until(index)
