"""How large a model is: parameters, and bytes of weights, cache blocks and working memory.

Pure arithmetic on a ModelConfig; nothing is allocated and torch is not imported. The counts are exact, and tested
against the published ones. `workspace_bytes` alone is an estimate, and says so.
"""

from typing import Literal

from lfm.config import KvDtype, ModelConfig, Quantize
from lfm.kernels.kv_layout import num_rows

DtypeName = Literal["float32", "bfloat16", "float64"]
ITEM_BYTES: dict[DtypeName, int] = {"float64": 8, "float32": 4, "bfloat16": 2}
_FP32_BYTES = 4


def attention_parameters(config: ModelConfig) -> int:
    """Parameters of one attention operator: q, k, v and output projections and the two per-head norms."""
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    return 2 * config.hidden_size * q_width + 2 * config.hidden_size * kv_width + 2 * config.head_dim


def conv_parameters(config: ModelConfig) -> int:
    """Parameters of one short-conv operator: input and output projections and the depthwise taps."""
    hidden = config.hidden_size
    biases = 3 * hidden + hidden + hidden if config.conv_bias else 0
    return 3 * hidden * hidden + hidden * hidden + hidden * config.conv_L_cache + biases


def dense_parameters(config: ModelConfig) -> int:
    """Parameters of one dense SwiGLU feed-forward."""
    return 3 * config.hidden_size * config.intermediate_size


def expert_parameters(config: ModelConfig) -> int:
    """Parameters of one expert of one layer."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def router_parameters(config: ModelConfig) -> int:
    """Parameters of one layer's gate, without its selection bias."""
    return config.num_experts * config.hidden_size


def num_expert_biases(config: ModelConfig) -> int:
    """Selection biases of all layers. They stay in fp32 whatever the model's dtype."""
    return config.num_moe_layers * config.num_experts if config.use_expert_bias else 0


def operator_parameters(config: ModelConfig) -> int:
    """Parameters of the operators of all layers, attention and short conv."""
    num_attention, num_conv = len(config.attention_layers), len(config.conv_layers)
    return num_attention * attention_parameters(config) + num_conv * conv_parameters(config)


def num_dense_feed_forwards(config: ModelConfig) -> int:
    return config.num_hidden_layers - config.num_moe_layers


def num_parameters(config: ModelConfig) -> int:
    """All parameters, the selection biases among them; a tied output head is counted once."""
    layers = config.num_hidden_layers
    moe_layer = config.num_experts * expert_parameters(config) + router_parameters(config)
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return (
        operator_parameters(config)
        + num_dense_feed_forwards(config) * dense_parameters(config)
        + config.num_moe_layers * moe_layer
        + num_expert_biases(config)
        + 2 * layers * config.hidden_size
        + config.hidden_size
        + embeddings
    )


def num_active_parameters(config: ModelConfig) -> int:
    """Parameters that one token multiplies with: its experts only, one vocabulary matrix, no selection biases."""
    num_unused = config.num_experts - config.num_experts_per_tok
    unused_experts = config.num_moe_layers * num_unused * expert_parameters(config)
    unused_embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return num_parameters(config) - unused_experts - unused_embedding - num_expert_biases(config)


def quantised_parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters that fp8 applies to, projections and experts, and their rows: each row has a scale in fp32."""
    hidden, q_width = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    dense, width = config.intermediate_size, config.moe_intermediate_size
    kinds = (  # how many, and shapes
        (len(config.attention_layers), ((q_width + 2 * kv_width, hidden), (hidden, q_width))),
        (len(config.conv_layers), ((3 * hidden, hidden), (hidden, hidden))),
        (num_dense_feed_forwards(config), ((2 * dense, hidden), (hidden, dense))),
        (config.num_moe_layers * config.num_experts, ((2 * width, hidden), (hidden, width))),
    )
    count = sum(num * rows * inputs for num, shapes in kinds for rows, inputs in shapes)
    return count, sum(num * rows for num, shapes in kinds for rows, _ in shapes)


def weight_bytes(config: ModelConfig, dtype: DtypeName, *, quantize: Quantize = "none") -> int:
    """Bytes of the loaded weights: everything in `dtype` but the fp32 selection biases, and what is in fp8."""
    num_biases = num_expert_biases(config)
    plain = (num_parameters(config) - num_biases) * ITEM_BYTES[dtype] + num_biases * _FP32_BYTES
    if quantize == "none":
        return plain
    count, rows = quantised_parameters(config)
    return plain - count * (ITEM_BYTES[dtype] - 1) + rows * _FP32_BYTES


def kv_bytes_per_token(config: ModelConfig, dtype: DtypeName, *, kv_dtype: KvDtype = "auto") -> int:
    """Bytes of keys and values that one token of context costs, over all attention layers.

    In fp8 a byte per value, and one for the scale of each head's vector.
    """
    per_head = config.head_dim * ITEM_BYTES[dtype] if kv_dtype == "auto" else config.head_dim + 1
    return len(config.attention_layers) * 2 * config.num_key_value_heads * per_head


def conv_state_bytes(config: ModelConfig, dtype: DtypeName) -> int:
    """Bytes of the short-conv state of one sequence: the last conv_L_cache - 1 columns of every conv layer."""
    return len(config.conv_layers) * (config.conv_L_cache - 1) * config.hidden_size * ITEM_BYTES[dtype]


def block_bytes(config: ModelConfig, *, block_size: int, dtype: DtypeName, kv_dtype: KvDtype = "auto") -> int:
    """Bytes of one cache block: the K/V of `block_size` tokens and one conv tail."""
    item = ITEM_BYTES[dtype] if kv_dtype == "auto" else 1
    row = len(config.attention_layers) * 2 * config.num_key_value_heads * config.head_dim * item
    return num_rows(block_size, config.head_dim, is_fp8=kv_dtype == "fp8") * row + conv_state_bytes(config, dtype)


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens of one sequence."""
    return -(-num_tokens // block_size)


def workspace_bytes(config: ModelConfig, *, step_tokens: int, max_running: int, dtype: DtypeName) -> int:
    """Estimate the bytes that one step needs beside weights and cache: activations of the widest layer, and logits.

    An upper estimate for plain operations, used to decide what fits before anything is allocated; the GPU measures.
    """
    item = ITEM_BYTES[dtype]
    hidden = config.hidden_size
    routed = (
        config.num_experts_per_tok * (3 * config.moe_intermediate_size + 2 * hidden) if config.num_moe_layers else 0
    )
    widest = max(4 * hidden, 3 * config.intermediate_size if config.num_dense_layers else 0, routed)
    activations = step_tokens * (widest + 6 * hidden) * item
    # Logits in fp32, with two copies of the same size while top-k and top-p sort them.
    logits = min(step_tokens, max_running) * config.vocab_size * 3 * _FP32_BYTES
    return activations + logits


def format_bytes(num_bytes: float) -> str:
    """Write a size as people read it: decimal units, one digit after the point."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:.0f} B"
