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


def test_readme_is_short() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 180
    assert not [line for line in lines if len(line) > 120]


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", text_of("README.md"))
    assert links
    assert not [link for link in links if not (ROOT / link).is_file()]


def test_contributing_names_files_that_exist() -> None:
    """Code spans with a slash or a suffix: `{a,b}.py` is two files, and a bare name may be one of the results."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    spans = re.findall(r"`([\w./{},*-]+)`", text)
    paths = [span for span in spans if "/" in span or re.search(r"\.(py|h|cpp|cuh?|csv|md|png|toml)$", span)]
    assert len(paths) > 50
    missing = []
    for path in paths:
        braces = re.fullmatch(r"(.*)\{(.*)\}(.*)", path)
        names = [f"{braces[1]}{name}{braces[3]}" for name in braces[2].split(",")] if braces else [path]
        folders = (ROOT, ROOT / "benchmarks" / "results") if "/" not in path else (ROOT,)
        missing += [name for name in names if not any(list(folder.glob(name.rstrip("/"))) for folder in folders)]
    assert not missing


def test_pre_commit_runs_the_commands_of_make_lint() -> None:
    yaml = pytest.importorskip("yaml", reason="mkdocs, of the extra 'docs', brings it")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^lint: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    commands = [line.strip().partition(" $$(find")[0] for line in recipe.splitlines()]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"].replace(".venv/bin/", "$(BIN)/") for hook in repository["hooks"]]
    assert entries == commands
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}


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
