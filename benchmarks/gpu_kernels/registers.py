"""Registers of the compiled kernels, and how many blocks of them a multiprocessor holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from gpu_kernels.counts import kernel_name

REGISTERS = 65536  # of a multiprocessor
REGISTERS_GRANULARITY = 256  # of a warp
RESERVED_SHARED_BYTES = 1024  # of each block, by the driver
WARP_SIZE = 32
BLOCKS = 32  # of a multiprocessor, at most


@dataclass(frozen=True)
class Architecture:
    """A device's multiprocessors, and the shared memory, in bytes, and threads of one."""

    multiprocessors: int
    shared_per_block: int
    shared: int
    threads: int


ARCHITECTURES = {
    "sm_80": Architecture(108, 166912, 167936, 2048),
    "sm_90": Architecture(132, 232448, 233472, 2048),
    "sm_100": Architecture(148, 232448, 233472, 2048),
    "sm_120": Architecture(170, 101376, 102400, 1536),
}


@dataclass(frozen=True)
class Registers:
    """What ptxas made of a kernel for one architecture."""

    backend: str
    target: str
    kernel: str
    dtype: str
    variant: str
    threads: int
    registers: int
    spilled_bytes: int  # or another frame in local memory
    shared_bytes: int  # static for CUDA, all of it for Triton

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds by registers, threads and this shared memory."""
        by_registers = blocks_by_registers(self.registers, self.threads)
        return min(by_registers, blocks_by_shared(self.target, self.shared_bytes), self.blocks_by_threads)

    @property
    def blocks_by_threads(self) -> int:
        """Blocks that a multiprocessor holds were only its threads counted."""
        return min(BLOCKS, ARCHITECTURES[self.target].threads // self.threads)


def blocks_by_registers(registers: int, threads: int) -> int:
    """Blocks whose registers a multiprocessor has."""
    of_warp = -(-registers * WARP_SIZE // REGISTERS_GRANULARITY) * REGISTERS_GRANULARITY
    return REGISTERS // of_warp // -(-threads // WARP_SIZE)


def blocks_by_shared(target: str, shared_bytes: int) -> int:
    """Blocks whose shared memory a multiprocessor has."""
    return ARCHITECTURES[target].shared // (shared_bytes + RESERVED_SHARED_BYTES)


@dataclass(frozen=True)
class Held:
    """How a launch of many rows holds a row between the passes of grad_in_forward."""

    target: str
    vocab: int
    parts: int
    held_bytes: int  # of the row in a block; 0: none
    blocks: int  # of a multiprocessor, by that memory


def held_rows(target: str, vocab: int, itemsize: int, state_bytes: int, n_rows: int = 4096) -> Held:
    """The CUDA launch for rows of this vocabulary."""
    # Here, because a process that counts imports the package after it has set up the runtime.
    from mixce_kernels.backends.cuda_launch import Device, grad_in_forward_launch

    chip = ARCHITECTURES[target]
    device = Device(int(target[3:]), chip.multiprocessors, chip.shared_per_block, chip.shared)
    launch = grad_in_forward_launch(n_rows, vocab * itemsize, state_bytes, device)
    blocks = blocks_by_shared(target, state_bytes + launch.held_bytes)
    return Held(target, vocab, launch.parts, launch.held_bytes, min(blocks, BLOCKS))


_DTYPES = {"8BFloat16": "bfloat16", "4Half": "float16", "f": "float32", "d": "float64"}
_PASSES = ("", "gradient, second read", "gradient, held in shared memory")
# Rows are a block's work, whose threads row_stats.cuh names; a merge is a warp's.
_THREADS = {"merge_kernel": WARP_SIZE}
_BLOCK_THREADS = 256
# A thread of these takes a token: what they need does not matter beside a row's kernels.
_OF_TOKENS = ("localize_targets_kernel", "write_message_kernel", "merge_messages_kernel", "reduction_kernel")


def resource_usage(text: str) -> Iterator[Registers]:
    """The kernels of rows in what `cuobjdump --dump-resource-usage` says of the CUDA extension."""
    target = ""
    for line in text.splitlines():
        if match := re.fullmatch(r"arch = (sm_\d+)[af]?", line.strip()):
            target = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            mangled = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            name = kernel_name(mangled)
            if name in _OF_TOKENS:
                continue
            dtype, variant = dtype_and_variant(mangled)
            threads = _THREADS.get(name, _BLOCK_THREADS)
            yield Registers("cuda", target, name, dtype, variant, threads, registers, stack + local, shared)


def dtype_and_variant(mangled: str) -> tuple[str, str]:
    """Type and template booleans of a kernel."""
    arguments = re.search(r"_kernelI(?:NS_(8BFloat16|4Half)E|([fd]))((?:Lb[01]E)*)(?:LNS_5Pass2E(\d)E)?", mangled)
    assert arguments is not None, f"an unknown kernel: {mangled}"
    flags = re.findall(r"Lb([01])E", arguments[3])
    # A gradient has no sums: its own is that of the entropy.
    second = "entropy" if "logits_grad_kernel" in mangled else "moments"
    words = [word for word, flag in zip(("softcap", second), flags, strict=False) if flag == "1"]
    words += [_PASSES[int(arguments[4])]] if arguments[4] and arguments[4] != "0" else []
    return _DTYPES[arguments[1] or arguments[2]], ", ".join(words)
