"""The names and shapes of all weights: the one table that loading and saving share. No torch.

In memory a layer's experts are two stacked parameters, `experts.gate_up_proj` and `experts.down_proj`; a checkpoint
holds either those (with or without a trailing `.weight`) or one `w1`, `w2` and `w3` per expert. A Slot says which part
of which parameter a checkpoint's tensor is. Published checkpoints, and what we save, have the per-expert layout.
"""

from collections.abc import Collection
from dataclasses import dataclass

from lfm.config import ModelConfig

TIED_HEAD = "lm_head.weight"  # some checkpoints repeat the embedding under this name although the two are tied
QUANTISED_SUFFIXES = (
    *(f".conv.{name}.weight" for name in ("in_proj", "out_proj")),
    *(f".self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *(f".feed_forward.{name}.weight" for name in ("w1", "w2", "w3")),
    *(f".experts.{name}" for name in ("gate_up_proj", "down_proj")),
)
FP32_SUFFIX = ".expert_bias"  # kept in fp32 whatever the model's dtype: it decides which experts are chosen


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one checkpoint tensor lives: all of `parameter`, or of expert `expert` the rows from `row` on."""

    parameter: str
    shape: tuple[int, ...]
    expert: int | None = None
    row: int = 0


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter and buffer of the model in memory, with its shape."""
    vocab, hidden = config.vocab_size, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        parts = _operator_shapes(config, layer) | _feed_forward_shapes(config, layer)
        parts |= {"operator_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
        shapes |= {prefix + name: shape for name, shape in parts.items()}
    shapes["model.embedding_norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[TIED_HEAD] = (vocab, hidden)
    return shapes


def is_fp32(parameter: str) -> bool:
    """Whether a parameter stays in fp32 in every model."""
    return parameter.endswith(FP32_SUFFIX)


def is_quantised(parameter: str) -> bool:
    """Whether a parameter can be kept in fp8: projections and experts, but no router, norm, tap, embedding or head."""
    return parameter.endswith(QUANTISED_SUFFIXES)


def checkpoint_slots(config: ModelConfig) -> dict[str, Slot]:
    """The tensors of a checkpoint as it is published and saved: experts one by one."""
    return {name: slot for layouts in _layouts(config) for name, slot in layouts[0].items()}


def expected_slots(config: ModelConfig, present: Collection[str]) -> dict[str, Slot]:
    """The tensors that a checkpoint with the names `present` has to hold, in the layout that those names show.

    Of several layouts of one parameter the first that is present counts; the names of the others are then extra.
    """
    slots: dict[str, Slot] = {}
    for layouts in _layouts(config):
        slots |= next((layout for layout in layouts if any(name in present for name in layout)), layouts[0])
    return slots


def _layouts(config: ModelConfig) -> list[tuple[dict[str, Slot], ...]]:
    """Per parameter: the layouts that a checkpoint may hold it in, the published one first."""
    width = config.moe_intermediate_size
    result: list[tuple[dict[str, Slot], ...]] = []
    for parameter, shape in parameter_shapes(config).items():
        whole = {parameter: Slot(parameter, shape)}
        experts, _, kind = parameter.rpartition(".")
        if kind == "gate_up_proj":
            halves = {"w1": 0, "w3": width}
            rows = {
                f"{experts}.{e}.{half}.weight": Slot(parameter, (width, config.hidden_size), e, row)
                for e in range(config.num_experts)
                for half, row in halves.items()
            }
        elif kind == "down_proj":
            rows = {
                f"{experts}.{e}.w2.weight": Slot(parameter, (config.hidden_size, width), e)
                for e in range(config.num_experts)
            }
        else:
            result.append((whole,))
            continue
        result.append((rows, whole, {f"{parameter}.weight": Slot(parameter, shape)}))
    return result


def _operator_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    if config.layer_types[layer] == "conv":
        shapes: dict[str, tuple[int, ...]] = {
            "conv.in_proj.weight": (3 * hidden, hidden),
            "conv.conv.weight": (hidden, 1, config.conv_L_cache),
            "conv.out_proj.weight": (hidden, hidden),
        }
        if config.conv_bias:
            shapes |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items()}
        return shapes
    q_width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "self_attn.q_proj.weight": (q_width, hidden),
        "self_attn.k_proj.weight": (kv_width, hidden),
        "self_attn.v_proj.weight": (kv_width, hidden),
        "self_attn.out_proj.weight": (hidden, q_width),
        "self_attn.q_layernorm.weight": (config.head_dim,),
        "self_attn.k_layernorm.weight": (config.head_dim,),
    }


def _feed_forward_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, dense_width = config.hidden_size, config.intermediate_size
    if not config.is_moe_layer(layer):
        return {
            "feed_forward.w1.weight": (dense_width, hidden),
            "feed_forward.w3.weight": (dense_width, hidden),
            "feed_forward.w2.weight": (hidden, dense_width),
        }
    experts, width = config.num_experts, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "feed_forward.gate.weight": (experts, hidden),
        "feed_forward.experts.gate_up_proj": (experts, 2 * width, hidden),
        "feed_forward.experts.down_proj": (experts, hidden, width),
    }
    if config.use_expert_bias:
        shapes[f"feed_forward{FP32_SUFFIX}"] = (experts,)
    return shapes
