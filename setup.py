"""Builds `mixce_kernels._C` with ninja: no torch header, no torch library. Metadata is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = [
    "csrc/module.cpp",
    "csrc/cpu/cpu_backend.cpp",
    "csrc/cpu/row_kernels_baseline.cpp",
    "csrc/cpu/row_kernels_avx2.cpp",
    "csrc/cpu/row_kernels_avx512.cpp",
]
# No -ffast-math: it would drop the infinities and NaNs that logits carry.
COMPILE = ["-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wno-maybe-uninitialized"]
# libgomp is linked by name alone: the process already has torch's.
LINK = ["-shared", "-fopenmp", "-s"]


def ninja_program() -> str:
    """The ninja of the build environment, else of the machine."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja") or "ninja"


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it; without a compiler the package is installed without the extension."""

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            self.warn("no C++ compiler found (set CXX): installing without the backend 'cpu'")
            return
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
        objects = [build / Path(source).with_suffix(".o").name for source in SOURCES]
        lines = [
            f"flags = {' '.join([*COMPILE, *includes])}",
            "rule compile",
            f"  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "rule link",
            f"  command = {compiler} $in {' '.join(LINK)} -o $out",
            *(f"build {obj}: compile {ROOT / source}" for obj, source in zip(objects, SOURCES, strict=True)),
            f"build {output}: link {' '.join(map(str, objects))}",
        ]
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([ninja_program(), "-C", str(build)], check=True, stdout=sys.stderr)


setup(
    ext_modules=[Extension("mixce_kernels._C", sources=SOURCES, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
