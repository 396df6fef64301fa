"""What is chosen for a machine and a model, why, and what a machine that is too small is told."""

import re
import shlex
from dataclasses import fields, replace

import pytest

from lfm.config import EngineConfig, EnginePlan, ModelConfig
from lfm.engine.fit import fits_on
from lfm.engine.machine import Gpu, Machine, probe_machine
from lfm.engine.plan import plan_engine
from lfm.errors import LfmError, MachineError, UsageError
from lfm.model.presets import PRESETS
from lfm.model.sizes import block_bytes, weight_bytes

GB = 10**9
LFM2_24B, LFM2_8B, TINY = PRESETS["lfm2-24b-a2b"], PRESETS["lfm2-8b-a1b"], PRESETS["tiny"]


def cpu_machine(available_gb: float = 20.0) -> Machine:
    available = round(available_gb * GB)
    return Machine(cuda_devices=(), cpu_total_bytes=2 * available, cpu_available_bytes=available, cpu_count=4)


def gpu_machine(
    total_gb: float = 150.0, *, capability: tuple[int, int] = (9, 0), free_gb: float | None = None
) -> Machine:
    total = round(total_gb * GB)
    free = total if free_gb is None else round(free_gb * GB)
    gpu = Gpu(name="NVIDIA H200", total_bytes=total, free_bytes=free, capability=capability)
    return replace(cpu_machine(), cuda_devices=(gpu,))


def plan(model: str = "random:tiny", *, machine: Machine, config: EngineConfig | None = None) -> EnginePlan:
    config = replace(config or EngineConfig(), model=model)
    return plan_engine(config, PRESETS[model.removeprefix("random:")], machine=machine)


def reason(chosen: EnginePlan, start: str) -> str:
    return next(text for text in chosen.reasons if start in text)


def test_a_gpu_is_chosen_where_there_is_one() -> None:
    chosen = plan("random:lfm2-24b-a2b", machine=gpu_machine())
    assert (chosen.device, chosen.dtype, chosen.block_size) == ("cuda:0", "bfloat16", 128)
    assert (chosen.step_tokens, chosen.step_tokens_decoding, chosen.max_running) == (8192, 2048, 1024)
    assert chosen.max_model_len == 32_768
    assert chosen.num_blocks is None  # measured once the weights are loaded
    assert "NVIDIA H200" in reason(chosen, "device cuda:0")


def test_a_cpu_is_chosen_where_there_is_no_gpu_and_says_so() -> None:
    chosen = plan(machine=cpu_machine())
    assert (chosen.device, chosen.dtype, chosen.block_size) == ("cpu", "float32", 16)
    assert (chosen.step_tokens, chosen.step_tokens_decoding, chosen.max_running) == (512, 512, 64)
    assert "torch sees no CUDA device" in reason(chosen, "device cpu")


def test_a_gpu_that_is_too_old_is_passed_over_with_the_reason() -> None:
    chosen = plan(machine=gpu_machine(11, capability=(7, 5)))
    assert chosen.device == "cpu"
    assert "compute capability 7.5, below 8.0" in reason(chosen, "device cpu")


@pytest.mark.parametrize("machine", [cpu_machine(), gpu_machine(capability=(7, 5))])
def test_asking_for_a_gpu_that_cannot_be_used_is_the_machine_s_fault(machine: Machine) -> None:
    with pytest.raises(MachineError, match=r"--device cuda cannot be had.*--device cpu"):
        plan(machine=machine, config=EngineConfig(device="cuda"))


def test_a_cpu_that_holds_only_half_the_float32_weights_gets_bfloat16() -> None:
    chosen = plan("random:lfm2-8b-a1b", machine=cpu_machine(30.0))
    assert chosen.dtype == "bfloat16"
    assert "33.4 GB" in reason(chosen, "dtype bfloat16")


def test_a_tiny_model_does_not_take_the_whole_memory() -> None:
    chosen = plan(machine=cpu_machine(200.0))
    assert chosen.num_blocks is not None
    per_block = block_bytes(TINY, block_size=chosen.block_size, dtype=chosen.dtype)
    assert chosen.num_blocks * per_block < 1 * GB
    assert chosen.num_blocks * chosen.block_size >= chosen.max_model_len


def test_a_large_model_on_a_cpu_leaves_what_the_fraction_leaves() -> None:
    machine = cpu_machine(60.0)
    chosen = plan("random:lfm2-24b-a2b", machine=machine, config=EngineConfig(memory_fraction=0.9))
    assert chosen.num_blocks is not None
    pool = chosen.num_blocks * block_bytes(LFM2_24B, block_size=chosen.block_size, dtype=chosen.dtype)
    assert weight_bytes(LFM2_24B, chosen.dtype) + pool <= 0.9 * machine.cpu_available_bytes
    assert chosen.num_blocks * chosen.block_size > chosen.max_model_len


