"""What a training step must compute at least, by the model's configuration alone."""

from __future__ import annotations

from minids.config import ModelConfig


def active_ffn_width(config: ModelConfig) -> int:
    """Width of the one dense SwiGLU that costs as much as the experts a token passes through."""
    return (config.num_experts_per_tok + config.n_shared_experts) * config.moe_intermediate_size


def active_matmul_parameters(config: ModelConfig) -> int:
    """Weights that one token is multiplied with: projections, active experts, gates and head; the embedding is looked
    up, and norms multiply nothing but elements. Without MTP modules."""
    width, heads = config.hidden_size, config.num_attention_heads
    queries = heads * config.qk_head_dim
    attention = (width * queries if config.q_lora_rank is None else config.q_lora_rank * (width + queries)) + width * (
        config.kv_lora_rank + config.qk_rope_head_dim
    )
    attention += heads * (
        config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim) + config.v_head_dim * width
    )
    dense = 3 * width * config.intermediate_size
    moe = 3 * width * active_ffn_width(config) + width * config.n_routed_experts
    moe_layers = config.num_moe_layers
    ffn = (config.num_hidden_layers - moe_layers) * dense + moe_layers * moe
    return config.num_hidden_layers * attention + ffn + width * config.vocab_size


def training_flops_per_token(config: ModelConfig, length: int) -> float:
    """6 N + 3 L H (d_qk + d_v) T, with N = `active_matmul_parameters`, L layers of H heads, sequences of T tokens.

    A product of a weight costs 2 FLOPs forward and, for the gradients of its input and of the weight, 4 backward. In
    attention a query meets T / 2 keys on average: 2 (d_qk + d_v) T / 2 a head forward and twice that backward. What is
    computed a second time (scores in attention's backward, logits in the loss's) does not count."""
    attention = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * length
    return 6.0 * active_matmul_parameters(config) + 3.0 * config.num_hidden_layers * attention
