"""The namespace of this package's operators in torch.library.

Hugging Face's kernel builder replaces this file by one with the same two names and a namespace unique to the build, so
that two versions can live in one process; rooms therefore name their ops through `add_op_namespace_prefix` only.
"""

from __future__ import annotations

import torch

__all__ = ["add_op_namespace_prefix", "ops"]

_NAMESPACE = "minids_kernels"

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{_NAMESPACE}::{op_name}"
