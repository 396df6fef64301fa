"""What `lfm chat` runs: a conversation with a model in this process, with a server, or with an agent at a server."""

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2

from lfm import http_client
from lfm.chat.defaults import RequestedSampling
from lfm.cli.conversation import Conversation
from lfm.cli.loading import load_llm
from lfm.cli.own_server import own_server
from lfm.cli.speakers import LocalSpeaker, ServerSpeaker
from lfm.cli.terminal import note
from lfm.config import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFlags:
    """What the flags say beyond the engine's settings."""

    url: str | None
    api_key: str | None
    system: str | None
    requested: RequestedSampling
    max_tokens: int | None
    tools: Sequence[Path]
    mcp: Sequence[str]
    is_yes: bool
    max_steps: int


def talk(config: EngineConfig, flags: ChatFlags) -> None:
    """Talk until the user leaves. Raises LfmError if the model, the server or a tool cannot be used."""
    if flags.tools or flags.mcp:
        _talk_with_agent(config, flags)
    elif flags.url is not None:
        with httpx2.Client(headers=http_client.auth_headers(flags.api_key), timeout=http_client.TIMEOUT) as client:
            root = http_client.api_root(flags.url)
            server = ServerSpeaker(client, root, requested=flags.requested, max_tokens=flags.max_tokens)
            Conversation(server, system=flags.system).run()
    else:
        with load_llm(config) as llm:
            speaker = LocalSpeaker(llm, requested=flags.requested, max_tokens=flags.max_tokens)
            Conversation(speaker, system=flags.system).run()


def _talk_with_agent(config: EngineConfig, flags: ChatFlags) -> None:
    """With tools a server answers, if need be one of our own: there the calls are constrained, parsed and streamed."""
    from lfm.agent import load_tools
    from lfm.cli.chat_agent import AgentSettings, AgentSpeaker, AskUser

    tools = [tool for path in flags.tools for tool in load_tools(path)]  # before a model is loaded: they may be wrong
    named = {**asdict(flags.requested), "max_tokens": flags.max_tokens}
    with contextlib.ExitStack() as stack:
        url, api_key = flags.url, flags.api_key
        if url is None:
            api_key = secrets.token_urlsafe(16)  # nobody else on this machine may use it
            server = own_server(config.model, _serve_flags(config), api_key=api_key, on_line=note)
            url = stack.enter_context(server)
        settings = AgentSettings(
            url=url,
            api_key=api_key,
            tools=tools,
            mcp=flags.mcp,
            max_steps=flags.max_steps,
            approve=(lambda _: True) if flags.is_yes else AskUser(),
            options={name: value for name, value in named.items() if value is not None},
        )
        Conversation(stack.enter_context(AgentSpeaker(settings)), system=flags.system).run()


def _serve_flags(config: EngineConfig) -> Mapping[str, object]:
    names = ("revision", "device", "dtype", "quantize", "kv_dtype", "max_model_len", "memory_fraction", "plain_loop")
    return {f"--{name.replace('_', '-')}": getattr(config, name) for name in names}
