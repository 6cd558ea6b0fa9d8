"""Kernels of DeepSeek-V3's architecture: what a room offers is what its `__all__` says; import from here only."""

from . import layers
from .cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from .fp8_gemm import fp8_gemm, fp8_gemm_reference, fp8_gemm_wgrad, fp8_gemm_wgrad_reference
from .fp8_linear import fp8_linear, fp8_linear_reference
from .fp8_mlp import fp8_mlp, fp8_mlp_reference
from .fp8_quant import (
    dequantize_blocks,
    dequantize_tiles,
    quantize_blocks,
    quantize_blocks_reference,
    quantize_tiles,
    quantize_tiles_both,
    quantize_tiles_both_reference,
    quantize_tiles_reference,
    quantize_tiles_transposed,
    quantize_tiles_transposed_reference,
)
from .grouped_fp8_gemm import (
    grouped_fp8_gemm,
    grouped_fp8_gemm_masked,
    grouped_fp8_gemm_reference,
    grouped_fp8_gemm_wgrad,
    grouped_fp8_gemm_wgrad_reference,
    quantize_segments_transposed,
    quantize_segments_transposed_reference,
)
from .grouped_fp8_linear import grouped_fp8_linear, grouped_fp8_linear_reference
from .grouped_gemm import grouped_gemm, grouped_gemm_reference
from .mla_attention import mla_attention, mla_attention_reference
from .mla_cache import quantize_latent_cache, write_latent_cache, write_latent_cache_reference
from .mla_decode import mla_decode, mla_decode_reference
from .mla_prefill import mla_prefill, mla_prefill_reference
from .moe import moe_experts, moe_experts_reference, moe_permute, moe_unpermute
from .moe_gate import moe_gate, moe_gate_reference
from .moe_plan import MoePlan, moe_plan, moe_plan_reference
from .precompile import precompile
from .rms_norm import rms_norm, rms_norm_reference
from .rms_norm_quant import rms_norm_quant, rms_norm_quant_reference
from .rope import rope, rope_reference
from .swiglu import swiglu, swiglu_reference
from .swiglu_quant import (
    swiglu_backward_quant,
    swiglu_backward_quant_reference,
    swiglu_quant,
    swiglu_quant_reference,
)

__all__ = [
    "MoePlan",
    "dequantize_blocks",
    "dequantize_tiles",
    "fp8_gemm",
    "fp8_gemm_reference",
    "fp8_gemm_wgrad",
    "fp8_gemm_wgrad_reference",
    "fp8_linear",
    "fp8_linear_reference",
    "fp8_mlp",
    "fp8_mlp_reference",
    "grouped_fp8_gemm",
    "grouped_fp8_gemm_masked",
    "grouped_fp8_gemm_reference",
    "grouped_fp8_gemm_wgrad",
    "grouped_fp8_gemm_wgrad_reference",
    "grouped_fp8_linear",
    "grouped_fp8_linear_reference",
    "grouped_gemm",
    "grouped_gemm_reference",
    "layers",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "mla_attention",
    "mla_attention_reference",
    "mla_decode",
    "mla_decode_reference",
    "mla_prefill",
    "mla_prefill_reference",
    "moe_experts",
    "moe_experts_reference",
    "moe_gate",
    "moe_gate_reference",
    "moe_permute",
    "moe_plan",
    "moe_plan_reference",
    "moe_unpermute",
    "precompile",
    "quantize_blocks",
    "quantize_blocks_reference",
    "quantize_latent_cache",
    "quantize_segments_transposed",
    "quantize_segments_transposed_reference",
    "quantize_tiles",
    "quantize_tiles_both",
    "quantize_tiles_both_reference",
    "quantize_tiles_reference",
    "quantize_tiles_transposed",
    "quantize_tiles_transposed_reference",
    "rms_norm",
    "rms_norm_quant",
    "rms_norm_quant_reference",
    "rms_norm_reference",
    "rope",
    "rope_reference",
    "swiglu",
    "swiglu_backward_quant",
    "swiglu_backward_quant_reference",
    "swiglu_quant",
    "swiglu_quant_reference",
    "swiglu_reference",
    "write_latent_cache",
    "write_latent_cache_reference",
]
