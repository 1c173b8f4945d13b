"""Builds `mixce_kernels._C` with ninja: no torch header, no torch library. Metadata is in pyproject.toml.

Environment: CXX, the C++ compiler; MIXCE_BUILD_CUDA, 1 or 0: with CUDA kernels or without, by default with them where
nvcc is found (CUDA_HOME names its toolkit), or pypi: with them, by NVIDIA's compiler from PyPI, which pip brings for
the build; MIXCE_CUDA_ARCHS, their architectures; MIXCE_CUDART, static or shared.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# The only source that knows Python: the other objects serve every version of it.
MODULE = "csrc/module.cpp"
SOURCES = [
    MODULE,
    "csrc/cpu/cpu_backend.cpp",
    "csrc/cpu/cpu_shards.cpp",
    "csrc/cpu/row_kernels_baseline.cpp",
    "csrc/cpu/row_kernels_avx2.cpp",
    "csrc/cpu/row_kernels_avx512.cpp",
]
CUDA_SOURCES = ["csrc/cuda/cuda_backend.cu", "csrc/cuda/cuda_shards.cu"]
CUDA_ARCHS = "80;90;100;120+PTX"
# NVIDIA's compiler on PyPI, whose parts are packages of their own.
NVCC_FROM_PYPI = (ROOT / "csrc" / "cuda" / "nvcc_from_pypi.txt").read_text().split()
# No -ffast-math: it would drop the infinities and NaNs that logits carry. No contraction of products and sums but where
# the source asks for it: the same logit would become another number in another place.
COMPILE = ["-std=c++17", "-O2", "-g0", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-fopenmp"]
# libgomp is linked by name alone: the process already has torch's.
LINK = ["-shared", "-fopenmp", "-s"]
NVCC = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden,-g0", f"-I{ROOT / 'csrc' / 'cuda'}"]
# The CUDA runtime stays inside: another extension's copy of it, or torch's, must not be taken for it.
NVCC_LINK = ["-shared", "-Xcompiler=-fopenmp", "-Xlinker=-s", "-Xlinker=--exclude-libs=ALL"]


class NinjaBuild(build_ext):
    """Compiles with ninja; what cannot be compiled is left out of the package, and named."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        nvcc = find_nvcc()
        if nvcc is not None:
            try:
                self.compile(output, nvcc)
                return
            except (OSError, subprocess.CalledProcessError) as error:
                if os.environ.get("MIXCE_BUILD_CUDA") in ("1", "pypi"):
                    raise SystemExit(f"mixce_kernels cannot compile its CUDA kernels, as asked for ({error})") from None
                self.warn(
                    f"mixce_kernels is installed without CUDA kernels, because they could not be compiled ({error}). "
                    "The backend 'cuda' does not work, the others do; MIXCE_BUILD_CUDA=0 leaves it out on purpose."
                )
        try:
            self.compile(output, None)
        except (OSError, subprocess.CalledProcessError) as error:
            # An extension of an earlier build would no longer match the Python code around it.
            output.unlink(missing_ok=True)
            self.warn(
                f"mixce_kernels is installed without its native extension, because it could not be compiled ({error}). "
                "The backends 'reference' and 'triton' work, the backends 'cpu' and 'cuda' do not; to get them, "
                "install g++ or set CXX to a C++17 compiler with OpenMP, and install mixce_kernels again."
            )

    def compile(self, output: Path, nvcc: str | None) -> None:
        """Writes build.ninja and runs it, with CUDA where `nvcc` is given.

        Raises:
            OSError: there is no compiler.
            CalledProcessError: a compiler failed; its messages are on stderr.
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
        defines = ["-DMIXCE_CUDA"] if nvcc else []
        lines = [
            "rule compile",
            f"  command = {compiler} {shlex.join([*COMPILE, *defines])} $includes -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "rule link",
            f"  command = {compiler} $in {shlex.join(LINK)} -o $out",
        ]
        if nvcc:
            libraries = f"-L{Path(nvcc).parents[1] / 'lib'}"
            command = f"{shlex.quote(nvcc)} -ccbin {shlex.quote(shlex.split(compiler)[-1])}"
            lines += [
                "rule cuda",
                f"  command = {command} {shlex.join([*NVCC, *gencodes()])} -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "rule link_cuda",
                # Where the packages of PyPI have the runtime; nvcc knows the places of a toolkit.
                f"  command = {command} $in {shlex.join([*NVCC_LINK, libraries, '-cudart', cudart()])} -o $out",
            ]
        objects = []
        for source in SOURCES + (CUDA_SOURCES if nvcc else []):
            objects.append(escape(build / f"{Path(source).name}.o"))
            rule = "cuda" if source in CUDA_SOURCES else "compile"
            lines.append(f"build {objects[-1]}: {rule} {escape(ROOT / source)}")
            if source == MODULE:
                lines.append(f"  includes = {shlex.join(includes)}")
        lines.append(f"build {escape(output)}: {'link_cuda' if nvcc else 'link'} {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)], check=True, stdout=sys.stderr)


def find_nvcc() -> str | None:
    """The CUDA compiler to use, None for a build without CUDA; raises SystemExit where it is asked for and missing."""
    wanted = os.environ.get("MIXCE_BUILD_CUDA", "")
    if wanted not in ("", "0", "1", "pypi"):
        raise SystemExit(f"expected MIXCE_BUILD_CUDA to be 0, 1 or pypi, got {wanted!r}")
    if wanted == "0":
        return None
    if wanted == "pypi":
        nvidia = importlib.util.find_spec("nvidia")
        places = nvidia.submodule_search_locations if nvidia else ()
        nvcc = shutil.which("nvcc", path=os.pathsep.join(str(Path(place) / "cu13" / "bin") for place in places or ()))
        if nvcc is None:
            raise SystemExit(
                "expected nvcc among the installed packages for MIXCE_BUILD_CUDA=pypi, got none; without build "
                f"isolation install it first: pip install {shlex.join(NVCC_FROM_PYPI)}"
            )
        return nvcc
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        place = f"{home}/bin" if home else "the PATH"
        raise SystemExit(f"expected nvcc in {place} for MIXCE_BUILD_CUDA=1, got none; CUDA_HOME names another toolkit")
    return nvcc


def gencodes() -> list[str]:
    """Flags for the architectures of MIXCE_CUDA_ARCHS: machine code for each, and PTX too for one with +PTX."""
    flags = []
    for arch in os.environ.get("MIXCE_CUDA_ARCHS", CUDA_ARCHS).split(";"):
        parts = re.fullmatch(r"(\d+[af]?)(\+PTX)?", arch)
        if parts is None:
            raise SystemExit(f"expected MIXCE_CUDA_ARCHS as in {CUDA_ARCHS!r}, got {arch!r} in it")
        number, ptx = parts.groups()
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if ptx else [])
        flags.append(f"-gencode=arch=compute_{number},code=[{','.join(codes)}]")
    return flags


def cudart() -> str:
    """How the CUDA runtime is linked."""
    kind = os.environ.get("MIXCE_CUDART", "static")
    if kind not in ("static", "shared"):
        raise SystemExit(f"expected MIXCE_CUDART to be static or shared, got {kind!r}")
    return kind


def escape(path: Path) -> str:
    """A path as ninja writes it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension("mixce_kernels._C", sources=[*SOURCES, *CUDA_SOURCES], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
    # Asked for by "egg_info", pip installs them in the environment of the build; any other command would do so itself.
    setup_requires=NVCC_FROM_PYPI if os.environ.get("MIXCE_BUILD_CUDA") == "pypi" and "egg_info" in sys.argv else [],
)
