"""Compiles CUDA sources for the CPU, without nvcc and CUDA's headers: see tests/backends/cuda_on_cpu/cuda_runtime.h."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.paths import ROOT, TESTS

EMULATION = TESTS / "backends" / "cuda_on_cpu"
CSRC = ROOT / "csrc"
# GCC, whatever CXX says: other compilers lack the strict check of bounds.
CXX = ["g++", "-std=c++17", "-ffp-contract=off", "-g0", "-fPIC"]
needs_gcc = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="the emulation of CUDA needs Linux and g++"
)
# Device code reads vectors of 16 bytes as other types. A misaligned vector or an index past the end of an array, even
# the last one of a struct, becomes a fault of the kernel; the sanitizer's library is not needed for that.
CUDA = [
    *("-x", "c++", "-O1", "-fno-strict-aliasing", f"-I{EMULATION}", f"-I{CSRC / 'cuda'}"),
    *("-fsanitize=alignment,bounds", "-fsanitize=bounds-strict", "-fno-sanitize-recover=all"),
]


def compile_program(source: Path, output: Path, *flags: str) -> None:
    """One CUDA source as a program; -rdynamic, so that a fault can name its kernel."""
    command = [*CXX, *CUDA, *flags, str(source), "-rdynamic", "-pthread", "-ldl", "-o", str(output)]
    subprocess.run(command, check=True)


def build_package(folder: Path) -> Path:
    """Copies the package to `folder`, to be put on PYTHONPATH, with an extension whose CUDA backend runs on the CPU."""
    import pybind11

    package = folder / "mixce_kernels"
    shutil.copytree(ROOT / "mixce_kernels", package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    includes = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    flags = dict.fromkeys(sorted((CSRC / "cuda").glob("*.cu")), CUDA)
    flags[CSRC / "module.cpp"] = ["-O0", "-DMIXCE_CUDA", "-fvisibility=hidden", *includes]
    flags |= {source: ["-O1", "-fopenmp"] for source in sorted((CSRC / "cpu").glob("*.cpp"))}
    objects = {source: folder / f"{source.name}.o" for source in flags}

    def compile_one(source: Path) -> None:
        subprocess.run([*CXX, *flags[source], "-c", str(source), "-o", str(objects[source])], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, flags))
    extension = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*CXX, "-shared", "-fopenmp", *map(str, objects.values()), "-ldl", "-o", str(extension)], check=True)
    return folder
