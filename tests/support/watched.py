"""For emulations of CUDA that know which memory may be reached: the tensors of a call to the backend, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mixce_kernels.backends import cuda, cuda_shards, native, native_shards


class Watched:
    """Lets the kernels of each call reach the memory of the tensors that the call hands over, as long as it lasts."""

    def __init__(self, register: Callable[[Tensor], None], unregister: Callable[[Tensor], None]) -> None:
        self.register = register
        self.unregister = unregister
        self.reached: dict[int, Tensor] = {}
        watched: tuple[Any, ...] = (
            (native, "row_params"),
            (native, "forward_call"),
            (native, "reduction_params"),
            (native, "add_logprobs"),
            (cuda, "_launch"),
        )
        watched += tuple((native_shards, f"{name}_params") for name in ("targets", "message", "merge"))
        for module, name in watched:
            setattr(module, name, self._watching(getattr(module, name)))
        closed: list[Any] = [(cuda, name) for name in ("forward", "reduce", "logits_grad", "scale_rows_")]
        closed += [(cuda_shards, name) for name in ("localize_targets", "write_message", "merge_messages")]
        for module, name in closed:
            setattr(module, name, self._closing(getattr(module, name)))

    def _reach(self, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel() > 0:
            if self.reached.setdefault(value.untyped_storage().data_ptr(), value) is value:
                self.register(value)
        elif isinstance(value, tuple):
            for one in value:
                self._reach(one)

    def _watching(self, function: Any) -> Any:
        def watching(*args: Any, **keywords: Any) -> Any:
            result = function(*args, **keywords)
            self._reach((args, *keywords.values(), result))
            return result

        return watching

    def _closing(self, function: Any) -> Any:
        def closing(*args: Any, **keywords: Any) -> Any:
            try:
                return function(*args, **keywords)
            finally:
                for tensor in self.reached.values():
                    self.unregister(tensor)
                self.reached.clear()

        return closing
