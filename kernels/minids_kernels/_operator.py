"""Registration of a room's ops: one operator of torch.library each, and a shorter way to it in eager mode.

Whatever traces (torch.compile, export, dispatch modes, tensor subclasses) meets an opaque operator with a fake and an
autograd formula. A plain eager call goes to the function itself, through an autograd.Function of the same formula if a
gradient is wanted, which saves about 50 us of Python a call and its backward, as much as many a kernel takes.
Test: tests/kernels/test_operator.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix

__all__ = ["Operator", "operator"]

PLAIN = (Tensor, torch.nn.Parameter)  # their subclasses have ways of their own


class Operator:
    """`function` as an operator. Arguments are positional. A gradient of a gradient is refused by torch.library, unless
    the backward is made of operators that have one."""

    def __init__(self, name: str, function: Callable, mutates_args: Iterable[str]) -> None:
        self.function = function
        self.registered = torch.library.custom_op(add_op_namespace_prefix(name), function, mutates_args=mutates_args)
        self._direct: Callable | None = None
        self.register_fake = self.registered.register_fake

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = self.function

        def forward(ctx: Any, *args: Any) -> Any:
            output = function(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._direct = type(function.__name__, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _is_traced():
            return self.registered(*args)
        tensors = [x for x in args if isinstance(x, Tensor)]
        listed = [x for some in args if isinstance(some, list) for x in some]
        if any(type(x) not in PLAIN for x in (*tensors, *listed)):
            return self.registered(*args)
        wanted, of_lists = (torch.is_grad_enabled() and any(x.requires_grad for x in xs) for xs in (tensors, listed))
        if not wanted and not of_lists:
            return self.function(*args)
        if self._direct is None or of_lists:  # autograd.Function does not look into lists
            return self.registered(*args)
        return self._direct(*args)


def _is_traced() -> bool:
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


def operator(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable], Operator]:
    """Decorator: registers the function as operator `name`; `mutates_args` names those that it writes to."""
    return lambda function: Operator(name, function, mutates_args)
