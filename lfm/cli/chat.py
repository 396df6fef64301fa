"""`lfm chat`: a conversation at the terminal, with a model in this process or with a server, with or without tools."""

from pathlib import Path
from typing import Annotated

from lfm.cli import options
from lfm.cli.options import ENGINE
from lfm.config import EngineConfig

_TOOLS = "Tools"


def chat(
    model: options.ModelArgument = ENGINE.model,
    url: Annotated[str | None, options.flag("url", "Talk to this server instead of loading a model.")] = None,
    api_key: Annotated[str | None, options.flag("api_key", "The server's key, with --url.")] = None,
    system: Annotated[str | None, options.flag("system", "A system message before the conversation.")] = None,
    tools: Annotated[
        list[Path] | None,
        options.flag("tools", "Run this Python file; its functions become tools. May be repeated.", panel=_TOOLS),
    ] = None,
    mcp: Annotated[
        list[str] | None,
        options.flag("mcp", 'An MCP server: "COMMAND ARGS" or http://... May be repeated.', panel=_TOOLS),
    ] = None,
    yes: Annotated[bool, options.flag("yes", "Run what the model calls without asking.", panel=_TOOLS)] = False,
    max_steps: Annotated[
        int, options.flag("max_steps", "Most answers of the model to one line, calls included.", panel=_TOOLS)
    ] = 10,
    max_tokens: options.MaxTokensFlag = None,
    temperature: options.TemperatureFlag = None,
    top_k: options.TopKFlag = None,
    top_p: options.TopPFlag = None,
    min_p: options.MinPFlag = None,
    repetition_penalty: options.RepetitionPenaltyFlag = None,
    presence_penalty: options.PresencePenaltyFlag = None,
    frequency_penalty: options.FrequencyPenaltyFlag = None,
    seed: options.SeedFlag = None,
    device: options.DeviceFlag = ENGINE.device,
    dtype: options.DtypeFlag = "auto",
    quantize: options.QuantizeFlag = ENGINE.quantize,
    kv_dtype: options.KvDtypeFlag = ENGINE.kv_dtype,
    max_model_len: options.MaxModelLenFlag = ENGINE.max_model_len,
    memory_fraction: options.MemoryFractionFlag = ENGINE.memory_fraction,
    revision: options.RevisionFlag = ENGINE.revision,
    plain_loop: options.PlainLoopFlag = ENGINE.plain_loop,
    debug: options.DebugFlag = False,
) -> None:
    """Talk with a model at the terminal."""
    # Imported here, as in every verb: `lfm --help` loads neither HTTP clients nor tokenizers.
    from lfm.chat.defaults import RequestedSampling
    from lfm.cli.chat_session import ChatFlags, talk

    requested = RequestedSampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    config = EngineConfig(
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        quantize=quantize,
        kv_dtype=kv_dtype,
        max_model_len=max_model_len,
        memory_fraction=memory_fraction,
        plain_loop=plain_loop,
    )
    flags = ChatFlags(
        url=url,
        api_key=api_key,
        system=system,
        requested=requested,
        max_tokens=max_tokens,
        tools=tools or (),
        mcp=mcp or (),
        is_yes=yes,
        max_steps=max_steps,
    )
    talk(config, flags)
