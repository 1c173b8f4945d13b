"""The package as people get it: sdist, wheel, and an installation without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.paths import ROOT
from support.trees import FOLDERS, copy_sources

pytest.importorskip("build", reason="needs the extra 'test'")
pytest.importorskip("pybind11", reason="needs the extra 'test'")
ninja = pytest.importorskip("ninja", reason="needs the extra 'test'")

BUILD = (sys.executable, "setup.py", "build", "--build-temp", "temp", "--build-lib", "lib")

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files and /proc")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
CUDA = {"MIXCE_BUILD_CUDA": "1", "MIXCE_CUDA_ARCHS": "80"} if shutil.which("nvcc") else {}
pytestmark = pytest.mark.slow

# What a user does first, with the backend that the command line names.
USE = textwrap.dedent("""
    import re, sys
    import torch
    import mixce_kernels

    torch.set_num_threads(2)
    logits = torch.randn(128, 1000, requires_grad=True)
    targets = torch.randint(1000, (128,))
    mixce_kernels.fused_mixce_loss(logits, targets, backend=sys.argv[1]).backward()
    assert logits.grad.isfinite().all()
    print("package", mixce_kernels.__file__)
    if sys.platform == "linux":
        for line in open("/proc/self/maps"):
            if re.search(r"lib(g|i)?omp", line):
                print("openmp", line.split()[-1])
