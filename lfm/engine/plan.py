"""Decide every engine setting for one machine and one model, and say why.

The result is an EnginePlan whose `reasons` are printed by `lfm serve` and `lfm info`. Whatever the user named is kept
or refused, never changed; what the user left open is chosen so that it fits. Nothing is allocated here, and torch is
imported only to look at the devices. On CUDA the number of blocks stays open: it is measured once the weights are
loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lfm.config import PRODUCT_CONTEXT, EngineConfig, EnginePlan, ModelConfig
from lfm.engine.machine import Machine, Place, cpu_place, gpu_place, probe_machine
from lfm.errors import LfmError, MachineError, UsageError
from lfm.model.sizes import (
    DtypeName,
    block_bytes,
    format_bytes,
    num_blocks_for,
    num_parameters,
    weight_bytes,
    workspace_bytes,
)

MIN_CAPABILITY = (8, 0)  # bfloat16 tensor cores
FP8_MIN_CAPABILITY = (8, 9)  # conversions and products of e4m3
GPU_STEP_TOKENS, GPU_STEP_TOKENS_DECODING, CPU_STEP_TOKENS = 8192, 2048, 512
CPU_STEP_TOKENS_LARGE = 128  # a step of a large model has to end well before it would be called stuck
GPU_MAX_RUNNING, CPU_MAX_RUNNING = 1024, 64
GPU_BLOCK_SIZE, CPU_BLOCK_SIZE, CPU_BLOCK_SIZE_SMALL = 128, 32, 16
SMALL_MODEL_PARAMETERS = 1_000_000_000
ONE_THREAD_PARAMETERS = 20_000_000
MIN_CONTEXT = 512  # the shortest context worth serving when the user named none
MIN_TOKENS_PER_RUNNING = 512  # more sequences than the pool has room for at this length would only preempt each other
CPU_POOL_TOKENS_PER_RUNNING = 2048  # a larger pool would take memory from the user's other programs for nothing


def plan_engine(config: EngineConfig, model: ModelConfig, *, machine: Machine | None = None) -> EnginePlan:
    """Decide every setting. `machine` None: look at this one.

    Raises MachineError when the machine lacks the device or the memory (needed, had, and a command that would fit), and
    UsageError for a named value that the model cannot serve.
    """
    machine = probe_machine() if machine is None else machine
    try:
        return _Planner(config, model, machine=machine).plan()
    except _LackError as error:
        fix = _find_fix(config, model, machine=machine)
        raise MachineError(f"{error.cause}. {f'Run: {fix}' if fix else error.wanted}") from None


class _LackError(Exception):
    """What the machine lacks, and which machine would do, for the one message that `plan_engine` makes of it."""

    def __init__(self, cause: str, *, wanted: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.wanted = wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """What is left for the cache beside `fixed_bytes` of weights and working memory, in blocks."""

    num_blocks: int
    block_size: int
    block_bytes: int
    fixed_bytes: int

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


class _Planner:
    """One attempt at a plan. Each choice appends its reason."""

    def __init__(self, config: EngineConfig, model: ModelConfig, *, machine: Machine) -> None:
        self._config = config
        self._model = model
        self._machine = machine
        self._reasons: list[str] = []

    def plan(self) -> EnginePlan:
        """Raises _LackError or UsageError."""
        config = self._config
        place = self._choose_place()
        self._check_fp8(place)
        dtype = self._choose_dtype(place)
        step_tokens, step_tokens_decoding = self._choose_step_tokens(place)
        most_running = self._most_running(place)
        pool = self._measure_pool(place, dtype, step_tokens=step_tokens, most_running=most_running)
        context = self._choose_context(place, pool)
        max_running = self._choose_max_running(pool, most_running)
        num_blocks = self._choose_num_blocks(place, pool, context=context, max_running=max_running)
        return EnginePlan(
            device=place.device,
            dtype=dtype,
            quantize=config.quantize,
            kv_dtype=config.kv_dtype,
            max_model_len=context,
            max_running=max_running,
            step_tokens=step_tokens,
            step_tokens_decoding=step_tokens_decoding,
            block_size=pool.block_size,
            num_blocks=num_blocks,
            memory_fraction=config.memory_fraction,
            max_queue=config.max_queue,
            plain_loop=config.plain_loop,
            prefix_caching=config.prefix_caching,
            seed=config.seed,
            num_threads=self._choose_num_threads(place),
            reasons=tuple(self._reasons),
        )

    def _say(self, choice: str, because: str) -> None:
        self._reasons.append(f"{choice}: {because}")

    def _choose_place(self) -> Place:
        asked, machine, fraction = self._config.device, self._machine, self._config.memory_fraction
        no_gpu = _why_no_gpu(machine)
        if asked == "cuda" and no_gpu is not None:
            raise _LackError(f"--device cuda cannot be had: {no_gpu}", wanted=_wanted_gpu(MIN_CAPABILITY))
        if asked == "cpu" or no_gpu is not None:
            self._say(f"device cpu, {machine.cpu_count} cores", no_gpu if asked == "auto" and no_gpu else "named")
            return cpu_place(machine, memory_fraction=fraction)
        self._say(f"device cuda:0, {machine.cuda_devices[0].name}", "named" if asked == "cuda" else "it is there")
        return gpu_place(machine, index=0, memory_fraction=fraction)

    def _check_fp8(self, place: Place) -> None:
        """A GPU computes with fp8 in hardware or not at all; on a CPU only the cache can be in fp8, to save memory."""
        config = self._config
        if config.quantize == "fp8" and not place.is_gpu:
            reason = "--device cpu" if config.device == "cpu" else _why_no_gpu(self._machine)
            cause = f"--quantize fp8 needs a GPU of compute capability {_dotted(FP8_MIN_CAPABILITY)} or later: {reason}"
            raise _LackError(cause, wanted=_wanted_gpu(FP8_MIN_CAPABILITY))
        flags = [f"--quantize {config.quantize}"] if config.quantize == "fp8" else []
        flags += [f"--kv-dtype {config.kv_dtype}"] if config.kv_dtype == "fp8" else []
        if not flags:
            return
        if place.is_gpu:
            gpu = self._machine.cuda_devices[0]
            if gpu.capability < FP8_MIN_CAPABILITY:
                has, least = _dotted(gpu.capability), _dotted(FP8_MIN_CAPABILITY)
                cause = f"{' and '.join(flags)}: {gpu.name} has compute capability {has}, fp8 begins at {least}"
                raise _LackError(cause, wanted=_wanted_gpu(FP8_MIN_CAPABILITY))
            if config.dtype not in ("auto", "bfloat16"):
                raise UsageError(f"{flags[0]} goes with --dtype bfloat16 on a GPU, not {config.dtype}.")
        if config.quantize == "fp8":
            self._say("weights in fp8", "named; router, norms, embedding and head stay as they are")
        if config.kv_dtype == "fp8":
            self._say("K/V cache in fp8", "named")

    def _choose_dtype(self, place: Place) -> DtypeName:
        if self._config.dtype != "auto":
            self._say(f"dtype {self._config.dtype}", "named")
            return self._config.dtype
        if place.is_gpu:
            self._say("dtype bfloat16", "the checkpoint's, and fast on a GPU")
            return "bfloat16"
        in_float32 = weight_bytes(self._model, "float32")
        if in_float32 <= place.budget_bytes // 2:
            self._say("dtype float32", f"{format_bytes(in_float32)} of weights are small for this machine")
            return "float32"
        self._say("dtype bfloat16", f"float32 weights, {format_bytes(in_float32)}, would take over half of the memory")
        return "bfloat16"

    def _choose_step_tokens(self, place: Place) -> tuple[int, int]:
        """Tokens per step, and tokens per step while anything decodes."""
        named, named_decoding = self._config.step_tokens, self._config.step_tokens_decoding
        if named is not None:
            self._say(f"{named:,} tokens per step", "named")
            decoding = named_decoding or (GPU_STEP_TOKENS_DECODING if place.is_gpu else named)
            return named, min(named, decoding)
        if place.is_gpu and named_decoding is not None:
            decoding = min(named_decoding, GPU_STEP_TOKENS)
            self._say(f"{GPU_STEP_TOKENS:,} tokens per step, {decoding:,} while anything decodes", "named")
            return GPU_STEP_TOKENS, decoding
        if place.is_gpu:
            choice = f"{GPU_STEP_TOKENS:,} tokens per step, {GPU_STEP_TOKENS_DECODING:,} while anything decodes"
            self._say(choice, "longer steps would stall the running streams, so only a long queue gets them")
            return GPU_STEP_TOKENS, GPU_STEP_TOKENS_DECODING
        if num_parameters(self._model) >= SMALL_MODEL_PARAMETERS:
            self._say(f"{CPU_STEP_TOKENS_LARGE} tokens per step", "a longer step of a large model takes a CPU too long")
            return CPU_STEP_TOKENS_LARGE, CPU_STEP_TOKENS_LARGE
        self._say(f"{CPU_STEP_TOKENS} tokens per step", "the default on a CPU")
        return CPU_STEP_TOKENS, CPU_STEP_TOKENS

    def _choose_num_threads(self, place: Place) -> int | None:
        if place.is_gpu or num_parameters(self._model) >= ONE_THREAD_PARAMETERS:
            return None
        self._say("1 thread of arithmetic", "threads of so small a model wait for each other longer than they work")
        return 1

    def _most_running(self, place: Place) -> int:
        limit, named = GPU_MAX_RUNNING if place.is_gpu else CPU_MAX_RUNNING, self._config.max_running
        if named is not None and named > limit:
            raise UsageError(f"--max-running {named} is out of range on {place.device}. Allowed: 1 to {limit}.")
        return named or limit

    def _measure_pool(self, place: Place, dtype: DtypeName, *, step_tokens: int, most_running: int) -> _Pool:
        block_size = self._config.block_size or default_block_size(self._model, place)
        quantize, kv_dtype = self._config.quantize, self._config.kv_dtype
        weights = weight_bytes(self._model, dtype, quantize=quantize)
        work = workspace_bytes(self._model, step_tokens=step_tokens, max_running=most_running, dtype=dtype)
        per_block = block_bytes(self._model, block_size=block_size, dtype=dtype, kv_dtype=kv_dtype)
        fixed = weights + work
        if fixed + 2 * per_block > place.budget_bytes:
            kind = dtype if quantize == "none" else quantize
            needed = f"{format_bytes(weights)} for weights in {kind} and {format_bytes(work)} to work in"
            raise self._too_large(needed, fixed + 2 * per_block, place)
        # A named number of blocks serves tests and benchmarks, and may be small enough to force preemption.
        num_blocks = self._config.num_blocks or (place.budget_bytes - fixed) // per_block
        return _Pool(num_blocks=num_blocks, block_size=block_size, block_bytes=per_block, fixed_bytes=fixed)

    def _too_large(self, needed: str, needed_bytes: int, place: Place) -> _LackError:
        wanted = f"Use a machine that can give {format_bytes(needed_bytes)}."
        return _LackError(f"{self._config.model} needs {needed}; {place.had}", wanted=wanted)

    def _choose_context(self, place: Place, pool: _Pool) -> int:
        named, limit = self._config.max_model_len, self._model.max_position_embeddings
        if named is not None and named > limit:
            raise UsageError(f"--max-model-len {named} is beyond the model's {limit} positions. Give at most {limit}.")
        wanted = named or min(limit, PRODUCT_CONTEXT)
        fitting = (pool.num_blocks - 1) * pool.block_size  # one block stays free, the watermark of a running sequence
        if named is not None and self._config.num_blocks is not None:
            fitting = wanted
        if fitting < (wanted if named is not None else min(wanted, MIN_CONTEXT)):
            cache = (num_blocks_for(wanted, pool.block_size) + 1) * pool.block_bytes
            needed = (
                f"{format_bytes(pool.fixed_bytes)} for weights and work and {format_bytes(cache)} "
                f"for a context of {wanted:,} tokens"
            )
            raise self._too_large(needed, pool.fixed_bytes + cache, place)
        if named is not None:
            self._say(f"context {wanted:,} tokens", "named")
        elif fitting < wanted:
            self._say(f"context {fitting:,} tokens, not {wanted:,}", "all that the memory left for the cache holds")
        else:
            more = (
                f"the model card's; --max-model-len takes up to {limit:,}"
                if limit > wanted
                else "all that the model has"
            )
            self._say(f"context {wanted:,} tokens", more)
        return min(wanted, fitting)

    def _choose_max_running(self, pool: _Pool, most_running: int) -> int:
        if self._config.max_running is not None:
            self._say(f"{most_running:,} sequences at once", "named")
            return most_running
        fitting = max(1, pool.num_tokens // MIN_TOKENS_PER_RUNNING)
        if fitting < most_running:
            choice = f"{fitting:,} sequences at once, not {most_running:,}"
            self._say(choice, f"the cache holds {pool.num_tokens:,} tokens")
            return fitting
        self._say(f"{most_running:,} sequences at once", "the default for this device")
        return most_running

    def _choose_num_blocks(self, place: Place, pool: _Pool, *, context: int, max_running: int) -> int | None:
        num_blocks: int | None
        if self._config.num_blocks is not None:
            num_blocks, because = self._config.num_blocks, "named"
        elif place.is_gpu:
            num_blocks, because = None, "as many as fit once the weights are loaded"
        else:
            tokens = max(context, max_running * CPU_POOL_TOKENS_PER_RUNNING)
            num_blocks = min(pool.num_blocks, num_blocks_for(tokens, pool.block_size) + max_running)
            because = f"{format_bytes(num_blocks * pool.block_bytes)}, room for {num_blocks * pool.block_size:,} tokens"
        count = f"about {pool.num_blocks:,}" if num_blocks is None else f"{num_blocks:,}"
        self._say(f"{count} cache blocks of {pool.block_size} tokens", because)
        return num_blocks


def default_block_size(model: ModelConfig, place: Place) -> int:
    """Tokens per block: the conv tail of a block is worth its bytes only if the block is long."""
    if place.is_gpu:
        return GPU_BLOCK_SIZE
    return CPU_BLOCK_SIZE_SMALL if num_parameters(model) < SMALL_MODEL_PARAMETERS else CPU_BLOCK_SIZE


def _why_no_gpu(machine: Machine) -> str | None:
    """The reason why the first GPU cannot be used; None when it can."""
    if not machine.cuda_devices:
        return machine.cuda_note
    gpu = machine.cuda_devices[0]
    if gpu.capability >= MIN_CAPABILITY:
        return None
    return f"{gpu.name} has compute capability {_dotted(gpu.capability)}, below {_dotted(MIN_CAPABILITY)}"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _wanted_gpu(capability: tuple[int, int]) -> str:
    return f"Use a machine with an NVIDIA GPU of compute capability {_dotted(capability)} or later."


def _find_fix(config: EngineConfig, model: ModelConfig, *, machine: Machine) -> str | None:
    """The command nearest to what was asked that this machine can run, checked by planning it. None: there is none."""
    for candidate, candidate_model in _alternatives(config, model):
        try:
            plan = _Planner(candidate, candidate_model, machine=machine).plan()
        except (_LackError, LfmError):
            continue  # this one is no way out either
        if config.max_model_len is not None:  # name the context that fits, as the user named one
            candidate = replace(candidate, max_model_len=plan.max_model_len)
        return _command(candidate)
    return None


def _alternatives(config: EngineConfig, model: ModelConfig) -> Iterator[tuple[EngineConfig, ModelConfig]]:
    """Settings to try instead, the nearest to the wish first."""
    from lfm.model.presets import PRESETS

    small, tiny = PRESETS["lfm2-8b-a1b"], PRESETS["tiny"]
    is_random = config.model.startswith("random:")
    free = replace(config, max_model_len=None)
    yield free, model
    yield replace(config, dtype="bfloat16"), model
    yield replace(free, dtype="bfloat16"), model
    yield replace(config, dtype="auto", quantize="fp8", kv_dtype="fp8"), model
    plain = replace(config, quantize="none", kv_dtype="auto")
    yield plain, model
    plain = replace(plain, max_model_len=None, dtype="auto")
    yield plain, model
    yield replace(plain, device="cpu"), model
    if num_parameters(small) < num_parameters(model):
        name = "random:lfm2-8b-a1b" if is_random else "LiquidAI/LFM2-8B-A1B"
        yield replace(plain, model=name), small
        yield replace(plain, model=name, device="cpu"), small
    if is_random:
        yield replace(plain, model="random:tiny"), tiny
        yield replace(plain, model="random:tiny", device="cpu"), tiny


def _command(config: EngineConfig) -> str:
    """The `lfm serve` line of a config, with the flags that decide memory."""
    default = EngineConfig()
    words = [f"lfm serve {config.model}"]
    names = ("device", "dtype", "quantize", "kv_dtype", "max_model_len", "max_running", "step_tokens", "block_size")
    for name in (*names, "memory_fraction"):
        if getattr(config, name) != getattr(default, name):
            words.append(f"--{name.replace('_', '-')} {getattr(config, name)}")
    return " ".join(words)
