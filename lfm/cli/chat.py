"""`lfm chat`: a conversation at the terminal, with a model in this process or with a server."""

from typing import Annotated

from lfm.cli import options
from lfm.cli.options import ENGINE
from lfm.config import EngineConfig


def chat(
    model: options.ModelArgument = ENGINE.model,
    url: Annotated[str | None, options.flag("url", "Talk to this server instead of loading a model.")] = None,
    api_key: Annotated[str | None, options.flag("api_key", "The server's key, with --url.")] = None,
    system: Annotated[str | None, options.flag("system", "A system message before the conversation.")] = None,
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
    import httpx2

    from lfm import http_client as http
    from lfm.chat.defaults import RequestedSampling
    from lfm.cli.conversation import Conversation
    from lfm.cli.loading import load_llm
    from lfm.cli.speakers import LocalSpeaker, ServerSpeaker

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
    if url is not None:
        with httpx2.Client(headers=http.auth_headers(api_key), timeout=http.TIMEOUT) as client:
            server = ServerSpeaker(client, http.api_root(url), requested=requested, max_tokens=max_tokens)
            Conversation(server, system=system).run()
        return
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
    with load_llm(config) as llm:
        Conversation(LocalSpeaker(llm, requested=requested, max_tokens=max_tokens), system=system).run()
