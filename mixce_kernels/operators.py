"""Operators of `torch.library` whose arguments are the fields of a record, and the way an eager call reaches them.

A record is a NamedTuple of tensors, numbers and names. Its fields in their order are the operator's schema; those of a
record within it, as `TokenOptions`, take that one's place. Kernels, derivatives and callers know fields by name.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode

from mixce_kernels.backends.layout import materialized, needs_copy

R = TypeVar("R", bound="tuple[Any, ...]")

NAMESPACE = "mixce_kernels"
library = torch.library.Library(NAMESPACE, "DEF")

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    int | None: "int?",
    float: "float",
    float | None: "float?",
    str: "str",
    list[bool]: "bool[]",
    torch.dtype: "ScalarType",
}


class Fields(Generic[R]):
    """The fields of a record in a row: as an operator has its arguments."""

    def __init__(self, record: type[R]) -> None:
        """Takes a NamedTuple whose fields have a type of a schema, or are such records."""
        self.record = record
        self.names: list[str] = []
        self._paths: list[str] = []
        self._schemas: list[str] = []
        # Records within this one, from the first to the last, by their place among its own fields.
        self._within: list[tuple[int, Fields[Any]]] = []
        for i, (name, hint) in enumerate(typing.get_type_hints(record).items()):
            if hint in _TYPES:
                self.names.append(name)
                self._paths.append(name)
                self._schemas.append(_TYPES[hint])
            else:
                within = Fields(hint)
                self._within.append((i, within))
                self.names += within.names
                self._paths += [f"{name}.{path}" for path in within._paths]
                self._schemas += within._schemas
        self._tensors = [i for i, schema in enumerate(self._schemas) if schema.startswith("Tensor")]
        self.tensor_names = [self.names[i] for i in self._tensors]
        paths = [self._paths[i] for i in self._tensors]
        # For less than two it gives no tuple; an operator's record has more.
        self._get_tensors = attrgetter(*paths) if len(paths) > 1 else None

    def schema(self, writes: str | None = None) -> str:
        """The arguments of an operator that writes to the one of that name."""
        types = [
            f"{schema}(a!)" if name == writes else schema
            for name, schema in zip(self.names, self._schemas, strict=True)
        ]
        return ", ".join(f"{schema} {name}" for name, schema in zip(self.names, types, strict=True))

    def flat(self, record: R) -> tuple[Any, ...]:
        """The arguments of a record in a row."""
        values: tuple[Any, ...] = record
        for i, within in reversed(self._within):
            values = (*values[:i], *within.flat(values[i]), *values[i + 1 :])
        return values

    def of(self, values: tuple[Any, ...]) -> R:
        """The record of arguments in a row."""
        for i, within in self._within:
            end = i + len(within.names)
            values = (*values[:i], within.of(values[i:end]), *values[end:])
        return self.record(*values)

    def tensors_of(self, record: R) -> tuple[Tensor | None, ...]:
        """The tensors of a record in a row, None where one may be missing and is."""
        assert self._get_tensors is not None
        found: tuple[Tensor | None, ...] = self._get_tensors(record)
        return found

    def with_tensors(self, values: Sequence[Any], tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
        """Arguments in a row with these in the places of tensors."""
        values = list(values)
        for i, tensor in zip(self._tensors, tensors, strict=False):
            values[i] = tensor
        return tuple(values)

    def save(self, ctx: Any, record: R, *others: Tensor | None) -> None:
        """Keeps a record, and other tensors, for backward: its tensors under whatever hooks there are."""
        values = self.flat(record)
        ctx.save_for_backward(*self.tensors_of(record), *others)
        ctx.values = self.with_tensors(values, (None,) * len(self._tensors))

    def saved(self, ctx: Any) -> tuple[R, tuple[Any, ...]]:
        """The record that was kept, and the other tensors."""
        tensors = ctx.saved_tensors  # once: a checkpoint's hooks recompute them
        return self.of(self.with_tensors(ctx.values, tensors)), tensors[len(self._tensors) :]


class Operator(Generic[R]):
    """An operator: what it does to a record of arguments, and for a compiler the shapes of what it returns."""

    def __init__(
        self,
        kernel: Callable[[R], Any],
        returns: str,
        fake: Callable[[R], Any] = lambda _: None,
        *,
        writes: str | None = None,
    ) -> None:
        """Defines the operator of the kernel's name.

        Args:
            kernel: takes the record that its argument is annotated with.
            returns: the schema of what it returns.
            fake: makes empty tensors of the same shapes.
            writes: the name of the argument that is written to.
        """
        (record,) = (hint for name, hint in typing.get_type_hints(kernel).items() if name != "return")
        self.name = kernel.__name__
        self.kernel = kernel
        self.fields: Fields[R] = Fields(record)
        library.define(f"{self.name}({self.fields.schema(writes)}) -> ({returns})")
        self.of_values = self._of_values(kernel)
        library.impl(self.name, self.of_values, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self._of_values(fake), lib=library)
        # By way of the dispatcher, with the arguments in a row.
        self.dispatched = getattr(getattr(torch.ops, NAMESPACE), self.name)

    def _of_values(self, function: Callable[[R], Any]) -> Callable[..., Any]:
        def of_values(*values: Any) -> Any:
            result = function(self.fields.of(values))
            return without_none(result) if isinstance(result, tuple) else result

        return of_values

    def __call__(self, record: R) -> Any:
        """The kernel itself, which autograd does not see; None for results that were not asked for."""
        return self.kernel(record)


class Differentiable(Generic[R]):
    """An operator with its derivative, called through the dispatcher only where somebody listens there.

    A compiler, a dispatch mode or a tensor subclass needs the dispatcher; an eager call of plain tensors would only pay
    for it, tens of microseconds a call.
    """

    def __init__(
        self,
        operator: Operator[R],
        context: Callable[[Any, R, Any], None],
        backward: Callable[..., dict[str, Tensor | None]],
        vmap: Callable[[Differentiable[R], int, dict[str, int | None], R], Any],
    ) -> None:
        """Adds the derivative.

        Args:
            operator: what is differentiated.
            context: keeps, of the record and the results, what backward needs.
            backward: gives the gradients by the arguments' names; the others have none.
            vmap: calls this object for a batch: of its size and, by name, of the arguments' batched dimensions.
        """
        fields = operator.fields

        def context_of_values(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            context(ctx, fields.of(inputs), output)

        # Autograd looks at the tensors alone; the record, which has them too, comes last.
        def kernel_with_context(ctx: Any, *tensors_and_record: Any) -> Any:
            record = tensors_and_record[-1]
            output = operator.kernel(record)
            context(ctx, record, output)
            return output

        def all_grads(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(map(backward(ctx, *grads).get, fields.names))

        def grads_of_tensors(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return *map(backward(ctx, *grads).get, fields.tensor_names), None

        def batched(info: Any, in_dims: tuple[int | None, ...], *values: Any) -> Any:
            dims = dict(zip(fields.names, in_dims, strict=True))
            return vmap(self, info.batch_size, dims, fields.of(values))

        name = f"{NAMESPACE}::{operator.name}"
        torch.library.register_autograd(name, all_grads, setup_context=context_of_values, lib=library)
        torch.library.register_vmap(name, batched, lib=library)
        self.operator = operator
        self.fields = fields
        self.node = _function(operator.name, forward=kernel_with_context, backward=grads_of_tensors)
        # The form that torch.func asks for; it inspects its own signature at each call, which is slow.
        self.transformable_node = _function(
            operator.name,
            forward=operator.of_values,
            setup_context=context_of_values,
            backward=all_grads,
            vmap=batched,
        )

    def __call__(self, record: R) -> Any:
        """What the operator returns, with its derivative where one is asked for."""
        if torch.compiler.is_compiling() or (is_in_torch_dispatch_mode() and not _collectives_are_watched()):
            return self.operator.dispatched(*self.fields.flat(record))
        tensors = self.fields.tensors_of(record)
        copies = differentiate = False
        for tensor in tensors:
            if tensor is None or (type(tensor) in _PLAIN and torch._C._dispatch_keys(tensor).raw_repr() in _SIMPLE):
                differentiate = differentiate or (tensor is not None and tensor.requires_grad)
                continue
            if type(tensor) not in _PLAIN or _is_batch_of_grads(tensor):
                return self.operator.dispatched(*self.fields.flat(record))
            copies = copies or _needs_copy(tensor)
            differentiate = differentiate or tensor.requires_grad
        if torch._C._are_functorch_transforms_active():
            return self.transformable_node.apply(*self.fields.flat(record))
        if copies:
            tensors = tuple(None if tensor is None else materialized(tensor) for tensor in tensors)
            record = self.fields.of(self.fields.with_tensors(self.fields.flat(record), tensors))
        # In forward mode a node says that it has no such derivative; a kernel would lose it silently.
        if (differentiate and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
            return self.node.apply(*tensors, record)
        return self.operator.kernel(record)


_PLAIN = frozenset((Tensor, Parameter))
# The sets of dispatch keys of tensors that were found to be what their memory holds, and no batches.
_SIMPLE: set[int] = set()


def _needs_copy(tensor: Tensor) -> bool:
    """Whether memory does not hold the tensor as it is; its dispatch keys say so, and need no second look."""
    needed = needs_copy(tensor)
    if not needed and not torch._C._are_functorch_transforms_active():
        _SIMPLE.add(torch._C._dispatch_keys(tensor).raw_repr())
    return needed


def without_none(results: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Results with [0] for those that are missing, since a schema knows no such."""
    return tuple(results[0].new_empty(0) if one is None else one for one in results)


def given(result: Tensor | None) -> Tensor | None:
    """A result that may be missing, from an operator: None where it is, also as `without_none` has it."""
    return None if result is None or result.shape == (0,) else result


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has memory of its own, and is none that a compiler traces or a transformation batches."""
    batched = torch._C._functorch.is_batchedtensor(tensor) or _is_batch_of_grads(tensor)
    return type(tensor) is Tensor and not batched


def _is_batch_of_grads(tensor: Tensor) -> bool:
    """Whether these are upstream gradients of `torch.autograd.grad(is_grads_batched=True)`."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def _collectives_are_watched() -> bool:
    """Whether the dispatch modes are those of CommDebugMode, which sees no collective inside of an operator."""
    return all(type(mode).__name__ == "CommDebugMode" for mode in _get_current_dispatch_mode_stack())


def _function(name: str, **methods: Callable[..., Any]) -> Any:
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})
