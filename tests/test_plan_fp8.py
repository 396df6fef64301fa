"""What a machine that cannot do what was asked is told before any weight is read: one cause, one command that works."""

import shlex
from dataclasses import replace

import pytest
import torch

from lfm.config import EngineConfig, EnginePlan
from lfm.engine import build, machine
from lfm.engine.machine import Gpu, Machine, probe_machine
from lfm.engine.plan import plan_engine
from lfm.errors import MachineError, UsageError
from lfm.model.presets import PRESETS

GB = 10**9
FP8 = EngineConfig(quantize="fp8")
CPU = Machine(cuda_devices=(), cpu_total_bytes=200 * GB, cpu_available_bytes=100 * GB, cpu_count=4)


def gpu_machine(
    name: str, capability: tuple[int, int], *, total_gb: float = 80.0, free_gb: float | None = None, cpu_gb: float = 4.0
) -> Machine:
    total = round(total_gb * GB)
    gpu = Gpu(name=name, total_bytes=total, free_bytes=round((free_gb or total_gb) * GB), capability=capability)
    return replace(CPU, cuda_devices=(gpu,), cpu_available_bytes=round(cpu_gb * GB))


H200 = gpu_machine("NVIDIA H200", (9, 0), total_gb=150.0)
A100 = gpu_machine("NVIDIA A100", (8, 0))
RTX_4090 = gpu_machine("NVIDIA GeForce RTX 4090", (8, 9), total_gb=24.0)
T4 = gpu_machine("Tesla T4", (7, 5), total_gb=16.0, cpu_gb=100.0)


def plan(config: EngineConfig, machine: Machine, model: str = "random:lfm2-24b-a2b") -> EnginePlan:
    return plan_engine(replace(config, model=model), PRESETS[model.removeprefix("random:")], machine=machine)


def test_fp8_is_planned_where_the_hardware_has_it() -> None:
    chosen = plan(replace(FP8, kv_dtype="fp8"), H200)
    assert (chosen.quantize, chosen.kv_dtype, chosen.dtype) == ("fp8", "fp8", "bfloat16")
    assert any("weights in fp8" in reason for reason in chosen.reasons)
    assert any("K/V cache in fp8" in reason for reason in chosen.reasons)


def test_the_cache_holds_what_was_promised() -> None:
    """0.9 of an H200, beside bf16 weights: 3.7 million tokens in bf16, 6.8 million in fp8, conv tails included."""
    counts = {}
    total = 150_110_011_392  # of the card, as its driver says
    for kv_dtype in ("auto", "fp8"):
        config = EngineConfig(kv_dtype=kv_dtype, step_tokens=8192)  # type: ignore[arg-type]
        reasons = plan(config, gpu_machine("NVIDIA H200", (9, 0), total_gb=total / GB)).reasons
        text = next(reason for reason in reasons if "cache blocks of 128 tokens" in reason)
        counts[kv_dtype] = int(text.split()[1].replace(",", "")) * 128
    assert counts["auto"] >= 3_700_000
    assert counts["fp8"] >= 6_800_000


