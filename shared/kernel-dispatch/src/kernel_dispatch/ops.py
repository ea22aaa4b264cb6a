"""Registration with `torch.library`, so that `torch.compile` and `torch.export` see through an operation.

An operation registers once and decides per call: `needs_op(...)` tells whether someone is watching (a tracer,
a dispatch mode, autograd), and only then does the call pay for the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from .errors import ArgumentError

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def register_op(
    name: str,
    fn: Callable[..., Any],
    mutates_args: tuple[str, ...],
    fake: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers `fn` as the custom op `name` ("namespace::op") and returns the callable that dispatches.

    fn: fully annotated, as `torch.library.custom_op` asks. mutates_args: names of the arguments fn writes to.
    fake: the shape function, same arguments, returning empty tensors; an op that returns nothing needs none.
    Raises ArgumentError naming `fake` where fn returns something and no fake says what.
    """
    if fake is None and _returns(torch.library.infer_schema(fn, mutates_args=mutates_args)):
        raise ArgumentError("fake", f"None, expected a shape function, for {name} returns a value")
    op = torch.library.custom_op(name, fn, mutates_args=mutates_args)
    if fake is not None:
        op.register_fake(fake)
    return op


def is_watched() -> bool:
    """Whether torch.compile or torch.export traces, or a dispatch mode or functorch transform is active."""
    return is_compiling() or _len_torch_dispatch_stack() > 0 or peek_interpreter_stack() is not None


def is_plain(tensor: object) -> bool:
    """Whether it is a tensor or a parameter itself, and of no subclass, whose values may be elsewhere."""
    return type(tensor) in _PLAIN_TYPES


def needs_op(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on `tensors` must go through the dispatcher rather than straight to the kernel.

    True where `is_watched()`, for a tensor subclass (FakeTensor among them), and for a tensor that autograd
    tracks.
    """
    if is_watched():
        return True
    grad_enabled = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (not is_plain(tensor) or (grad_enabled and tensor.requires_grad)):
            return True
    return False


def _returns(schema: str) -> bool:
    """Whether a schema such as "(Tensor x) -> Tensor" has a result."""
    return not schema.endswith("-> ()")
