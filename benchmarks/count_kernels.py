"""Counts what the compiled GPU kernels do, without a GPU: writes results/kernels.md and the CSVs that it is made of.

    PTX_ON_CPU=/path/to/ptx_on_cpu python benchmarks/count_kernels.py

Builds a copy of the package in a temporary folder, and runs the PTX of its kernels on the CPU. Needs nvcc, Triton, and
the tool ptx_on_cpu in the folder that PTX_ON_CPU names, by default in shared/ptx_on_cpu beside the checkout. Takes some
ten minutes on two cores; ptx_on_cpu and Triton keep what they compiled for the next time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gpu_kernels.counts import (
    BACKENDS,
    TARGET,
    TARGETS,
    VOCABULARIES,
    Case,
    Count,
    cases,
    compiled_cases,
    targets,
    verdicts,
)
from gpu_kernels.hot_loops import HotLoop, cuda_hot_loops, find_cuobjdump, write_hot_loops_csv
from gpu_kernels.markdown import NAMES
from gpu_kernels.registers import Held, Registers, held_rows, resource_usage
from gpu_kernels.tables import markdown, write_csv, write_registers_csv
from harness.report import machine, text_table

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
STARTED = time.monotonic()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="of which backends")
    parser.add_argument(
        "--registers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also compile for every architecture, and tell registers, machine code and the limits of chips",
    )
    arguments = parser.parse_args()
    chosen = arguments.backends
    folder, nvcc = ptx_on_cpu_folder(), find_nvcc()
    cuobjdump = find_cuobjdump()
    # Before anything else, of the sources as they are built.
    facts = machine(torch.device("cpu"))
    facts = {"nvcc": nvcc_version(nvcc), **{name: facts[name] for name in ("triton", "torch", "commit", "date")}}

    with tempfile.TemporaryDirectory(prefix="mixce_kernels_") as temporary:
        say("building the package")
        extension = build(Path(temporary), arguments.registers)
        counts, registers, loops, held = [], [], list[HotLoop](), list[Held]()
        if arguments.registers and "cuda" in chosen:
            say("reading the CUDA kernels' machine code")
            registers += usage(cuobjdump, extension)
            loops += cuda_hot_loops(cuobjdump, extension)
        job = {"ptx_on_cpu": str(folder), "extension": str(extension), "cuobjdump": cuobjdump}
        for backend in chosen:
            for target in targets(backend):
                say(f"running the {NAMES[backend]} kernels for {target}")
                for result in worker(job | {"counts": True}, cases(backend, target), extension.parents[1]):
                    if "count" in result:
                        counts.append(Count(**result["count"]))
                    elif arguments.registers and target == TARGET:
                        state_bytes = result["state_bytes"]
                        held = [held_rows(one, vocab, 2, state_bytes) for one in TARGETS for vocab in VOCABULARIES]
        if arguments.registers and "triton" in chosen:
            say("compiling the Triton kernels for every architecture")
            for result in worker(job | {"counts": False}, compiled_cases("triton"), extension.parents[1]):
                if "hot_loop" in result:
                    loops.append(HotLoop(**result["hot_loop"]))
                else:
                    registers.append(Registers(**result["registers"]))

    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "kernels.csv", counts, facts)
    if registers:
        write_registers_csv(arguments.out / "registers.csv", registers, facts)
        write_hot_loops_csv(arguments.out / "hot_loops.csv", loops, facts)
    (arguments.out / "kernels.md").write_text(markdown(counts, registers, loops, held, facts))
    print(bars_text(counts))
    say(f"wrote {arguments.out / 'kernels.md'}")


def ptx_on_cpu_folder() -> Path:
    """The folder of the tool that runs PTX; exits where it is missing."""
    folder = Path(os.environ.get("PTX_ON_CPU") or ROOT.parent / "shared" / "ptx_on_cpu")
    if not (folder / "ptx_on_cpu").is_dir():
        sys.exit(f"expected the tool ptx_on_cpu in {folder}; the environment variable PTX_ON_CPU names its folder.")
    return folder.resolve()


def find_nvcc() -> str:
    """The CUDA compiler, as setup.py finds it; exits where it is missing."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        sys.exit("expected nvcc on the PATH, or in the bin folder of CUDA_HOME: the CUDA kernels are compiled with it.")
    return nvcc


def nvcc_version(nvcc: str) -> str:
    """For example 13.0."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match[1] if match else ""


def build(folder: Path, every_architecture: bool) -> Path:
    """A copy of the package in `folder`, with an extension that has the PTX of its kernels; returns the extension."""
    others = [target.removeprefix("sm_") for target in TARGETS if target != TARGET] if every_architecture else []
    archs = ";".join([f"{TARGET.removeprefix('sm_')}+PTX", *others])
    knobs = {"MIXCE_BUILD_CUDA": "1", "MIXCE_CUDA_ARCHS": archs, "MIXCE_CUDART": "shared"}
    command = [sys.executable, "setup.py", "--quiet", "egg_info", f"--egg-base={folder}", "build"]
    command += [f"--build-temp={folder / 'temp'}", f"--build-lib={folder / 'lib'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment() | knobs, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
        sys.exit("The package could not be built; the compiler's words stand above.")
    return next((folder / "lib" / "mixce_kernels").glob("_C*.so"))


def environment() -> dict[str, str]:
    """That of this process, without what would change the package's build or its choice of kernels."""
    foreign = ("MIXCE_", "TRITON_INTERPRET")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def usage(cuobjdump: str, extension: Path) -> list[Registers]:
    """Registers of the CUDA kernels for every architecture."""
    command = [cuobjdump, "--dump-resource-usage", str(extension)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    order = {name: i for i, name in enumerate(("forward_kernel", "merge_kernel", "logits_grad_kernel"))}
    return sorted(resource_usage(text), key=lambda one: (order.get(one.kernel, 9), one.dtype, one.variant))


def worker(job: dict[str, Any], cases: list[Case], package: Path) -> list[dict[str, Any]]:
    """The results of a process that does the job with the copy of the package in the folder `package`."""
    knobs = {"PYTHONPATH": str(package), "MIXCE_CPU_TENSORS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpu_kernels.worker"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=BENCHMARKS, stdin=pipe, stdout=pipe, text=True, env=environment() | knobs
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin as stdin:
            json.dump(job | {"cases": [dataclasses.asdict(case) for case in cases]}, stdin)
        results = []
        for line in process.stdout:
            results.append(json.loads(line))
            say(f"  {len(results)}", end="\r")
    if process.returncode:
        sys.exit(f"The {NAMES[cases[0].backend]} kernels could not be counted; the process's words stand above.")
    return results


def bars_text(counts: list[Count]) -> str:
    """Each figure with its bar, for a terminal."""
    body: list[tuple[str, ...]] = [("step", "backend", "target", "N", "V", "figure", "counted", "bar", "")]
    for count, bar, met in verdicts(counts):
        bound = f"{'>=' if bar.at_least else '<='} {bar.bounds[count.backend]:g}"
        measured = f"{getattr(count, bar.figure):.4g}"
        verdict = "met" if met else "NOT MET"
        step = ", ".join(filter(None, (count.step, count.option)))
        sizes = (count.target, str(count.rows), str(count.vocab))
        body.append((step, count.backend, *sizes, bar.title, measured, bound, verdict))
    return text_table(body)


def say(text: str, end: str = "\n") -> None:
    """A line about the progress."""
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", file=sys.stderr, end=end, flush=True)


if __name__ == "__main__":
    main()
