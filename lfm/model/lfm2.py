"""LFM2 and LFM2-MoE: the maths, once, for training and for serving.

    h = embed[ids]
    per layer:  h = h + operator(operator_norm(h));  h = h + feed_forward(ffn_norm(h))
    hidden = embedding_norm(h);  logits = hidden @ head^T         (embedding_norm is the FINAL norm, despite its name)

Operator: double-gated short convolution, or grouped-query attention with per-head q/k norm before RoPE.
Feed-forward: SwiGLU in the first `num_dense_layers` layers (all of them in dense LFM2), then experts behind a sigmoid
router. Parameters carry the checkpoint's names. This file knows nothing of blocks, rows or devices: the ops do.
bf16 rounding points: norm out, u, conv out, expert out; an op may keep more precision, never less.
Source: transformers modeling_lfm2.py and modeling_lfm2_moe.py.
Legend: T tokens, D hidden, H q heads, G kv heads, K head dim, E experts, F expert width, L window, N blocks, V vocab.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from lfm.config import ModelConfig
from lfm.kernels.attention import rope_tables
from lfm.kernels.forward_batch import CacheTensors, ForwardBatch
from lfm.model.ops import Ops


class Weight(nn.Module):
    """A named weight, with an optional bias: the leaf of every checkpoint name."""

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None


class ShortConv(nn.Module):
    """Parameters of one short convolution; in_proj's rows are B, C, x."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.conv_bias
        self.in_proj = Weight(3 * hidden, hidden, bias=bias)
        self.conv = Weight(hidden, 1, config.conv_L_cache, bias=bias)
        self.out_proj = Weight(hidden, hidden, bias=bias)

    def forward(self, x_TD: Tensor, batch: ForwardBatch, tails_NLD: Tensor, ops: Ops) -> Tensor:
        bcx_T3D = ops.project(x_TD, self.in_proj.weight, self.in_proj.bias)
        y_TD = ops.short_conv(bcx_T3D, self.conv.weight[:, 0], self.conv.bias, batch, tails_NLD)
        return ops.project(y_TD, self.out_proj.weight, self.out_proj.bias)


class Attention(nn.Module):
    """Parameters of one grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, self.head_dim, self.eps = config.hidden_size, config.head_dim, config.norm_eps
        self.q_proj = Weight(config.num_attention_heads * self.head_dim, hidden)
        self.k_proj = Weight(config.num_key_value_heads * self.head_dim, hidden)
        self.v_proj = Weight(config.num_key_value_heads * self.head_dim, hidden)
        self.out_proj = Weight(hidden, config.num_attention_heads * self.head_dim)
        self.q_layernorm = Weight(self.head_dim)
        self.k_layernorm = Weight(self.head_dim)

    def forward(
        self, x_TD: Tensor, batch: ForwardBatch, kv: tuple[Tensor, Tensor], rope: tuple[Tensor, Tensor], ops: Ops
    ) -> Tensor:
        def heads(projection: Weight) -> Tensor:
            return ops.project(x_TD, projection.weight, None).view(x_TD.shape[0], -1, self.head_dim)

        q_norm, k_norm = self.q_layernorm.weight, self.k_layernorm.weight
        q, k, v = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        q, k, v = ops.qkv_rope(q, k, v, q_norm, k_norm, self.eps, rope)
        ops.write_kv(k, v, batch, *kv)
        o_THK = ops.attend(q, k, v, batch, *kv)
        return ops.project(o_THK.flatten(1), self.out_proj.weight, None)


class DenseFeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Weight(config.intermediate_size, config.hidden_size)
        self.w3 = Weight(config.intermediate_size, config.hidden_size)
        self.w2 = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x_TD: Tensor, ops: Ops) -> Tensor:
        gate, up = ops.project(x_TD, self.w1.weight, None), ops.project(x_TD, self.w3.weight, None)
        return ops.project(silu(gate) * up, self.w2.weight, None)


class Experts(nn.Module):
    """All experts of a layer, fused: rows 0..F-1 of gate_up_proj are w1 (gate), F..2F-1 are w3 (up)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))


