"""minids: a mini DeepSeek-V3, trained from scratch.

    import minids
    model, tokenizer = minids.load(path)  # a run folder, one of its checkpoints, or a Hugging Face DeepseekV3 folder

Importing this package loads nothing heavy: the names below are looked up when first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minids.config import ModelConfig
    from minids.loading import load
    from minids.model.model import DeepseekV3

__all__ = ["DeepseekV3", "ModelConfig", "__version__", "load"]
__version__ = "0.1.0"

_HOMES = {"DeepseekV3": "minids.model.model", "ModelConfig": "minids.config", "load": "minids.loading"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minids' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
