"""`lfm serve`: the HTTP service, with the engine in a process of its own."""

import os
from typing import Annotated

from lfm.cli import options, search_options
from lfm.cli.options import ENGINE, SERVER, flag
from lfm.config import EngineConfig, ServerConfig

_SERVER = "Server"


def serve(
    model: options.ModelArgument = ENGINE.model,
    host: Annotated[str, flag("host", "Address to listen on.", panel=_SERVER)] = SERVER.host,
    port: Annotated[int, flag("port", "Port to listen on; 0 takes a free one.", panel=_SERVER)] = SERVER.port,
    served_model_name: Annotated[
        str | None, flag("served_model_name", "Name that requests must use. Unset: MODEL's own.", panel=_SERVER)
    ] = SERVER.served_model_name,
    api_key: Annotated[
        str | None, flag("api_key", "Key that requests must carry (better: set LFM_API_KEY).", panel=_SERVER)
    ] = SERVER.api_key,
    insecure: Annotated[
        bool, flag("insecure", "Allow other machines to connect without a key.", panel=_SERVER)
    ] = SERVER.insecure,
    api_workers: Annotated[int, flag("api_workers", "Processes that speak HTTP.", panel=_SERVER)] = SERVER.api_workers,
    drain_seconds: Annotated[
        float, flag("drain_seconds", "How long running requests may go on after SIGTERM.", panel=_SERVER)
    ] = SERVER.drain_seconds,
    search_providers: search_options.ProvidersFlag = search_options.PROVIDERS,
    searxng_url: search_options.SearxngFlag = None,
    index_folder: search_options.IndexFolderFlag = None,
    fetch_allow: search_options.FetchAllowFlag = None,
    search_seconds: search_options.SearchSecondsFlag = search_options.SEARCH.search_seconds,
    provider_seconds: search_options.ProviderSecondsFlag = search_options.SEARCH.provider_seconds,
    provider_rates: search_options.RatesFlag = None,
    max_searches: search_options.MaxSearchesFlag = search_options.SEARCH.max_searches,
    device: options.DeviceFlag = ENGINE.device,
    dtype: options.DtypeFlag = "auto",
    quantize: options.QuantizeFlag = ENGINE.quantize,
    kv_dtype: options.KvDtypeFlag = ENGINE.kv_dtype,
    max_model_len: options.MaxModelLenFlag = ENGINE.max_model_len,
    max_running: options.MaxRunningFlag = ENGINE.max_running,
    memory_fraction: options.MemoryFractionFlag = ENGINE.memory_fraction,
    revision: options.RevisionFlag = ENGINE.revision,
    step_tokens: options.StepTokensFlag = ENGINE.step_tokens,
    block_size: options.BlockSizeFlag = ENGINE.block_size,
    max_queue: options.MaxQueueFlag = ENGINE.max_queue,
    plain_loop: options.PlainLoopFlag = ENGINE.plain_loop,
    debug: options.DebugFlag = SERVER.debug,
) -> None:
    """Serve a model behind an OpenAI- and Together-compatible API."""
    from lfm.cli.service import run_service

    server_config = ServerConfig(
        host=host,
        port=port,
        served_model_name=served_model_name,
        api_key=api_key,
        insecure=insecure,
        api_workers=api_workers,
        drain_seconds=drain_seconds,
        debug=debug,
    )
    engine_config = EngineConfig(
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        quantize=quantize,
        kv_dtype=kv_dtype,
        max_model_len=max_model_len,
        max_running=max_running,
        step_tokens=step_tokens,
        block_size=block_size,
        memory_fraction=memory_fraction,
        max_queue=max_queue,
        plain_loop=plain_loop,
    )
    search_config = search_options.search_config(
        os.environ,
        providers=search_providers,
        searxng_url=searxng_url,
        index_folder=index_folder,
        fetch_allow=fetch_allow,
        search_seconds=search_seconds,
        provider_seconds=provider_seconds,
        provider_rates=provider_rates,
        max_searches=max_searches,
        server=server_config,
    )
    run_service(engine_config, server_config, search_config)
