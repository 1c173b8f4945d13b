"""Runs of the synthetic experiment side by side: processes of one thread each, and a bar over their epochs."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import torch

from synthetic.train import Setting, run

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

# Seconds between two looks at the epochs that are done.
PACE = 0.5


class _Worker:
    """What a process keeps between its runs: the count of epochs that all processes share."""

    epochs: Synchronized[int]

    @classmethod
    def start(cls, epochs: Synchronized[int]) -> None:
        torch.set_num_threads(1)
        cls.epochs = epochs

    @classmethod
    def run(cls, setting: Setting) -> dict[str, Any]:
        result = run(setting, lambda: cls.count(1))
        # Those that an early stop saved.
        cls.count(setting.max_epochs - result["epochs"])
        return result

    @classmethod
    def count(cls, epochs: int) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            # Killed: nobody is left to take the result.
            os._exit(1)
        with cls.epochs.get_lock():
            cls.epochs.value += epochs


def run_all(settings: list[Setting], workers: int, finished: Callable[[dict[str, Any]], None]) -> bool:
    """Runs the settings in their order, hands over each result as it comes; whether all of them came.

    Where `finished` or the user ends it, what was handed over is all there is: running processes are ended.
    """
    if not settings:
        return True
    # A fork would copy the locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    epochs = context.Value("q", 0)
    complete = True
    with _Bar(sum(setting.max_epochs for setting in settings)) as bar:
        pool = ProcessPoolExecutor(min(workers, len(settings)), context, _Worker.start, (epochs,))
        try:
            waiting: dict[Future[dict[str, Any]], Setting] = {pool.submit(_Worker.run, one): one for one in settings}
            while waiting:
                done, _ = wait(waiting, PACE, FIRST_COMPLETED)
                bar.reach(epochs.value)
                for future in done:
                    setting = waiting.pop(future)
                    error = future.exception()
                    if error is None:
                        finished(future.result())
                    else:
                        complete = False
                        bar.say(f"failed: {setting}: {type(error).__name__}: {error}")
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return complete


class _Bar:
    """A bar over epochs, or a line for each tenth of them where tqdm is missing."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._reached = 0
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, unit="epoch", smoothing=0.02, mininterval=PACE)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def reach(self, epochs: int) -> None:
        """So many are done."""
        if self._bar is not None:
            self._bar.update(epochs - self._reached)
        elif 10 * epochs // self._total > 10 * self._reached // self._total:
            self.say(f"{epochs} of {self._total} epochs")
        self._reached = epochs

    def say(self, line: str) -> None:
        """A line beside the bar."""
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)
