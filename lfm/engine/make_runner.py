"""How a runner and its pool are made from a plan: the same for an engine and for the dry run that compiles for one."""

import torch

from lfm.config import EnginePlan, ModelConfig
from lfm.engine.batch import BatchBuilder
from lfm.engine.runner import Runner
from lfm.engine.sampling_rows import SamplingRows
from lfm.kernels.forward_batch import CacheTensors
from lfm.kernels.fp8 import FP8
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import Ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def make_runner(model: Lfm2, plan: EnginePlan, *, num_ids: int, ops: Ops) -> Runner:
    """A runner on the plan's device, with a pool of nothing but the scratch block."""
    device = torch.device(plan.device)
    rows = SamplingRows(plan.max_running, model.config.vocab_size, num_ids=num_ids, device=device)
    builder = BatchBuilder(
        max_running=plan.max_running,
        step_tokens=plan.step_tokens,
        max_model_len=plan.max_model_len,
        block_size=plan.block_size,
        device=device,
    )
    return Runner(model, make_cache(model.config, plan, 0), rows, builder, ops=ops)


def make_cache(config: ModelConfig, plan: EnginePlan, num_blocks: int) -> CacheTensors:
    """The pool's tensors: the usable blocks and the scratch block."""
    return CacheTensors.allocate(
        config,
        num_blocks + 1,
        block_size=plan.block_size,
        dtype=DTYPES[plan.dtype],
        device=torch.device(plan.device),
        kv_dtype=FP8 if plan.kv_dtype == "fp8" else None,
    )
