"""DeepSeek-V3 as a causal language model: embedding, blocks, norm, untied head, and multi-token prediction modules.

Sequences [B, T] are flattened to one row of tokens; documents in them are told apart by cu_seqlens (FlashAttention's
convention: int32 [documents + 1], from 0 to B * T) and never attend to each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from minids_kernels import linear_cross_entropy
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.device import queue_copy
from minids.model.block import Block
from minids.model.moe import Experts, Gate, MoE, Routing, balance_loss, update_biases
from minids.model.mtp import MTPBlock
from minids.model.norm import AddRMSNorm
from minids.model.rope import rope_angles
from minids.precision import product_dtype

IGNORE = -100


@dataclass
class CausalLMOutput:
    """logits [B, T, V]; loss: mean negative log-likelihood in nats over the counted labels, None without labels."""

    logits: Tensor
    loss: Tensor | None


@dataclass
class Losses:
    """Sums over a batch, so that batches of different token counts can be added up exactly.

    nll_sum: nats over the `tokens` counted targets; mtp_nll_sum, mtp_tokens: the same for each prediction depth;
    balance: the MoE layers' sequence-wise balance losses, added up; expert_counts [MoE layers, E]. Counts lie on the
    model's device too: whoever reads one as a number waits for it.
    """

    nll_sum: Tensor
    tokens: Tensor
    mtp_nll_sum: list[Tensor]
    mtp_tokens: list[Tensor]
    balance: Tensor
    expert_counts: Tensor


@dataclass
class _Packed:
    """A batch as the layers see it: everything per token, documents by cu_seqlens."""

    input_ids: Tensor  # [T]
    cu_seqlens: Tensor  # int32 [documents + 1]
    document_end: Tensor  # [T], index behind each token's document
    cos: Tensor
    sin: Tensor

    def targets(self, labels: Tensor, ahead: int) -> Tensor:
        """[T]: the label `ahead` tokens on, IGNORE where that is another document's."""
        if labels.numel() != self.input_ids.numel():
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, allowed is one for each input id")
        index = torch.arange(labels.numel(), device=labels.device) + ahead
        shifted = labels.flatten().roll(-ahead)
        return shifted.masked_fill(index >= self.document_end, IGNORE)


