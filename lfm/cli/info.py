"""`lfm info`: what a model is and what of it fits on this machine, without loading its weights."""

from typing import TYPE_CHECKING

from lfm.cli import options
from lfm.cli.options import ENGINE
from lfm.config import ARCHITECTURES, PRODUCT_CONTEXT, EngineConfig, ModelConfig
from lfm.errors import MachineError
from lfm.model.sizes import (
    conv_state_bytes,
    format_bytes,
    kv_bytes_per_token,
    num_active_parameters,
    num_parameters,
    weight_bytes,
)

if TYPE_CHECKING:
    from rich.table import Table

    from lfm.engine.machine import Machine
    from lfm.model.source import ModelSource

CONTEXTS = (2048, 8192, PRODUCT_CONTEXT, 128_000)


def info(
    model: options.ModelArgument = ENGINE.model,
    device: options.DeviceFlag = ENGINE.device,
    dtype: options.DtypeFlag = "auto",
    max_model_len: options.MaxModelLenFlag = ENGINE.max_model_len,
    memory_fraction: options.MemoryFractionFlag = ENGINE.memory_fraction,
    revision: options.RevisionFlag = ENGINE.revision,
    debug: options.DebugFlag = False,
) -> None:
    """Show a model's shape and sizes, and what of it fits on this machine."""
    from rich.console import Console

    from lfm.engine.machine import probe_machine
    from lfm.model.source import describe_model

    config = EngineConfig(
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        memory_fraction=memory_fraction,
    )
    source = describe_model(model, revision=revision)
    machine = probe_machine()
    console = Console(highlight=False)
    console.print(_model_table(source))
    console.print(_fit_table(source.config, machine, memory_fraction=memory_fraction))
    console.print()
    console.print(_plan_text(config, source, machine), markup=False)


def _model_table(source: "ModelSource") -> "Table":
    from rich.table import Table

    from lfm.chat.defaults import defaults_for_source

    table = Table(title=source.name, show_header=False, title_justify="left")
    for name, value in (*_shape(source.config), *_sizes(source.config)):
        table.add_row(name, value)
    defaults = defaults_for_source(source.folder, source.config)
    values = ", ".join(f"{name} {value:g}" for name, value in defaults.as_dict().items())
    table.add_row("default sampling", f"{values} ({defaults.origin})")
    return table


def _shape(config: ModelConfig) -> list[tuple[str, str]]:
    num_dense = config.num_hidden_layers - config.num_moe_layers
    layers = (
        f"{config.num_hidden_layers}: {len(config.conv_layers)} short conv, {len(config.attention_layers)} attention"
    )
    rows = [
        ("architecture", f"{ARCHITECTURES[config.model_type]} ({config.model_type})"),
        ("layers", layers),
        ("feed-forward", f"{num_dense} dense of width {config.intermediate_size:,}"),
        ("hidden size", f"{config.hidden_size:,}"),
        ("heads", f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, of {config.head_dim}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("positions", f"{config.max_position_embeddings:,}"),
    ]
    if config.num_moe_layers:
        experts = f"{config.num_experts} experts of width {config.moe_intermediate_size:,}"
        chosen = f"{config.num_experts_per_tok} per token"
        rows.insert(3, ("", f"{config.num_moe_layers} with {experts}, {chosen}"))
    return rows


def _sizes(config: ModelConfig) -> list[tuple[str, str]]:
    weights = weight_bytes(config, "bfloat16")
    return [
        ("parameters", f"{num_parameters(config):,}"),
        ("active per token", f"{num_active_parameters(config):,}"),
        ("weights", f"{weights:,} bytes ({format_bytes(weights)}) in bfloat16"),
        ("K/V per token", f"{kv_bytes_per_token(config, 'bfloat16'):,} bytes in bfloat16"),
        ("conv state per sequence", f"{conv_state_bytes(config, 'bfloat16'):,} bytes in bfloat16"),
    ]


def _fit_table(config: ModelConfig, machine: "Machine", *, memory_fraction: float) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    from lfm.engine.fit import fits_on

    contexts = sorted({min(context, config.max_position_embeddings) for context in CONTEXTS})
    table = Table(title="Sequences at once that fit on this machine, by context in tokens", box=SIMPLE)
    table.title_justify = "left"
    for heading in ("device", "dtype", "weights", "cache", *(f"{context:,}" for context in contexts)):
        table.add_column(heading, justify="left" if heading in ("device", "dtype") else "right", no_wrap=True)
    captions = {}
    for fit in fits_on(config, machine, memory_fraction=memory_fraction):
        cache = format_bytes(fit.cache_bytes) if fit.cache_bytes > 0 else "-"
        counts = [f"{fit.num_sequences(context):,}" if fit.cache_bytes > 0 else "-" for context in contexts]
        table.add_row(fit.device, fit.dtype, format_bytes(fit.weight_bytes), cache, *counts)
        captions[fit.device] = (
            f"{fit.device}: {_device_name(fit.device, machine)}, may use {format_bytes(fit.budget_bytes)}"
        )
    table.caption = "\n".join([*captions.values(), "-: the weights do not fit"])
    table.caption_justify = "left"
    return table


def _device_name(device: str, machine: "Machine") -> str:
    if device == "cpu":
        return f"{machine.cpu_count} cores"
    return machine.cuda_devices[int(device.removeprefix("cuda:"))].name


def _plan_text(config: EngineConfig, source: "ModelSource", machine: "Machine") -> str:
    """What `lfm serve` would choose here, or why it could not."""
    from lfm.engine.plan import plan_engine

    try:
        plan = plan_engine(config, source.config, machine=machine)
    except MachineError as error:
        return f"lfm serve {config.model} would fail here: {error}"
    return "\n".join([f"lfm serve {config.model} would choose:", *(f"  {reason}" for reason in plan.reasons)])
