"""The flags that several verbs share. Each is a field of a config dataclass, which also holds its default.

A flag wins over LFM_<FLAG> in the environment, which is read when the command starts and wins over the default.
"""

from typing import Annotated, Any, Literal

import typer

from lfm.config import Device, EngineConfig, KvDtype, Quantize, ServerConfig

ENGINE = EngineConfig()
SERVER = ServerConfig()

MODEL_HELP = "builtin, a folder in Hugging Face layout, a hub id (downloaded), or random:PRESET."


def flag(field: str, help_text: str, *, panel: str | None = None) -> Any:
    """A typer option for a config field: --the-field, and LFM_THE_FIELD in the environment."""
    name = f"--{field.replace('_', '-')}"
    return typer.Option(name, envvar=f"LFM_{field.upper()}", show_envvar=False, help=help_text, rich_help_panel=panel)


_ENGINE = "Engine"
_MORE = "Engine, seldom needed"

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", envvar="LFM_MODEL", show_envvar=False, help=MODEL_HELP)]
DeviceFlag = Annotated[Device, flag("device", "Where to run.", panel=_ENGINE)]
DtypeFlag = Annotated[
    Literal["auto", "float32", "bfloat16"], flag("dtype", "Number format of weights and activations.", panel=_ENGINE)
]
QuantizeFlag = Annotated[Quantize, flag("quantize", "Number format of projections and experts.", panel=_ENGINE)]
KvDtypeFlag = Annotated[KvDtype, flag("kv_dtype", "Number format of the K/V cache.", panel=_ENGINE)]
MaxModelLenFlag = Annotated[
    int | None, flag("max_model_len", "Longest prompt plus output, in tokens. Unset: what fits.", panel=_ENGINE)
]
MaxRunningFlag = Annotated[
    int | None, flag("max_running", "Most sequences at once. Unset: 1,024 on a GPU, 64 on a CPU.", panel=_ENGINE)
]
MemoryFractionFlag = Annotated[
    float, flag("memory_fraction", "Share of the device's memory that may be used.", panel=_ENGINE)
]
RevisionFlag = Annotated[str | None, flag("revision", "Branch, tag or commit of a hub id.", panel=_ENGINE)]
StepTokensFlag = Annotated[int | None, flag("step_tokens", "Most tokens that one step computes.", panel=_MORE)]
BlockSizeFlag = Annotated[int | None, flag("block_size", "Tokens per cache block.", panel=_MORE)]
MaxQueueFlag = Annotated[int, flag("max_queue", "Most requests that wait; more get a 503.", panel=_MORE)]
PlainLoopFlag = Annotated[
    bool, flag("plain_loop", "No overlap of host and device, reference operations only: the oracle.", panel=_MORE)
]
DebugFlag = Annotated[bool, flag("debug", "Show tracebacks and debug logs.", panel=_MORE)]

_SAMPLING = "Sampling (unset: what the model's makers recommend)"

MaxTokensFlag = Annotated[
    int | None, flag("max_tokens", "Most tokens to generate. Unset: all of the context that is left.", panel=_SAMPLING)
]
TemperatureFlag = Annotated[float | None, flag("temperature", "0 is greedy.", panel=_SAMPLING)]
TopKFlag = Annotated[int | None, flag("top_k", "Sample from the k likeliest tokens; 0 is off.", panel=_SAMPLING)]
TopPFlag = Annotated[float | None, flag("top_p", "Sample from the likeliest tokens of this share.", panel=_SAMPLING)]
MinPFlag = Annotated[
    float | None, flag("min_p", "Leave out tokens less likely than this share of the likeliest.", panel=_SAMPLING)
]
RepetitionPenaltyFlag = Annotated[
    float | None, flag("repetition_penalty", "Above 1: repeat less of prompt and output.", panel=_SAMPLING)
]
PresencePenaltyFlag = Annotated[
    float | None, flag("presence_penalty", "Above 0: repeat less of the output.", panel=_SAMPLING)
]
FrequencyPenaltyFlag = Annotated[
    float | None, flag("frequency_penalty", "Above 0: repeat less, by how often it was used.", panel=_SAMPLING)
]
SeedFlag = Annotated[int | None, flag("seed", "Makes sampling repeatable.", panel=_SAMPLING)]
StopFlag = Annotated[list[str] | None, flag("stop", "End before this text. May be repeated.", panel=_SAMPLING)]