class Backbone(nn.Module):
    """Blocks 0..L-1, then the MTP blocks L..L+D-1, as numbered in the official checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        main = config.num_hidden_layers
        self.layers = nn.ModuleList(
            [Block(config, index) for index in range(main)]
            + [MTPBlock(config, main + depth) for depth in range(config.num_nextn_predict_layers)]
        )
        self.norm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)


class DeepseekV3(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, initializer_range) for every matrix, ones for norms, zero expert bias."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Gate):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            elif isinstance(module, Experts):
                nn.init.normal_(module.gate_up_proj, std=self.config.initializer_range)
                nn.init.normal_(module.down_proj, std=self.config.initializer_range)

    def num_parameters(self, active: bool = False) -> int:
        """Parameters of the main model, without MTP modules; `active`: those one token passes through."""
        config = self.config
        mtp = tuple(f"model.layers.{config.num_hidden_layers + d}." for d in range(config.num_nextn_predict_layers))
        total = sum(p.numel() for name, p in self.named_parameters() if not name.startswith(mtp))
        if active:
            expert = 3 * config.hidden_size * config.moe_intermediate_size
            total -= config.num_moe_layers * (config.n_routed_experts - config.num_experts_per_tok) * expert
        return total

    def _pack(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> _Packed:
        rows, length = input_ids.shape
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids: got sequences of {length} tokens, allowed is at most max_position_embeddings = "
                f"{self.config.max_position_embeddings}"
            )
        device, tokens = input_ids.device, rows * length
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, tokens + 1, max(length, 1), dtype=torch.int32, device=device)
        elif cu_seqlens.device.type == "cpu" and (  # looking at others would have to be waited for
            cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (cu_seqlens.diff() < 0).any()
        ):
            raise ValueError(f"cu_seqlens: got {cu_seqlens.tolist()}, allowed is 0, rising, to {tokens} tokens")
        cu_seqlens = queue_copy(cu_seqlens, device)  # once, not in every layer
        lengths, bounds = cu_seqlens.diff(), cu_seqlens.long()
        start, end = (b.repeat_interleave(lengths, output_size=tokens) for b in (bounds[:-1], bounds[1:]))
        index = torch.arange(tokens, device=device)
        cos, sin = rope_angles(self.config, index - start)
        return _Packed(input_ids.flatten(), cu_seqlens, end, cos, sin)

    def _embedded(self, input_ids: Tensor) -> Tensor:
        """[T] -> [T, D] in the precision of products, under autocast too: what layers add up is kept in it."""
        x: Tensor = self.model.embed_tokens(input_ids)
        return x.to(product_dtype(x))

    def _hidden(self, batch: _Packed) -> tuple[Tensor, list[Routing]]:
        """Main model's normed hidden states [T, D] and its MoE layers' routing."""
        x, residual = self._embedded(batch.input_ids), None
        routings: list[Routing] = []
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            x, residual, routing = layer(x, residual, batch.cos, batch.sin, batch.cu_seqlens)
            if routing is not None:
                routings.append(routing)
        return self.model.norm(x, residual)[0], routings

    def _mtp_hidden(self, batch: _Packed, hidden: Tensor, depth: int) -> tuple[Tensor, Routing | None]:
        """Normed hidden [T, D] of MTP module `depth` (0-based) from that of the depth before. Places whose further
        token lies in the next document hold no prediction; being last, they are seen by none that do."""
        layer = self.model.layers[self.config.num_hidden_layers + depth]
        embedded = self._embedded(batch.input_ids.roll(-1 - depth))
        return layer.predict(embedded, hidden, batch.cos, batch.sin, batch.cu_seqlens)  # type: ignore[operator]

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> CausalLMOutput:
        """input_ids [B, T] int64, labels [B, T] (shifted inside, -100 ignored) -> logits [B, T, V] and the mean loss.

        Without cu_seqlens every row is one document. Those on a GPU are trusted, since looking would wait for it.
        Raises ValueError for T over max_position_embeddings, cu_seqlens that do not cover the batch, or labels of
        another size.
        """
        batch = self._pack(input_ids, cu_seqlens)
        hidden, _ = self._hidden(batch)
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), batch.targets(labels, 1), ignore_index=IGNORE)
        return CausalLMOutput(logits.view(*input_ids.shape, -1), loss)

    def losses(self, input_ids: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, mtp: bool = True) -> Losses:
        """Training losses of a batch without its [T, V] logits; arguments as `forward`. `mtp` False leaves the MTP
        modules out (evaluation)."""
        batch = self._pack(input_ids, cu_seqlens)
        hidden, routings = self._hidden(batch)
        nll, tokens = self._nll(hidden, batch.targets(labels, 1))
        mtp_nll: list[Tensor] = []
        mtp_tokens: list[Tensor] = []
        for depth in range(self.config.num_nextn_predict_layers if mtp else 0):
            hidden, routing = self._mtp_hidden(batch, hidden, depth)
            depth_nll, depth_tokens = self._nll(hidden, batch.targets(labels, 2 + depth))
            mtp_nll.append(depth_nll)
            mtp_tokens.append(depth_tokens)
            if routing is not None:
                routings.append(routing)
        balance, counts = nll.new_zeros(0), nll.new_zeros(0, 0)
        if routings:
            # behind a row's last label nothing is trained on: padding, mostly
            real = (labels != IGNORE).flip(1).cumsum(1).flip(1) > 0
            balance, counts = balance_loss(routings, real)
        return Losses(nll, tokens, mtp_nll, mtp_tokens, balance.sum(), counts)

    def _nll(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nll = linear_cross_entropy(hidden, self.lm_head.weight, targets, IGNORE, reduction="sum")
        return nll, (targets != IGNORE).sum()

    def token_log_probs(self, input_ids: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """[B * T] fp32: log-probability of the label at each place given the tokens before it, 0 where the label is
        -100 or a document's first token. Differentiable."""
        batch = self._pack(input_ids, cu_seqlens)
        hidden, _ = self._hidden(batch)
        log_prob = -linear_cross_entropy(hidden, self.lm_head.weight, batch.targets(labels, 1), IGNORE)
        return F.pad(log_prob[:-1], (1, 0))

    def update_expert_bias(self, expert_counts: Tensor, speed: float) -> None:
        """Auxiliary-loss-free balancing after an optimizer step. expert_counts [MoE layers, E] as in `Losses`, summed
        over the step's batches; layers in order, MTP modules last (a step without those gives the first rows only)."""
        gates = [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MoE)]
        if gates:
            update_biases(gates[: len(expert_counts)], expert_counts, speed)
