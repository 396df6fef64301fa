"""Known shapes for `random:PRESET`, and random weights for them: serving without a download, for benchmarks and tests.

The published shapes are those of the models' own config.json; `tiny` has every part of the architecture switched on and
answers at once on a laptop's CPU. Importing this loads no torch.
"""

from typing import TYPE_CHECKING

from lfm.config import LayerType, ModelConfig
from lfm.model.names import is_fp32, parameter_shapes

if TYPE_CHECKING:
    import torch

    from lfm.model.lfm2 import Lfm2

INIT_STD = 0.02  # the family's initializer_range


def _layer_types(num_layers: int, *attention_layers: int) -> tuple[LayerType, ...]:
    return tuple("full_attention" if layer in attention_layers else "conv" for layer in range(num_layers))


PRESETS: dict[str, ModelConfig] = {
    "lfm2-24b-a2b": ModelConfig(
        model_type="lfm2_moe",
        vocab_size=65_536,
        hidden_size=2048,
        intermediate_size=11_776,
        moe_intermediate_size=1536,
        num_hidden_layers=40,
        num_dense_layers=2,
        layer_types=_layer_types(40, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38),
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=4,
    ),
    "lfm2-8b-a1b": ModelConfig(
        model_type="lfm2_moe",
        vocab_size=65_536,
        hidden_size=2048,
        intermediate_size=7168,
        moe_intermediate_size=1792,
        num_hidden_layers=24,
        num_dense_layers=2,
        layer_types=_layer_types(24, 2, 6, 10, 14, 18, 21),
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
    ),
    "tiny": ModelConfig(
        model_type="lfm2_moe",
        vocab_size=1024,  # special tokens and 256 bytes need fewer: the rest is padding that must never be sampled
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=8,
        num_dense_layers=2,
        layer_types=_layer_types(8, 2, 6),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=4,
        max_position_embeddings=32_768,
    ),
}


def fill_random(
    model: "Lfm2", *, device: "torch.device", dtype: "torch.dtype", seed: int, is_quantised: bool = False
) -> None:
    """Give a model that was built on the meta device random weights: normal, std 0.02; norms 1; biases 0.

    Every tensor is made on `device`, one after the other, so no host copy of the model ever exists. The same seed gives
    the same weights on the same kind of device, whatever the dtype (they are drawn in fp32 and rounded; with
    `is_quantised`, projections and experts to `dtype` and then to fp8).
    Raises MachineError if the device has too little memory.
    """
    import torch  # not at the top: PRESETS is read by commands that must start fast

    from lfm.kernels.fp8 import FP8
    from lfm.model import names
    from lfm.model.quantise import make_room_for_scales, write_rows
    from lfm.model.weights import allocate

    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, shape in parameter_shapes(model.config).items():
            is_fp8 = is_quantised and names.is_quantised(name)
            kept = FP8 if is_fp8 else torch.float32 if is_fp32(name) else dtype
            tensor = allocate(model, name, shape, device=device, dtype=kept)
            scales = make_room_for_scales(model, name, device=device) if is_fp8 else None
            if name.endswith("norm.weight"):
                tensor.fill_(1.0)
            elif name.endswith("bias"):
                tensor.zero_()
            else:
                for index in (
                    range(len(tensor)) if tensor.dim() == 3 else (slice(None),)
                ):  # expert by expert: small fp32 drafts
                    draft = torch.empty(tensor[index].shape, device=device).normal_(0.0, INIT_STD, generator=generator)
                    if scales is None:
                        tensor[index].copy_(draft)
                    else:
                        write_rows(draft.to(dtype), tensor[index], scales[index])