def test_the_context_is_reduced_to_what_fits_and_says_so() -> None:
    chosen = plan("random:lfm2-8b-a1b", machine=cpu_machine(19.0))
    assert 512 <= chosen.max_model_len < 32_768
    assert f"context {chosen.max_model_len:,} tokens, not 32,768" in reason(chosen, "context")
    assert chosen.num_blocks is not None
    assert chosen.num_blocks * chosen.block_size > chosen.max_model_len


def test_fewer_sequences_run_at_once_when_memory_is_short() -> None:
    chosen = plan("random:lfm2-24b-a2b", machine=gpu_machine(60.0))
    assert chosen.max_running < 1024
    assert "the cache holds" in reason(chosen, "sequences at once")


def test_a_named_context_that_does_not_fit_is_refused_with_needed_had_and_a_command() -> None:
    config = EngineConfig(max_model_len=100_000)
    with pytest.raises(MachineError) as caught:
        plan("random:lfm2-8b-a1b", machine=cpu_machine(19.0), config=config)
    message = str(caught.value)
    assert "\n" not in message
    assert "for a context of 100,000 tokens" in message
    assert "the CPU can give 17.1 GB (90% of 19.0 GB available)" in message
    assert re.search(r"Run: lfm serve random:lfm2-8b-a1b --max-model-len \d+$", message)


def test_weights_that_do_not_fit_are_refused_with_a_smaller_model() -> None:
    with pytest.raises(MachineError) as caught:
        plan("random:lfm2-24b-a2b", machine=cpu_machine(24.0))
    message = str(caught.value)
    assert "47.7 GB for weights in bfloat16" in message
    assert message.endswith("Run: lfm serve random:lfm2-8b-a1b")


def test_a_named_dtype_that_is_too_large_is_told_the_smaller_one() -> None:
    config = EngineConfig(dtype="float32")
    with pytest.raises(MachineError, match=r"Run: lfm serve random:lfm2-8b-a1b --dtype bfloat16$"):
        plan("random:lfm2-8b-a1b", machine=cpu_machine(24.0), config=config)


def test_a_gpu_that_is_too_small_is_told_of_the_cpu_that_is_not() -> None:
    machine = replace(gpu_machine(8.0), cpu_available_bytes=100 * GB)
    with pytest.raises(MachineError, match=r"Run: lfm serve random:lfm2-24b-a2b --device cpu$"):
        plan("random:lfm2-24b-a2b", machine=machine)


def test_memory_that_other_programs_hold_on_the_gpu_counts_as_gone() -> None:
    with pytest.raises(MachineError, match=r"of 150.0 GB, 40.0 GB are free"):
        plan("random:lfm2-24b-a2b", machine=gpu_machine(150.0, free_gb=40.0))


def test_a_downloaded_model_is_never_answered_with_random_weights() -> None:
    config = EngineConfig(model="LiquidAI/LFM2-24B-A2B")
    with pytest.raises(MachineError, match=r"Use a machine that can give \d+\.\d GB\.$"):
        plan_engine(config, LFM2_24B, machine=cpu_machine(4.0))


@pytest.mark.parametrize("available_gb", [0.5, 4.0, 12.0, 24.0, 40.0, 52.0])
@pytest.mark.parametrize("named", [EngineConfig(), EngineConfig(dtype="float32", max_model_len=120_000, max_running=3)])
def test_a_suggested_command_always_fits(available_gb: float, named: EngineConfig) -> None:
    machine = cpu_machine(available_gb)
    with pytest.raises(MachineError) as caught:
        plan("random:lfm2-24b-a2b", machine=machine, config=named)
    words = shlex.split(str(caught.value).partition("Run: ")[2])
    assert words[:2] == ["lfm", "serve"]
    names = {field.name: field for field in fields(EngineConfig)}
    values: dict[str, object] = {}
    for option, value in zip(words[3::2], words[4::2], strict=True):
        name = option.removeprefix("--").replace("-", "_")
        assert name in names
        values[name] = int(value) if value.isdigit() else value
    plan(words[2], machine=machine, config=replace(EngineConfig(), **values))  # type: ignore[arg-type]


def test_named_values_are_kept_and_said_to_be_named() -> None:
    config = EngineConfig(
        device="cpu",
        dtype="float64",
        max_model_len=1000,
        max_running=3,
        step_tokens=77,
        block_size=5,
        num_blocks=9,
        plain_loop=True,
        prefix_caching=False,
        seed=4,
        max_queue=2,
    )
    chosen = plan(machine=gpu_machine(), config=config)
    for field in fields(EnginePlan):
        if field.name not in ("reasons", "step_tokens_decoding", "num_threads"):
            assert getattr(chosen, field.name) == getattr(config, field.name), field.name
    assert chosen.step_tokens_decoding == 77
    assert all(text.endswith(": named") for text in chosen.reasons if "thread" not in text)