class MoeFeedForward(nn.Module):
    """Router and experts. `expert_bias` (fp32, selection only) is state, not a trained parameter."""

    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_chosen, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        self.gate = Weight(config.num_experts, config.hidden_size)
        self.experts = Experts(config)
        bias = torch.empty(config.num_experts, dtype=torch.float32) if config.use_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x_TD: Tensor, ops: Ops) -> Tensor:
        chosen_TA, weights_TA = ops.route(
            x_TD,
            self.gate.weight,
            self.expert_bias,
            num_chosen=self.num_chosen,
            normalise=self.normalise,
            scale=self.scale,
        )
        return ops.experts(x_TD, chosen_TA, weights_TA, self.experts.gate_up_proj, self.experts.down_proj)


class Layer(nn.Module):
    """One decoder layer's parameters: an operator and a feed-forward, each behind its norm."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        if config.layer_types[index] == "conv":
            self.conv = ShortConv(config)
        else:
            self.self_attn = Attention(config)
        self.feed_forward = MoeFeedForward(config) if config.is_moe_layer(index) else DenseFeedForward(config)
        self.operator_norm = Weight(config.hidden_size)
        self.ffn_norm = Weight(config.hidden_size)


class Backbone(nn.Module):
    """Embedding, layers and final norm, under the checkpoint's prefix `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.embedding_norm = Weight(config.hidden_size)


class Lfm2(nn.Module):
    """An LFM2 model. Build it under `torch.device("meta")` and let `weights.load_weights` give it storage."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = Weight(config.vocab_size, config.hidden_size)

    def forward(self, batch: ForwardBatch, cache: CacheTensors | None, ops: Ops) -> Tensor:
        """Hidden states after the final norm [T, D]; K, V and conv tails of the step go to `cache`, if there is one."""
        config = self.config
        h_TD = torch.nn.functional.embedding(batch.ids_T, self.model.embed_tokens.weight)
        rope = rope_tables(batch.positions_T, config.head_dim, config.rope_theta, h_TD.dtype)
        states = _cache_slots(config, cache, h_TD)
        delta_TD: Tensor | None = None
        for layer, state in zip(self.model.layers, states, strict=True):
            assert isinstance(layer, Layer)
            h_TD, x_TD = ops.add_norm(h_TD, delta_TD, layer.operator_norm.weight, config.norm_eps)
            if isinstance(state, tuple):
                delta_TD = layer.self_attn(x_TD, batch, state, rope, ops)
            else:
                delta_TD = layer.conv(x_TD, batch, state, ops)
            h_TD, x_TD = ops.add_norm(h_TD, delta_TD, layer.ffn_norm.weight, config.norm_eps)
            delta_TD = layer.feed_forward(x_TD, ops)
        return ops.add_norm(h_TD, delta_TD, self.model.embedding_norm.weight, config.norm_eps)[1]

    def head(self, hidden_RD: Tensor, ops: Ops) -> Tensor:
        """Logits [R, V] of the rows that need a token."""
        tied = self.config.tie_word_embeddings
        weight_VD = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return ops.project(hidden_RD, weight_VD, None)


def _cache_slots(config: ModelConfig, cache: CacheTensors | None, like: Tensor) -> list[Tensor | tuple[Tensor, Tensor]]:
    """Per layer: (K, V) of an attention layer, or the tails of a conv layer; empty tensors where there is no cache."""
    if cache is None:
        nothing = like.new_empty(0)
        return [nothing if kind == "conv" else (nothing, nothing) for kind in config.layer_types]
    tails, kv = iter(cache.tails), iter(zip(cache.k, cache.v, strict=True))
    return [next(tails) if kind == "conv" else next(kv) for kind in config.layer_types]
