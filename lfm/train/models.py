"""The model that a recipe asks for: new, with random weights, or read from a folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lfm.chat.tokenizer import Tokenizer
from lfm.config import ModelConfig
from lfm.errors import ModelError, UsageError
from lfm.model.lfm2 import Lfm2
from lfm.model.names import is_fp32, parameter_shapes
from lfm.model.weights import allocate, load_weights
from lfm.train.recipe import ShapeSettings

_VOCAB_MULTIPLE = 64  # rows of the embedding: padded to what matrix units like; ids beyond the tokenizer never occur
_RESIDUAL_WRITERS = ("out_proj.weight", ".w2.weight", "experts.down_proj")


def config_of(shape: ShapeSettings, tokenizer: Tokenizer) -> ModelConfig:
    """The config of a new model. Raises ModelError or UsageError for a shape that cannot be."""
    num_layers = shape.num_hidden_layers
    if wrong := [layer for layer in shape.attention_layers if layer >= num_layers]:
        raise UsageError(f"model.shape.attention_layers names {wrong[0]}. Allowed: 0 to {num_layers - 1}.")
    if shape.hidden_size % shape.num_attention_heads:
        raise UsageError(
            f"model.shape.hidden_size={shape.hidden_size} is no multiple of "
            f"num_attention_heads={shape.num_attention_heads}."
        )
    special = tokenizer.special
    return ModelConfig(
        model_type="lfm2_moe",
        vocab_size=-(-tokenizer.num_ids // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=num_layers,
        layer_types=tuple(
            "full_attention" if layer in shape.attention_layers else "conv" for layer in range(num_layers)
        ),
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        num_dense_layers=min(shape.num_dense_layers, num_layers),
        moe_intermediate_size=shape.moe_intermediate_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_tok,
        conv_L_cache=shape.conv_L_cache,
        rope_theta=shape.rope_theta,
        max_position_embeddings=shape.max_position_embeddings,
        bos_token_id=special.bos,
        eos_token_ids=(special.im_end,),
        pad_token_id=0 if special.pad is None else special.pad,
    )


def random_weights(config: ModelConfig, *, std: float, seed: int) -> dict[str, Tensor]:
    """New fp32 weights on the CPU, the same on every machine: normal, norms 1, biases 0.

    What writes to the residual stream is smaller by the square root of the number of writers, so that the stream starts
    no wider at the last layer than at the first (Radford et al., GPT-2, 2019).
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = std * (2 * config.num_hidden_layers) ** -0.5
    weights = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape)
        elif name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        else:
            # A conv tap sums three values, not a hidden size of them: torch's own Conv1d default for so few.
            scale = shape[-1] ** -0.5 if name.endswith("conv.conv.weight") else std
            scale = residual_std if name.endswith(_RESIDUAL_WRITERS) else scale
            weights[name] = torch.empty(shape).normal_(0.0, scale, generator=generator)
    return weights


def read_weights(config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder in fp32 on the CPU. Raises ModelError."""
    with torch.device("meta"):
        model = Lfm2(config)
    load_weights(model, folder, device=torch.device("cpu"), dtype=torch.float32)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def build_model(config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> Lfm2:
    """A model with uninitialised weights in `dtype`; selection biases in fp32."""
    with torch.device("meta"):
        model = Lfm2(config)
    for name, shape in parameter_shapes(config).items():
        allocate(model, name, shape, device=device, dtype=torch.float32 if is_fp32(name) else dtype)
    return model


@torch.no_grad()
def fill_buffers(model: Lfm2, values: Mapping[str, Tensor]) -> None:
    """Set the selection biases, which are state of the trainer and no parameters."""
    for name, buffer in model.named_buffers():
        if name not in values or values[name].shape != buffer.shape:
            raise ModelError(f"The checkpoint has no {name} of shape {tuple(buffer.shape)}.")
        buffer.copy_(values[name])
