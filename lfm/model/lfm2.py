"""LFM2 and LFM2-MoE: the maths, once, for training and for serving.

    h = embed[ids]
    per layer:  h = h + operator(operator_norm(h));  h = h + feed_forward(ffn_norm(h))
    hidden = embedding_norm(h);  logits = hidden @ head^T         (embedding_norm is the FINAL norm, despite its name)

Operator: double-gated short convolution, or grouped-query attention with per-head q/k norm before RoPE.
Feed-forward: SwiGLU in the first `num_dense_layers` layers (all of them in dense LFM2), then experts behind a sigmoid
router. Parameters carry the checkpoint's names. This file knows nothing of blocks, rows or devices: the ops do.
bf16 rounding points: norm out, u, conv out, expert out, h; an op may keep more precision, never less.
Source: transformers modeling_lfm2.py and modeling_lfm2_moe.py.
Legend: T tokens, D hidden, H q heads, G kv heads, K head dim, E experts, F expert width, L window, N blocks, V vocab.
"""

import torch
from torch import Tensor, nn

from lfm.config import ModelConfig
from lfm.kernels.attention import rope_tables
from lfm.kernels.forward_batch import CacheTensors, ForwardBatch
from lfm.kernels.weights import ExpertScales, Linear, Norm, Rope, Router
from lfm.model.ops import Ops


class Weight(nn.Module):
    """A named weight, with an optional bias: the leaf of every checkpoint name. `scale`: of a weight in fp8."""

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None
        self.scale: Tensor | None = None

    @property
    def linear(self) -> Linear:
        return Linear(self.weight, self.bias, self.scale)


class RmsNorm(Weight):
    """The weight of an RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size)
        self.eps = eps

    @property
    def norm(self) -> Norm:
        return Norm(self.weight, self.eps)


class ShortConv(nn.Module):
    """One short convolution; in_proj's rows are B, C, x."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.conv_bias
        self.in_proj = Weight(3 * hidden, hidden, bias=bias)
        self.conv = Weight(hidden, 1, config.conv_L_cache, bias=bias)
        self.out_proj = Weight(hidden, hidden, bias=bias)

    def forward(self, h_TD: Tensor, norm: Norm, batch: ForwardBatch, tails_NLD: Tensor, ops: Ops) -> Tensor:
        conv = Linear(self.conv.weight[:, 0], self.conv.bias)
        y_TD = ops.conv_in(h_TD, norm, self.in_proj.linear, conv, batch, tails_NLD)
        return ops.project_add(h_TD, y_TD, self.out_proj.linear)


class Attention(nn.Module):
    """One grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.q_proj = Weight(config.num_attention_heads * head_dim, hidden)
        self.k_proj = Weight(config.num_key_value_heads * head_dim, hidden)
        self.v_proj = Weight(config.num_key_value_heads * head_dim, hidden)
        self.out_proj = Weight(hidden, config.num_attention_heads * head_dim)
        self.q_layernorm = RmsNorm(head_dim, config.norm_eps)
        self.k_layernorm = RmsNorm(head_dim, config.norm_eps)
        self.merged_qkv: Linear | None = None  # set by `pack`: q, k and v are views of it

    def forward(
        self, h_TD: Tensor, norm: Norm, rope: Rope, batch: ForwardBatch, kv: tuple[Tensor, Tensor], ops: Ops
    ) -> Tensor:
        qkv = self.merged_qkv or merge(self.q_proj, self.k_proj, self.v_proj)
        q_norm, k_norm = self.q_layernorm.norm, self.k_layernorm.norm
        q_THK, k_TGK, v_TGK = ops.qkv(h_TD, norm, qkv, q_norm, k_norm, rope, batch, *kv)
        o_THK = ops.attend(q_THK, k_TGK, v_TGK, batch, *kv)
        return ops.project_add(h_TD, o_THK.flatten(1), self.out_proj.linear)


class DenseFeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Weight(config.intermediate_size, config.hidden_size)
        self.w3 = Weight(config.intermediate_size, config.hidden_size)
        self.w2 = Weight(config.hidden_size, config.intermediate_size)
        self.merged_gate_up: Linear | None = None  # set by `pack`: w1 and w3 are views of it

    def forward(self, h_TD: Tensor, norm: Norm, batch: ForwardBatch, ops: Ops) -> Tensor:
        return ops.dense(h_TD, norm, self.merged_gate_up or merge(self.w1, self.w3), self.w2.linear)


def merge(*parts: Weight) -> Linear:
    """Projections of the same input as one: the parts' rows, one part after the other."""
    scales = [part.scale for part in parts if part.scale is not None]
    return Linear(torch.cat([part.weight for part in parts]), scale=torch.cat(scales) if scales else None)


