"""`minids.load`: a model ready to generate, and its tokenizer, from any folder that holds one."""

from __future__ import annotations

from pathlib import Path

import torch

from minids.convert.hf import checkpoint_tokenizer, load_hf, load_tokenizer
from minids.infer.generate import LanguageModel
from minids.tokenizer import Tokenizer
from minids.train.checkpoint import CONFIG, STATE, load_checkpoint, load_model_config, resolve


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[LanguageModel, Tokenizer]:
    """The model (in eval mode, with `.generate`) and the tokenizer in `path`: a run folder, one of its checkpoints, or
    a Hugging Face DeepseekV3 folder, which is read where it is.

    `dtype`: of the weights; None keeps what is stored (fp32 in our checkpoints, config.json's dtype in a Hugging Face
    folder). Raises InputError when `path` is none of them or what it holds is damaged.
    """
    path = Path(path)
    if (path / CONFIG).is_file() and not (path / STATE).is_file():
        model = load_hf(path, LanguageModel, dtype)
        tokenizer = load_tokenizer(path, model.config)
    else:
        checkpoint = resolve(path)
        model = LanguageModel(load_model_config(checkpoint))
        load_checkpoint(checkpoint, model)
        tokenizer = checkpoint_tokenizer(checkpoint, model.config)
        if dtype is not None:
            for parameter in model.parameters():  # the router bias, a buffer, stays fp32
                parameter.data = parameter.data.to(dtype)
    return model.to(device).eval(), tokenizer
