"""Put an engine together: model source, plan, weights, block pool, scheduler, runner."""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext

import msgspec
import torch

from lfm.chat.tokenizer import Tokenizer
from lfm.config import EngineConfig, EnginePlan, ModelConfig
from lfm.engine.cache import BlockHasher, BlockPool
from lfm.engine.compile_ahead import CompileAhead, job_for
from lfm.engine.engine import Engine
from lfm.engine.grammar_library import TokenTable
from lfm.engine.grammar_masks import token_table
from lfm.engine.grammars import Grammars
from lfm.engine.make_runner import DTYPES, make_cache, make_runner
from lfm.engine.plan import plan_engine
from lfm.engine.runner import Runner
from lfm.engine.scheduler import Scheduler
from lfm.engine.warm_up import measure_workspace
from lfm.errors import MachineError
from lfm.kernels.attention import is_paged_fast
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import CPU, FAST, REFERENCE, Ops
from lfm.model.pack import pack, store_by_columns
from lfm.model.presets import fill_random
from lfm.model.sizes import block_bytes, format_bytes
from lfm.model.source import ModelSource, resolve_model
from lfm.model.weights import load_weights
from lfm.protocol import EngineInfo

# Forced ids from which on a chunk is worth it. With overlap the first of them is sampled anyway, in the step whose
# forward is launched already, and a chunk of one would save nothing. On a CPU 2 to 4 cost least (bench/structured.py).
MIN_CHUNK = 2


def build_engine(config: EngineConfig, *, on_phase: Callable[[str], None] = lambda line: None) -> Engine:
    """Load the model that `config` names and return an engine that is ready to step.

    `on_phase` gets a line of progress now and then. Raises the LfmErrors of `resolve_model`, `plan_engine` and
    `load_weights`.
    """
    started_s = time.monotonic()
    source = resolve_model(config.model, revision=config.revision, on_progress=on_phase)
    plan = plan_engine(config, source.config)
    if plan.num_threads is not None:
        torch.set_num_threads(plan.num_threads)
    job = job_for(source.config, plan)
    with CompileAhead(job) if job is not None else nullcontext() as kernels:
        model = load_model(source, plan, on_phase=on_phase)
        on_phase(f"weights are there after {time.monotonic() - started_s:.1f} s")
        if kernels is not None:
            kernels.wait(on_phase)
    if plan.num_blocks is None:
        on_phase("running the largest steps, for what they leave to the cache")
    tokenizer = Tokenizer.for_source(source.folder, source.config)
    engine = assemble_engine(
        model,
        plan,
        num_ids=tokenizer.num_ids,
        name=source.name,
        make_table=lambda: token_table(tokenizer, vocab_size=source.config.vocab_size),
    )
    engine.info = msgspec.structs.replace(engine.info, load_s=time.monotonic() - started_s)
    on_phase(f"ready after {engine.info.load_s:.1f} s")
    return engine


def load_model(source: ModelSource, plan: EnginePlan, *, on_phase: Callable[[str], None] = lambda line: None) -> Lfm2:
    """The model on the plan's device and dtype: from the folder, or random for a preset."""
    device, dtype, is_quantised = torch.device(plan.device), DTYPES[plan.dtype], plan.quantize == "fp8"
    with torch.device("meta"):
        model = Lfm2(source.config)
    if source.folder is not None:
        load_weights(model, source.folder, device=device, dtype=dtype, quantise=is_quantised, on_progress=on_phase)
    else:
        on_phase(f"making random weights for {source.name}")
        fill_random(model, device=device, dtype=dtype, seed=plan.seed, is_quantised=is_quantised)
    pack(model.requires_grad_(False).eval())
    return store_by_columns(model) if plan.num_threads == 1 and dtype != torch.bfloat16 else model


def assemble_engine(
    model: Lfm2,
    plan: EnginePlan,
    *,
    num_ids: int,
    name: str = "model",
    ops: Ops | None = None,
    overlap: bool | None = None,
    make_table: Callable[[], TokenTable] | None = None,
) -> Engine:
    """An engine around a model on its device. `ops` and `overlap` None: what the plan and the device call for.

    `make_table` makes the tokens that grammars are written in; without it, requests may have none.
    """
    config = model.config
    if ops is None:
        has_cpu_ops = plan.device == "cpu" and plan.dtype != "bfloat16"
        ops = REFERENCE if plan.plain_loop else CPU if has_cpu_ops else FAST
    runner = make_runner(model, plan, num_ids=num_ids, ops=ops)
    num_blocks = plan.num_blocks if plan.num_blocks is not None else _measure_num_blocks(runner, plan)
    runner.cache = make_cache(config, plan, num_blocks)
    scheduler = Scheduler(
        BlockPool(num_blocks),
        BlockHasher(os.urandom(32), model=name, kv_dtype=plan.dtype if plan.kv_dtype == "auto" else plan.kv_dtype),
        block_size=plan.block_size,
        max_running=plan.max_running,
        step_tokens=plan.step_tokens,
        step_tokens_decoding=plan.step_tokens_decoding,
        prefix_caching=plan.prefix_caching,
    )
    info = _plan_info(config, plan, num_blocks)
    is_fast = runner.is_async and not plan.plain_loop
    if is_fast and ops.is_capturable and _has_kernels(runner):
        runner.enable_graphs()
    overlap = is_fast if overlap is None else overlap
    grammars = Grammars(make_table, runner.rows, scheduler, min_chunk=MIN_CHUNK)
    return Engine(scheduler, runner, grammars, info, num_ids=num_ids, overlap=overlap, seed=plan.seed)


def _has_kernels(runner: Runner) -> bool:
    """Whether the fast ops take this model; what falls back to its reference cannot be captured."""
    weight, cache = runner.model.model.embed_tokens.weight, runner.cache
    return all(is_paged_fast(weight, runner.model.config.num_attention_heads, k) for k in cache.k[:1])


def _measure_num_blocks(runner: Runner, plan: EnginePlan) -> int:
    """As many blocks as `memory_fraction` of the GPU leaves beside the weights and the largest steps, which are run."""
    config, device = runner.model.config, runner.rows.device
    workspace = measure_workspace(runner, plan)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    budget = free - round((1 - plan.memory_fraction) * total) - workspace
    per_block = block_bytes(config, block_size=plan.block_size, dtype=plan.dtype, kv_dtype=plan.kv_dtype)
    num_blocks = budget // per_block
    if num_blocks * plan.block_size < plan.max_model_len:
        raise MachineError(
            f"{format_bytes(max(0, budget))} are left for the cache; a context of {plan.max_model_len:,} tokens needs "
            f"{format_bytes(-(-plan.max_model_len // plan.block_size) * per_block)}. Lower --max-model-len."
        )
    return num_blocks


def _plan_info(config: ModelConfig, plan: EnginePlan, num_blocks: int) -> EngineInfo:
    return EngineInfo(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        max_model_len=plan.max_model_len,
        num_blocks=num_blocks,
        block_size=plan.block_size,
        max_running=plan.max_running,
        max_queue=plan.max_queue,
        device=plan.device,
        dtype=plan.dtype,
        load_s=0.0,
        reasons=plan.reasons,
    )
