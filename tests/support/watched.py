"""For emulations of CUDA that know which memory may be reached: the tensors of a call to the backend, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mixce_kernels.backends import cuda, native


class Watched:
    """Lets the kernels of each call reach the memory of the tensors that the call hands over, as long as it lasts."""

    def __init__(self, register: Callable[[Tensor], None], unregister: Callable[[Tensor], None]) -> None:
        self.register = register
        self.unregister = unregister
        self.reached: dict[int, Tensor] = {}
        for module, name in ((native, "row_params"), (native, "forward_params"), (cuda, "_launch")):
            setattr(module, name, self._watching(getattr(module, name)))
        for name in ("forward", "logits_grad", "scale_rows_"):
            setattr(cuda, name, self._closing(getattr(cuda, name)))

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
        def closing(*args: Any) -> None:
            try:
                function(*args)
            finally:
                for tensor in self.reached.values():
                    self.unregister(tensor)
                self.reached.clear()

        return closing
