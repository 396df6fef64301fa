"""Every kernel compiles, to machine code, for GPUs older than the H200; no GPU is needed.

Compute capability 8.0 is an A100, 8.9 an L4 or RTX 4090 (8.6, a 3090, has the same shared memory and runs 8.0's code).
They are compiled for, not run on. Layers run whole, as in a step, on tensors without storage.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator

import pytest
import torch

import lfm.kernels
from lfm.config import ModelConfig
from lfm.kernels import moe_grouped_fp8
from lfm.kernels.dry_run import compile_only
from lfm.kernels.forward_batch import CacheTensors, ForwardBatch, SharedPrefix
from lfm.kernels.fp8 import FP8
from lfm.kernels.sample_rows import SampledRows, sample_rows
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import FAST
from lfm.model.pack import pack
from lfm.model.presets import PRESETS
from lfm.model.quantise import quantise
from tests.kernels.interpreted import IS_INTERPRETED
from tests.kernels.paged import batch_of

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing"),
]
META = torch.device("meta")
# Bytes of shared memory that one program can have: 8.6 and 8.9 have the least of their generation.
SHARED_MEMORY = {80: 101_376, 89: 101_376}
HOPPER_ONLY = {
    "count_pairs_kernel", "place_pairs_kernel", "spread_kernel", "up_prefill_kernel", "down_prefill_kernel",
    "up_prefill_fp8_kernel", "down_prefill_fp8_kernel", "route_count_kernel", "spread_norm_kernel", "sum_norm_kernel",
}  # fmt: skip
NEEDS_FP8 = {"quantise_tokens_kernel", "up_grouped_fp8_kernel", "down_grouped_fp8_kernel"}
GLUON = {"grouped_product_kernel"}  # wgmma by hand, of capability 9.0 alone; used there only
STEPS = {80: (1, 3, 16, 40, 300, 2100), 89: (1, 40, 600)}  # tokens: one per class of the tables
FP8_STEPS = (1, 3, 16, 40, 300)


def four_layers() -> ModelConfig:
    """The 24B with one layer of each kind: conv and attention, dense and experts."""
    layers = ("conv", "full_attention", "conv", "full_attention")
    return dataclasses.replace(PRESETS["lfm2-24b-a2b"], num_hidden_layers=4, layer_types=layers, num_dense_layers=2)


def model_of(config: ModelConfig, *, is_fp8: bool) -> Lfm2:
    with META:
        model = Lfm2(config).to(torch.bfloat16).requires_grad_(False)
    return pack(quantise(model) if is_fp8 else model)


def batches(steps: tuple[int, ...]) -> Iterator[ForwardBatch]:
    """Decode steps of these sizes, a chunk beside decoding rows, and rows that share a prefix."""
    for tokens in steps:
        yield batch_of([(200, 201, [1, 2])] * tokens, 128, device="meta")
    yield batch_of([(5, 6, [1]), (0, 300, [1, 2, 3])], 128, device="meta")
    shared = batch_of([(200, 201, [1, 2])] * 20, 128, device="meta")
    blocks = torch.ones(20, dtype=torch.int64, device=META)
    tiles = torch.zeros(2, 16, dtype=torch.int64, device=META)
    yield dataclasses.replace(shared, shared=SharedPrefix(blocks, tiles))


def run_layers(steps: tuple[int, ...], *, is_fp8: bool) -> None:
    config = four_layers()
    model = model_of(config, is_fp8=is_fp8)
    cache = CacheTensors.allocate(
        config, 9, block_size=128, dtype=torch.bfloat16, device=META, kv_dtype=FP8 if is_fp8 else None
    )
    for batch in batches(steps):
        model.head(model(batch, cache, FAST)[:4], FAST)


def run_sampler() -> None:
    """Greedy and drawn ids, with everything that changes the compiled kernel switched on and off."""
    logits = torch.empty(4, 65_536, dtype=torch.bfloat16, device=META)
    row = torch.empty(4, dtype=torch.int64, device=META)
    rows = SampledRows(
        floats=torch.empty(8, 6, dtype=torch.float64, device=META),
        ints=torch.empty(8, 4, dtype=torch.int64, device=META),
        seen=torch.empty(8, 65_536 // 8, dtype=torch.uint8, device=META),
        last_ids=torch.empty(8, dtype=torch.int64, device=META),
        positions=torch.empty(8, dtype=torch.int64, device=META),
        masks=torch.empty(8, 65_536 // 32, dtype=torch.int32, device=META),
    )
    for narrow_k in (0, 64):
        for is_on in (False, True):
            ok = row if is_on else None
            sample_rows(
                logits, rows, row_R=row, position_R=row, ok_R=ok, repetition=is_on, narrow_k=narrow_k, mask=is_on
            )


def entry_points() -> set[str]:
    """Every kernel of the package that is launched, by its name."""
    names = set()
    for module_info in pkgutil.iter_modules(lfm.kernels.__path__, "lfm.kernels."):
        module = importlib.import_module(module_info.name)
        names |= {name for name, item in vars(module).items() if hasattr(item, "warmup") and name.endswith("kernel")}
    return names | {"_norm_rotate_write"}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles(capability: int) -> None:
    with compile_only(capability) as compiled:
        run_layers(STEPS[capability], is_fp8=False)
        run_sampler()
        if capability >= 89:
            run_layers(FP8_STEPS, is_fp8=True)
            run_grouped_fp8()
    expected = entry_points() - GLUON - HOPPER_ONLY
    if capability < 89:
        expected -= NEEDS_FP8
    assert set(compiled) == expected
    for name, kernels in compiled.items():
        for kernel in kernels:
            assert kernel.metadata.shared <= SHARED_MEMORY[capability], name
            is_hopper_code = any(word in kernel.asm["ptx"] for word in ("wgmma", "griddepcontrol", "cp.async.bulk"))
            assert not is_hopper_code, name


def run_grouped_fp8() -> None:
    """Not chosen by the tables in force, so not part of any step."""
    config = four_layers()
    experts = model_of(config, is_fp8=True).model.layers[3].feed_forward.experts
    for tokens in (8, 40, 300):
        x = torch.empty(tokens, config.hidden_size, dtype=torch.bfloat16, device=META)
        chosen = torch.empty(tokens, 4, dtype=torch.int64, device=META)
        moe_grouped_fp8.experts_grouped_fp8(
            x, x, chosen, chosen.float(), experts.gate_up_proj, experts.down_proj, experts.scales
        )
