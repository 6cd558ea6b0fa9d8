"""The model sizes that benchmarks run."""

from minids.config import ModelConfig

# Small enough for two CPU cores, with every part of the architecture: 9.4M parameters, 7.75M without the embedding.
MINI = ModelConfig(
    vocab_size=6400, hidden_size=256, intermediate_size=768, moe_intermediate_size=128, num_hidden_layers=6,
    num_attention_heads=8, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, num_nextn_predict_layers=0,
    max_position_embeddings=4096,
)  # fmt: skip
