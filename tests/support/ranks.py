"""`run_ranks`: calls a function in some processes that form a process group, and brings home what it returns.

    def gathers(number: int) -> list[int]:  # at the top level of a test module
        numbers = [None] * dist.get_world_size()
        dist.all_gather_object(numbers, number + dist.get_rank())
        return numbers

    assert run_ranks(gathers, 2, 7) == [[7, 8], [7, 8]]

A process takes two to three seconds to import torch, and the tests' ranks share two cores: one call should try many
cases, and return a dict of results or catch the errors it is after. Fewer ranks need no call of their own: they are a
`dist.new_group(ranks)` of the larger one, which every rank has to create.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Beyond a rank's own timeout: what its process may take to start on a busy machine.
START_SECONDS = 60.0
# Once a rank has failed, the others' collectives fail too, and their reports tell what they were doing.
GRACE_SECONDS = 2.0


class RankError(RuntimeError):
    """A rank raised, died or hung: the message has what each of them reported, the first to end first."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """What `function(*args)` returns on each of `world_size` ranks, each a new process with one thread.

    There, `torch.distributed` is initialised with gloo, the seed is 0 on every rank, and fresh memory is poisoned as
    in the tests of one process.

    Args:
        function: of the top level of a module. `dist.get_rank()` tells it who it is.
        world_size: the number of ranks.
        args: what can be pickled. Each rank has a copy of its own, of tensors too.
        timeout: seconds, from the start of `function`, after which a rank reports where it hangs, and ends.

    Raises:
        RankError: a rank raised, died or hung. No rank outlives this.
    """
    context = multiprocessing.get_context("spawn")
    # Pickled here, because multiprocessing would let the ranks share the memory of tensors.
    call = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        processes = [
            context.Process(target=_be_rank, args=(rank, world_size, Path(folder), timeout, call), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            unfinished = _wait_for(processes, time.monotonic() + START_SECONDS + timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        if unfinished:
            raise RankError("\n".join(_report(rank, processes[rank].exitcode, Path(folder)) for rank in unfinished))
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def what_goes_wrong(calls: dict[str, Callable[[], None]]) -> dict[str, str]:
    """What each call raises on this rank, with its traceback, by its name; empty where it went well."""
    wrong = {}
    for name, call in calls.items():
        try:
            call()
            wrong[name] = ""
        except Exception:
            # Here too, in case the others wait for this rank in a collective, and all of them come to nothing.
            traceback.print_exc()
            wrong[name] = f"rank {dist.get_rank()} of {dist.get_world_size()}: {traceback.format_exc()}"
    return wrong


def _wait_for(processes: list[Any], deadline: float) -> list[int]:
    """Waits for all, or until the deadline or shortly after a failure; those that failed, then those that still run."""
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    failed = []
    while running:
        ended = wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ended:
            break
        for sentinel in ended:
            rank = running.pop(sentinel)
            processes[rank].join()
            if processes[rank].exitcode != 0:
                failed.append(rank)
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return failed + list(running.values())


def _report(rank: int, exit_code: int | None, folder: Path) -> str:
    path = folder / f"{rank}.report"
    text = path.read_text() if path.exists() else ""
    return f"rank {rank} ended with exit code {exit_code} and reported:\n{text or '(nothing)'}"


def _be_rank(rank: int, world_size: int, folder: Path, timeout: float, call: bytes) -> None:
    """The life of a rank's process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    with (folder / f"{rank}.report").open("w") as report:
        faulthandler.enable(report)
        try:
            dist.init_process_group(
                "gloo",
                init_method=(folder / "rendezvous").as_uri(),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=START_SECONDS + timeout),
            )
            function, args = pickle.loads(call)
            faulthandler.dump_traceback_later(timeout, exit=True, file=report)
            result = pickle.dumps(function(*args))
            # No rank leaves while another one may still wait for it.
            dist.barrier()
            faulthandler.cancel_dump_traceback_later()
            dist.destroy_process_group()
            (folder / f"{rank}.result").write_bytes(result)
        except BaseException:
            traceback.print_exc(file=report)
            report.flush()
            # At once: an orderly end waits for collectives that the others have not joined.
            os._exit(1)