@pytest.mark.parametrize(
    ("config", "machine", "cause", "command"),
    [
        (
            FP8,
            CPU,
            "--quantize fp8 needs a GPU of compute capability 8.9 or later: torch sees no CUDA device.",
            "lfm serve random:lfm2-24b-a2b",
        ),
        (
            replace(FP8, device="cpu"),
            replace(H200, cpu_available_bytes=100 * GB),
            "--quantize fp8 needs a GPU of compute capability 8.9 or later: --device cpu.",
            "lfm serve random:lfm2-24b-a2b --device cpu",
        ),
        (
            FP8,
            A100,
            "--quantize fp8: NVIDIA A100 has compute capability 8.0, fp8 begins at 8.9.",
            "lfm serve random:lfm2-24b-a2b",
        ),
        (
            EngineConfig(kv_dtype="fp8"),
            A100,
            "--kv-dtype fp8: NVIDIA A100 has compute capability 8.0, fp8 begins at 8.9.",
            "lfm serve random:lfm2-24b-a2b",
        ),
        (
            replace(FP8, kv_dtype="fp8"),
            gpu_machine("NVIDIA A100", (8, 0), total_gb=40.0),
            "--quantize fp8 and --kv-dtype fp8: NVIDIA A100 has compute capability 8.0, fp8 begins at 8.9.",
            "lfm serve random:lfm2-8b-a1b",
        ),
        (
            FP8,
            T4,
            "--quantize fp8 needs a GPU of compute capability 8.9 or later: "
            "Tesla T4 has compute capability 7.5, below 8.0.",
            "lfm serve random:lfm2-24b-a2b",
        ),
        (
            EngineConfig(device="cuda"),
            T4,
            "--device cuda cannot be had: Tesla T4 has compute capability 7.5, below 8.0.",
            "lfm serve random:lfm2-24b-a2b --device cpu",
        ),
        (
            EngineConfig(device="cuda"),
            replace(CPU, cuda_note="torch 2.13.0 sees no CUDA device (The NVIDIA driver on your system is too old)"),
            "--device cuda cannot be had: torch 2.13.0 sees no CUDA device "
            "(The NVIDIA driver on your system is too old).",
            "lfm serve random:lfm2-24b-a2b --device cpu",
        ),
        (
            EngineConfig(),
            gpu_machine("NVIDIA L40S", (8, 9), total_gb=48.0),
            "random:lfm2-24b-a2b needs 47.7 GB for weights in bfloat16 and ",
            "lfm serve random:lfm2-24b-a2b --quantize fp8 --kv-dtype fp8",
        ),
        (
            EngineConfig(),
            gpu_machine("NVIDIA H200", (9, 0), total_gb=150.0, free_gb=30.0),
            "cuda:0 can give 15.0 GB (of 150.0 GB, 30.0 GB are free, 10% stay free).",
            "lfm serve random:tiny",
        ),
    ],
)  # fmt: skip
def test_a_refusal_names_the_cause_and_a_command_that_works(
    config: EngineConfig, machine: Machine, cause: str, command: str
) -> None:
    with pytest.raises(MachineError) as caught:
        plan(config, machine)
    message = str(caught.value)
    assert cause in message
    assert "\n" not in message
    assert message.endswith(f" Run: {command}")
    words = shlex.split(command)
    options = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(words[3::2], words[4::2])}  # noqa: B905
    plan(replace(EngineConfig(), **options), machine, words[2])  # type: ignore[arg-type]


def test_where_nothing_fits_the_machine_that_would_do_is_named() -> None:
    config = replace(FP8, model="LiquidAI/LFM2-24B-A2B")
    with pytest.raises(MachineError, match=r"Use a machine with an NVIDIA GPU of compute capability 8\.9 or later\.$"):
        plan_engine(config, PRESETS["lfm2-24b-a2b"], machine=replace(CPU, cpu_available_bytes=GB))


def test_a_cache_in_fp8_saves_memory_on_a_cpu_too() -> None:
    plain, small = (plan(EngineConfig(kv_dtype=kind), CPU, "random:tiny") for kind in ("auto", "fp8"))  # type: ignore[arg-type]
    assert (small.device, small.kv_dtype, small.dtype) == ("cpu", "fp8", plain.dtype)


def test_fp8_with_another_dtype_on_a_gpu_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="--quantize fp8 goes with --dtype bfloat16 on a GPU, not float32"):
        plan(replace(FP8, dtype="float32"), H200, "random:tiny")


@pytest.mark.parametrize("config", [FP8, EngineConfig(device="cuda")])
def test_no_weight_is_touched_before_a_refusal(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm.engine.plan.probe_machine", lambda: CPU)
    monkeypatch.setattr(build, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(MachineError):
        build.build_engine(replace(config, model="random:tiny"))


def cuda_that(monkeypatch: pytest.MonkeyPatch, message: str | None) -> None:
    """A torch built for CUDA that sees no device, and says `message` when it is asked why."""

    def init() -> None:
        if message is not None:
            raise RuntimeError(message)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.parametrize(
    ("message", "note"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by\n"
            "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx",
            "(The NVIDIA driver on your system is too old (found version 11040))",
        ),
        ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", "(Found no NVIDIA driver"),
        ("No CUDA GPUs are available", "(No CUDA GPUs are available)"),
        (None, "sees no CUDA device"),
    ],
)
def test_why_there_is_no_gpu_is_asked_of_torch(message: str | None, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_that(monkeypatch, message)
    found = probe_machine()
    assert found.cuda_devices == ()
    assert note in found.cuda_note
    assert "\n" not in found.cuda_note


def test_an_old_driver_reaches_the_user_with_the_command_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_that(monkeypatch, "The NVIDIA driver on your system is too old (found version 11040). Please update it.")
    monkeypatch.setattr(machine, "_probe_memory", lambda: (200 * GB, 100 * GB))
    with pytest.raises(MachineError) as caught:
        plan(EngineConfig(device="cuda"), probe_machine())
    assert str(caught.value).startswith("--device cuda cannot be had: torch ")
    assert "driver on your system is too old (found version 11040)). Run: lfm serve" in str(caught.value)
