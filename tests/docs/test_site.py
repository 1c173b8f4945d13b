"""The documentation's site builds as it is configured, and would not with a broken link."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mixce_kernels
from conftest import EMULATED
from support.paths import ROOT

pytestmark = pytest.mark.skipif(EMULATED is not None, reason="documents are tried natively")


def build_site(configuration: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict`, where nothing can be fetched."""
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers"):
        pytest.importorskip(package)
    nowhere = "http://127.0.0.1:9"
    proxies = {"http_proxy": nowhere, "https_proxy": nowhere, "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere}
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", configuration, "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, **proxies, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_site_builds(tmp_path: Path) -> None:
    built = build_site(ROOT / "mkdocs.yml", tmp_path / "site")
    assert built.returncode == 0, built.stderr
    for page in (ROOT / "docs").glob("*.md"):
        html = (tmp_path / "site" / f"{page.stem}.html").read_text(encoding="utf-8")
        # Links lead elsewhere; nothing is loaded from there.
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//", html)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|preload|icon)[^>]*(?:https?:)?//", html)
        assert not loaded, page.name
        images = re.findall(r"<img[^>]*\ssrc=\"?([^\s\">]+)", html)
        assert len(images) == len(re.findall(r"^!\[", page.read_text(encoding="utf-8"), re.MULTILINE)), page.name
        assert not [image for image in images if not (tmp_path / "site" / image).is_file()], page.name
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    for name in mixce_kernels.__all__:
        assert f'id="mixce_kernels.{name}"' in reference, name


def test_site_does_not_build_with_a_broken_link(tmp_path: Path) -> None:
    """The configuration's own, so that the test above can fail."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[there](nowhere.md), [here](index.md#nowhere)\n", encoding="utf-8")
    configuration = tmp_path / "mkdocs.yml"
    lines = [f"INHERIT: {ROOT / 'mkdocs.yml'}", "docs_dir: docs", "hooks: []", "nav: [index.md]", "plugins: [search]"]
    configuration.write_text("\n".join(lines) + "\n", encoding="utf-8")
    built = build_site(configuration, tmp_path / "site")
    assert built.returncode != 0
    assert "nowhere.md" in built.stderr
    assert "#nowhere" in built.stderr
