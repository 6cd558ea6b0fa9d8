"""Puts these kernels into a loaded transformers DeepseekV3ForCausalLM, and takes them out again.

    undo = apply_to_transformers(model)
    ...
    undo()

Replaced is the forward of its RMSNorms and of its routed experts (where their activation is silu), instance by
instance: weights, hooks, state_dict and other models of the process stay as they are. Not replaced is the dense MLP:
its gate and up projections are two matrices, whose products would have to be copied side by side first.
transformers itself is not imported: its classes are known by their names.
Test: tests/kernels/test_compat_transformers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..layers import RMSNorm
from ..moe import moe_experts

__all__ = ["apply_to_transformers"]

FAMILY = "DeepseekV3PreTrainedModel"


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return moe_experts(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)


def _replacement(module: nn.Module, activation: str) -> Callable[..., Tensor] | None:
    match type(module).__name__:
        case "DeepseekV3RMSNorm":
            return RMSNorm.forward
        case "DeepseekV3Experts" if activation == "silu":
            return _experts
    return None


def apply_to_transformers(model: nn.Module) -> Callable[[], None]:
    """Serves `model`'s norms and experts by these kernels until the returned function is called, which restores it
    exactly (again: does nothing).

    Numbers differ by rounding: a norm rounds once, transformers' rounds before and after its weight. Under autocast a
    norm's output comes in autocast's dtype. Put hooks that replace forwards (accelerate, kernelize) on afterwards, and
    take them off before.

    Raises TypeError for a model of another class, ValueError where a forward has been replaced already, by this
    function or another; the model is then as it was.
    """
    if FAMILY not in {base.__name__ for base in type(model).__mro__}:
        raise TypeError(f"model: got {type(model).__name__}, allowed is transformers' DeepseekV3ForCausalLM")
    found = [
        (name, module, forward)
        for name, module in model.named_modules()
        if (forward := _replacement(module, model.config.hidden_act)) is not None  # type: ignore[union-attr, arg-type]
    ]
    for name, module, _ in found:
        if "forward" in vars(module):
            raise ValueError(f"model: the forward of {name} has been replaced already, allowed is its class's own")
    for _, module, forward in found:
        module.forward = MethodType(forward, module)

    def undo() -> None:
        while found:
            del found.pop()[1].forward

    return undo
