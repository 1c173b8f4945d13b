"""The AVX-512 row kernels without AVX-512 in the machine: compiled for AVX2 with SIMDe, and run by the CPU tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from support.paths import ROOT, TESTS

EMULATION = TESTS / "backends" / "avx512_on_avx2"
SIMDE = Path("/usr/include/simde/x86/avx512.h")


def compile_object(source: Path, output: Path, *flags: str) -> list[str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or "g++"
    return [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", *flags, "-c", str(source), "-o", str(output)]


@pytest.fixture(scope="module")
def emulated_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package whose extension believes to have AVX-512 and emulates it."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("avx512")
    package = folder / "mixce_kernels"
    shutil.copytree(ROOT / "mixce_kernels", package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    cpu = ROOT / "csrc" / "cpu"
    includes = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    sources = {
        ROOT / "csrc" / "module.cpp": ["-fvisibility=hidden", *includes],
        cpu / "cpu_backend.cpp": ["-fopenmp", "-D__builtin_cpu_supports(feature)=1"],
        cpu / "cpu_shards.cpp": [],
        cpu / "row_kernels_baseline.cpp": [],
        cpu / "row_kernels_avx2.cpp": [],
        EMULATION / "row_kernels_avx512.cpp": ["-mavx2", "-mfma", "-mf16c", f"-I{EMULATION}", f"-I{cpu}"],
    }
    objects = []
    for source, flags in sources.items():
        objects.append(folder / f"{source.stem}.o")
        subprocess.run(compile_object(source, objects[-1], *flags), check=True)
    extension = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [*compile_object(Path(), Path())[:1], "-shared", "-fopenmp", *map(str, objects), "-o", str(extension)]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not SIMDE.exists(), reason="needs SIMDe (libsimde-dev) to emulate AVX-512")
@pytest.mark.skipif("avx2" not in Path("/proc/cpuinfo").read_text(), reason="the emulation runs on AVX2")
def test_cpu_tests_pass_with_emulated_avx512(emulated_package: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(emulated_package)}
    which = "import mixce_kernels.backends.cpu as cpu; print(cpu.__file__, cpu.isa())"
    settings = {"cwd": TESTS, "env": environment, "capture_output": True, "text": True}
    used = subprocess.run([sys.executable, "-c", which], check=True, **settings)
    assert used.stdout.split() == [str(emulated_package / "mixce_kernels" / "backends" / "cpu.py"), "avx512"]

    tests = ["loss/test_loss.py", "loss/test_edge_cases.py", "loss/test_stats.py", "logprobs/test_logprobs.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu", *tests]
    result = subprocess.run(command, **settings)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