""")


def run(*command: str | Path, cwd: Path, returncode: int = 0, **environment: str) -> str:
    """What the command says, on stdout and stderr; fails the test unless it exits with `returncode`."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        # Without CUDA unless asked for: its compiler takes its time.
        env={**os.environ, "MIXCE_BUILD_CUDA": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == returncode, done.stdout
    return done.stdout


def use(target: Path, backend: str, returncode: int = 0, **environment: str) -> str:
    """What USE says of the package installed in `target`."""
    # -S: an editable installation of the environment that runs the tests must not lend its extension.
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    command = (sys.executable, "-S", "-c", USE, backend)
    return run(*command, cwd=target, returncode=returncode, PYTHONPATH=path, **environment)


@pytest.fixture(scope="module")
def copy_tree(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes copies of the sources as a clone has them."""
    return lambda: copy_sources(tmp_path_factory.mktemp("trees") / "tree")


@pytest.fixture(scope="module")
def sdist_and_wheel(copy_tree: Callable[[], Path]) -> tuple[Path, Path]:
    """Both, the wheel from the sdist, in an environment of their own that holds what pyproject.toml asks for."""
    tree = copy_tree()
    run(sys.executable, "-m", "build", cwd=tree)
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    (wheel,) = (tree / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def built(copy_tree: Callable[[], Path]) -> Path:
    """A tree in which BUILD ran, with CUDA where there is nvcc: objects in temp/, the package in lib/."""
    tree = copy_tree()
    run(*BUILD, cwd=tree, **CUDA)
    return tree


@needs_compiler
def test_sdist_holds_every_source(sdist_and_wheel: tuple[Path, Path]) -> None:
    with tarfile.open(sdist_and_wheel[0]) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    files = {path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    sources = {path.as_posix() for path in files if path.suffix != ".so" and "__pycache__" not in path.parts}
    assert sources | {"LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


@needs_compiler
def test_wheel_holds_the_package_and_one_library(sdist_and_wheel: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(sdist_and_wheel[1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert [name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mixce_kernels").rglob("*.py*")}
    expected = {name for name in sources if not name.endswith(".pyc")} | {"mixce_kernels/py.typed"}
    (library,) = held - expected
    assert re.fullmatch(r"mixce_kernels/_C\.[\w.-]+\.so", library)
    assert expected <= held


@needs_compiler
@linux_only
def test_installed_wheel_shares_the_openmp_runtime_of_torch(sdist_and_wheel: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, sdist_and_wheel[1], cwd=tmp_path)
    (library,) = (target / "mixce_kernels").glob("_C.*.so")
    if shutil.which("readelf"):
        dynamic = run("readelf", "-d", library, cwd=tmp_path)
        needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
        assert "libgomp.so.1" in needed
        assert not [name for name in needed if re.search("torch|c10|cuda|python", name)]
        assert not re.search("RPATH|RUNPATH", dynamic)

    said = use(target, "cpu")
    assert f"package {target}" in said
    assert len(set(re.findall("openmp (.+)", said))) == 1, said


@pytest.mark.parametrize("missing", ["no compiler", "a compiler that is not there", "a compiler that fails"])
def test_without_a_compiler_the_package_installs_and_says_so(
    missing: str, copy_tree: Callable[[], Path], tmp_path: Path
) -> None:
    environment = {
        "no compiler": {"CXX": "", "PATH": str(tmp_path)},
        "a compiler that is not there": {"CXX": str(tmp_path / "no-such-compiler")},
        "a compiler that fails": {"CXX": "false"},
    }[missing]
    target = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--target", target, ".")
    said = run(*pip, cwd=copy_tree(), **environment)
    assert "mixce_kernels is installed without its native extension" in said
    assert not list(target.rglob("*.so"))

    use(target, "reference")
    refusal = "RuntimeError: backend 'cpu' cannot serve this call: the native extension is missing"
    assert refusal in use(target, "cpu", returncode=1)


@needs_compiler
def test_rebuild_follows_every_header(built: Path) -> None:
    ninja_says = (Path(ninja.BIN_DIR) / "ninja", "-C", built / "temp", "-n")
    assert "no work to do" in run(*ninja_says, cwd=built)
    headers = sorted(path for path in (built / "csrc").rglob("*.*h") if CUDA or "cuda" not in path.parts)
    assert headers
    for header in headers:
        before = header.stat()
        os.utime(header)
        assert "no work to do" not in run(*ninja_says, cwd=built), f"{header.name} is no dependency of any object"
        os.utime(header, ns=(before.st_atime_ns, before.st_mtime_ns))


@needs_compiler
@linux_only
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_weak_symbol_leaves_a_simd_unit(isa: str, built: Path) -> None:
    """The linker keeps one of several weak copies for all: one made of AVX-512 would crash other machines."""
    symbols = run("nm", "--defined-only", built / "temp" / f"row_kernels_{isa}.cpp.o", cwd=built)
    assert not re.findall(r"^\S+ [WVu] .+$", symbols, re.MULTILINE)


@needs_compiler
def test_a_failing_rebuild_leaves_no_stale_extension(built: Path) -> None:
    tree = built.parent / "failing"
    shutil.copytree(built, tree)
    assert list((tree / "lib").rglob("_C.*.so"))
    assert "installed without its native extension" in run(*BUILD, cwd=tree, CXX="false")
    assert not list((tree / "lib").rglob("_C.*.so"))


@needs_compiler
@needs_nvcc
@linux_only
def test_cuda_extension_imports_without_a_gpu(built: Path) -> None:
    (library,) = (built / "lib" / "mixce_kernels").glob("_C.*.so")
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", library, cwd=built))
    assert not [name for name in needed if re.search("torch|c10|cuda|python", name)], needed
    # The CUDA runtime inside must not be taken for another's.
    exported = run("nm", "-D", "--defined-only", library, cwd=built)
    assert "PyInit__C" in exported
    assert not re.search("cuda", exported, re.IGNORECASE), exported
    assert f"package {built / 'lib'}" in use(built / "lib", "cpu")
    if torch.cuda.is_available():
        return
    refusal = "RuntimeError: backend 'cuda' cannot serve this call: it runs on CUDA tensors, and the logits are on cpu"
    assert refusal in use(built / "lib", "cuda", returncode=1)
    # Even where CPU tensors may pass, a device is missing.
    said = use(built / "lib", "cuda", returncode=1, MIXCE_CPU_TENSORS="1")
    assert re.search("RuntimeError: backend 'cuda' cannot serve this call: asking for .* the device failed: .*", said)


@needs_compiler
@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"MIXCE_BUILD_CUDA": "yes"}, "expected MIXCE_BUILD_CUDA to be 0, 1 or pypi, got 'yes'"),
        (
            {"MIXCE_BUILD_CUDA": "pypi"},
            "expected nvcc among the installed packages for MIXCE_BUILD_CUDA=pypi, got none",
        ),
        ({"MIXCE_BUILD_CUDA": "1"}, "expected nvcc in {home}/bin for MIXCE_BUILD_CUDA=1, got none"),
        ({"MIXCE_CUDA_ARCHS": "80;hopper"}, "expected MIXCE_CUDA_ARCHS as in '80;90;100;120+PTX', got 'hopper' in it"),
        ({"MIXCE_CUDART": "none"}, "expected MIXCE_CUDART to be static or shared, got 'none'"),
    ],
)
def test_wrong_build_knobs(
    environment: dict[str, str], sentence: str, copy_tree: Callable[[], Path], tmp_path: Path
) -> None:
    compiler = tmp_path / "bin" / "nvcc"
    if "MIXCE_BUILD_CUDA" not in environment:
        compiler.parent.mkdir()
        compiler.write_text("#!/bin/sh\nexit 1\n")
        compiler.chmod(0o755)
    settings = {"CUDA_HOME": str(tmp_path), "MIXCE_BUILD_CUDA": "", **environment}
    said = run(*BUILD, cwd=copy_tree(), returncode=1, **settings)
    assert said.splitlines()[-1].startswith(sentence.format(home=tmp_path)), said
    assert "Traceback" not in said


@needs_compiler
@pytest.mark.parametrize("asked_for", [False, True])
def test_cuda_compiler_that_fails(asked_for: bool, copy_tree: Callable[[], Path], tmp_path: Path) -> None:
    """The rest of the package is installed all the same, unless CUDA was asked for."""
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    tree = copy_tree()
    settings = {"CUDA_HOME": str(tmp_path), "MIXCE_BUILD_CUDA": "1" if asked_for else ""}
    said = run(*BUILD, cwd=tree, returncode=int(asked_for), **settings)
    if asked_for:
        assert said.splitlines()[-1].startswith("mixce_kernels cannot compile its CUDA kernels, as asked for"), said
        return
    assert "mixce_kernels is installed without CUDA kernels, because they could not be compiled" in said
    use(tree / "lib", "cpu")
    refusal = "RuntimeError: backend 'cuda' cannot serve this call: the native extension was built without CUDA"
    assert refusal in use(tree / "lib", "cuda", returncode=1)