def test_a_small_model_computes_in_one_thread_and_a_large_one_as_torch_decides() -> None:
    assert plan(machine=cpu_machine()).num_threads == 1
    assert plan("random:lfm2-24b-a2b", machine=gpu_machine()).num_threads is None
    assert plan("random:lfm2-8b-a1b", machine=cpu_machine(60.0)).num_threads is None


def test_a_small_named_pool_bounds_the_context_that_is_left_open() -> None:
    chosen = plan(machine=cpu_machine(), config=EngineConfig(num_blocks=65, block_size=16))
    assert chosen.max_model_len == 64 * 16


def test_a_context_beyond_the_model_s_positions_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="--max-model-len 40000 is beyond the model's 32768 positions"):
        plan(machine=cpu_machine(), config=EngineConfig(max_model_len=40_000))


def test_more_sequences_than_a_device_may_run_are_wrong_usage() -> None:
    config = EngineConfig(max_running=65)
    with pytest.raises(UsageError, match=r"--max-running 65 is out of range on cpu. Allowed: 1 to 64"):
        plan(machine=cpu_machine(), config=config)
    assert plan(machine=gpu_machine(), config=config).max_running == 65


def test_what_fits_is_listed_for_every_device_and_precision() -> None:
    fits = {(fit.device, fit.dtype): fit for fit in fits_on(LFM2_24B, gpu_machine(), memory_fraction=0.95)}
    on_gpu, on_cpu = ["bfloat16", "float32", "fp8"], ["bfloat16", "float32"]
    assert list(fits) == [("cuda:0", dtype) for dtype in on_gpu] + [("cpu", dtype) for dtype in on_cpu]
    assert fits["cuda:0", "fp8"].weight_bytes < 0.52 * fits["cuda:0", "bfloat16"].weight_bytes
    assert fits["cuda:0", "fp8"].cache_bytes // fits["cuda:0", "fp8"].block_bytes * 128 > 8_000_000  # tokens
    in_bf16 = fits["cuda:0", "bfloat16"]
    per_sequence = block_bytes(LFM2_24B, block_size=128, dtype="bfloat16") * (32_768 // 128 + 1)
    assert in_bf16.num_sequences(32_768) == in_bf16.cache_bytes // per_sequence > 100
    assert in_bf16.num_sequences(128) == 1024  # no more may run, however much fits
    assert fits["cpu", "float32"].cache_bytes < 0
    assert fits["cpu", "float32"].num_sequences(128) == 0


def test_a_short_model_is_served_at_its_own_length() -> None:
    short: ModelConfig = replace(TINY, max_position_embeddings=256)
    assert plan_engine(EngineConfig(), short, machine=cpu_machine()).max_model_len == 256


def test_step_tokens_named_for_a_gpu_bound_the_decoding_budget_too() -> None:
    chosen = plan(machine=gpu_machine(), config=EngineConfig(step_tokens=1024))
    assert (chosen.step_tokens, chosen.step_tokens_decoding) == (1024, 1024)
    chosen = plan(machine=gpu_machine(), config=EngineConfig(step_tokens=16_384))
    assert (chosen.step_tokens, chosen.step_tokens_decoding) == (16_384, 2048)


def test_the_decoding_budget_can_be_named_up_to_the_step_itself() -> None:
    for named, wanted in ((100, 100), (65_536, 8192)):
        chosen = plan(machine=gpu_machine(), config=EngineConfig(step_tokens_decoding=named))
        assert (chosen.step_tokens, chosen.step_tokens_decoding) == (8192, wanted)
    chosen = plan(machine=gpu_machine(), config=EngineConfig(step_tokens=512, step_tokens_decoding=65_536))
    assert (chosen.step_tokens, chosen.step_tokens_decoding) == (512, 512)


def test_every_error_of_planning_has_the_exit_code_of_its_kind() -> None:
    assert issubclass(MachineError, LfmError)
    with pytest.raises(LfmError) as caught:
        plan("random:lfm2-24b-a2b", machine=cpu_machine(0.001))
    assert caught.value.exit_code == 3


def test_this_machine_can_be_looked_at() -> None:
    machine = probe_machine()
    assert 0 < machine.cpu_available_bytes <= machine.cpu_total_bytes
    assert machine.cpu_count >= 1
    assert machine.cuda_devices or machine.cuda_note
