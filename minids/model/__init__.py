"""The DeepSeek-V3 architecture in plain PyTorch on top of minids_kernels. Parameter names are Hugging Face's."""

from minids.model.model import CausalLMOutput, DeepseekV3, Losses

__all__ = ["CausalLMOutput", "DeepseekV3", "Losses"]