class Experts(nn.Module):
    """All experts of a layer, fused: rows 0..F-1 of gate_up_proj are w1 (gate), F..2F-1 are w3 (up)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.scales: ExpertScales | None = None  # of weights in fp8


class MoeFeedForward(nn.Module):
    """Router and experts. `expert_bias` (fp32, selection only) is state, not a trained parameter."""

    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Weight(config.num_experts, config.hidden_size)
        self.experts = Experts(config)
        bias = torch.empty(config.num_experts, dtype=torch.float32) if config.use_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(
        self, h_TD: Tensor, norm: Norm, batch: ForwardBatch, ops: Ops, next_norm: Norm | None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream [T, D] and, where the op makes it, `next_norm` of it."""
        config = self.config
        router = Router(
            gate=self.gate.weight,
            bias=self.expert_bias,
            num_chosen=config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )
        weights = self.experts.gate_up_proj, self.experts.down_proj, self.experts.scales
        if ops.moe is not None and next_norm is not None:
            return ops.moe(h_TD, norm, router, batch.is_real_T, *weights, next_norm)
        x_TD, chosen_TA, weights_TA = ops.route(h_TD, norm, router, batch.is_real_T)
        return ops.experts(h_TD, x_TD, chosen_TA, weights_TA, *weights), None


class Layer(nn.Module):
    """One decoder layer: an operator and a feed-forward, each behind its norm."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        if config.layer_types[index] == "conv":
            self.conv = ShortConv(config)
        else:
            self.self_attn = Attention(config)
        self.feed_forward = MoeFeedForward(config) if config.is_moe_layer(index) else DenseFeedForward(config)
        self.operator_norm = RmsNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = RmsNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        h_TD: Tensor,
        known_TD: Tensor | None,
        rope: Rope,
        batch: ForwardBatch,
        state: Tensor | tuple[Tensor, Tensor],
        ops: Ops,
        next_norm: Norm | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after the layer [T, D] and, if an op has made it, the next layer's norm of it.

        `known_TD`: the latter of the layer before. `state`: the conv tails, or K and V, of the layer in the pool.
        """
        norm = self.operator_norm.norm._replace(known=known_TD)
        if isinstance(state, tuple):
            h_TD = self.self_attn(h_TD, norm, rope, batch, state, ops)
        else:
            h_TD = self.conv(h_TD, norm, batch, state, ops)
        if isinstance(self.feed_forward, MoeFeedForward):
            moe: tuple[Tensor, Tensor | None] = self.feed_forward(h_TD, self.ffn_norm.norm, batch, ops, next_norm)
            return moe
        return self.feed_forward(h_TD, self.ffn_norm.norm, batch, ops), None


class Backbone(nn.Module):
    """Embedding, layers and final norm, under the checkpoint's prefix `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.embedding_norm = RmsNorm(config.hidden_size, config.norm_eps)


class Lfm2(nn.Module):
    """An LFM2 model. Build it under `torch.device("meta")` and let `weights.load_weights` give it storage."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = Weight(config.vocab_size, config.hidden_size)
        self._rope: Rope | None = None

    def forward(self, batch: ForwardBatch, cache: CacheTensors | None, ops: Ops) -> Tensor:
        """Hidden states after the final norm [T, D]; K, V and conv tails of the step go to `cache`, if there is one."""
        h_TD = torch.nn.functional.embedding(batch.ids_T, self.model.embed_tokens.weight)
        rope = self.rope(batch.num_positions)
        known_TD: Tensor | None = None
        states = _states(self.config, cache, h_TD)
        for layer, state, next_norm in zip(self.model.layers, states, self._next_norms(ops), strict=True):
            h_TD, known_TD = layer(h_TD, known_TD, rope, batch, state, ops, next_norm)
        return ops.norm(h_TD, self.model.embedding_norm.norm._replace(known=known_TD))

    def _next_norms(self, ops: Ops) -> list[Norm | None]:
        """The norm behind each layer, where an op may ask for it."""
        if ops.moe is None:
            return [None] * len(self.model.layers)
        norms = [layer.operator_norm.norm for layer in self.model.layers if isinstance(layer, Layer)]
        return [*norms[1:], self.model.embedding_norm.norm]

    def head(self, hidden_RD: Tensor, ops: Ops) -> Tensor:
        """Logits [R, V] of the rows that need a token."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return ops.head(hidden_RD, head.linear)

    def rope(self, num_positions: int) -> Rope:
        """Rotary tables for at least `num_positions`; kept, and made again only when a longer one is asked for."""
        weight, config = self.model.embed_tokens.weight, self.config
        kept = self._rope
        if kept is None or len(kept.cos) < num_positions or kept.cos.device != weight.device:
            kept = rope_tables(
                num_positions, config.head_dim, config.rope_theta, dtype=weight.dtype, device=weight.device
            )
            self._rope = kept
        return kept


def _states(config: ModelConfig, cache: CacheTensors | None, like: Tensor) -> list[Tensor | tuple[Tensor, Tensor]]:
    """Per layer: (K, V) of an attention layer, or the tails of a conv layer; empty tensors where there is no cache."""
    if cache is None:
        no_tails, no_kv = like.new_empty(0), like.new_empty(0, config.num_key_value_heads, 0, config.head_dim)
        return [no_tails if kind == "conv" else (no_kv, no_kv) for kind in config.layer_types]
    tails, kv = iter(cache.tails), iter(zip(cache.k, cache.v, strict=True))
    return [next(tails) if kind == "conv" else next(kv) for kind in config.layer_types]
