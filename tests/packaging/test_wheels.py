"""Wheels as a release has them, and CUDA kernels compiled by what PyPI has, with no nvcc on the PATH."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from support.paths import RELEASE
from support.trees import copy_sources

pytest.importorskip("auditwheel", reason="needs the extra 'wheels'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="manylinux wheels are for Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
BUILD_WHEELS = RELEASE / "build_wheels.py"


def without_nvcc() -> dict[str, str]:
    """The environment but for every folder of the PATH with an nvcc."""
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if not (Path(folder) / "nvcc").exists())
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_HOME"}
    # One architecture: the compiler takes its time.
    return environment | {"PATH": path, "MIXCE_CUDA_ARCHS": "80"}


def run(*command: str | Path, cwd: Path, returncode: int = 0, **environment: str) -> str:
    """What the command says on stdout and stderr, where no nvcc is on the PATH."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=without_nvcc() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == returncode, done.stdout
    return done.stdout


def test_pip_brings_the_compiler_of_cuda_kernels(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path)
    run(*pip, tree, cwd=tmp_path, MIXCE_BUILD_CUDA="pypi")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (library,) = (name for name in archive.namelist() if name.endswith(".so"))
        assert b"sm_80" in archive.read(library)


@pytest.mark.parametrize("debian", [None, "bullseye"])
def test_a_wheel_with_its_tag_works_where_no_compiler_is(debian: str | None, tmp_path: Path) -> None:
    if debian and shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    tree = copy_sources(tmp_path / "tree")
    of = ("--debian", debian) if debian else ()
    installed = f"torch=={torch.__version__.partition('+')[0]}"
    command = (sys.executable, "release/build_wheels.py", "--versions", VERSION, "--torch", installed, *of)
    said = run(*command, cwd=tree)
    (wheel,) = (tree / "dist").glob("*.whl")
    assert list((tree / "dist").glob("*.tar.gz"))
    python = VERSION.replace(".", "")
    tag = re.fullmatch(rf"mixce_kernels-[\d.]+-cp{python}-cp{python}-manylinux_2_(\d+)_x86_64\.whl", wheel.name)
    assert tag is not None, wheel.name
    if debian == "bullseye":
        # Debian 11 has glibc 2.31.
        assert int(tag[1]) <= 31
    with zipfile.ZipFile(wheel) as archive:
        # Nothing was copied into it: the OpenMP runtime is torch's.
        assert sum(".so" in Path(name).name for name in archive.namelist()) == 1
    line = said.splitlines()[-1]
    assert line.startswith(wheel.name)
    assert "CUDA kernels inside, right on" in line
    assert "baseline" in line
    installing, first_loss = map(float, re.findall(r"installed in ([\d.]+) s.* first loss ([\d.]+) s", line)[0])
    assert installing + first_loss < 10


def test_pythons_that_are_not_there(tmp_path: Path) -> None:
    said = run(sys.executable, BUILD_WHEELS, "--versions", "3.7b", cwd=tmp_path, returncode=1)
    assert said.splitlines()[-1] == "expected a CPython among 3.7b, found none"
