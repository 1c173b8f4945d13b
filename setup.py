"""Builds `mixce_kernels._C` with ninja: no torch header, no torch library. Metadata is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = [
    "csrc/module.cpp",
    "csrc/cpu/cpu_backend.cpp",
    "csrc/cpu/row_kernels_baseline.cpp",
    "csrc/cpu/row_kernels_avx2.cpp",
    "csrc/cpu/row_kernels_avx512.cpp",
]
# No -ffast-math: it would drop the infinities and NaNs that logits carry. No contraction of products and sums but where
# the source asks for it: the same logit would become another number in another place.
COMPILE = ["-std=c++17", "-O2", "-g0", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-fopenmp"]
# libgomp is linked by name alone: the process already has torch's.
LINK = ["-shared", "-fopenmp", "-s"]


class NinjaBuild(build_ext):
    """Compiles with ninja; where that fails, the package is installed without the extension, and says so."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.compile(output)
        except (OSError, subprocess.CalledProcessError) as error:
            # An extension of an earlier build would no longer match the Python code around it.
            output.unlink(missing_ok=True)
            self.warn(
                f"mixce_kernels is installed without its native extension, because it could not be compiled ({error}). "
                "The backends 'reference' and 'triton' work, the backend 'cpu' does not; to get it, "
                "install g++ or set CXX to a C++17 compiler with OpenMP, and install mixce_kernels again."
            )

    def compile(self, output: Path) -> None:
        """Writes build.ninja and runs it.

        Raises:
            OSError: there is no compiler.
            CalledProcessError: the compiler failed; its messages are on stderr.
        """
        import ninja
        import pybind11

        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise OSError("no C++ compiler found")
        build = Path(self.build_temp).resolve()
        for folder in (build, output.parent):
            folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
        objects = [build / Path(source).with_suffix(".o").name for source in SOURCES]
        lines = [
            "rule compile",
            f"  command = {compiler} {shlex.join([*COMPILE, *includes])} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "rule link",
            f"  command = {compiler} $in {shlex.join(LINK)} -o $out",
            *(f"build {escape(obj)}: compile {escape(ROOT / src)}" for obj, src in zip(objects, SOURCES, strict=True)),
            f"build {escape(output)}: link {' '.join(map(escape, objects))}",
        ]
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)], check=True, stdout=sys.stderr)


def escape(path: Path) -> str:
    """A path as ninja writes it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension("mixce_kernels._C", sources=SOURCES, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
