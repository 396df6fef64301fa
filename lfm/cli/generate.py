"""`lfm generate`: one prompt, answered on stdout as it is generated, in this process."""

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from lfm.cli import options
from lfm.cli.options import ENGINE
from lfm.cli.terminal import note, speed_line, write_text
from lfm.config import EngineConfig
from lfm.errors import UsageError

if TYPE_CHECKING:
    from lfm.llm import LLM
    from lfm.protocol import SamplingParams


def generate(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[MODEL] PROMPT", help=f"{options.MODEL_HELP} The prompt '-' is read from stdin."),
    ],
    raw: Annotated[bool, options.flag("raw", "Continue the prompt as it is, without the chat format.")] = False,
    system: Annotated[str | None, options.flag("system", "A system message before the prompt.")] = None,
    max_tokens: options.MaxTokensFlag = None,
    temperature: options.TemperatureFlag = None,
    top_k: options.TopKFlag = None,
    top_p: options.TopPFlag = None,
    min_p: options.MinPFlag = None,
    repetition_penalty: options.RepetitionPenaltyFlag = None,
    presence_penalty: options.PresencePenaltyFlag = None,
    frequency_penalty: options.FrequencyPenaltyFlag = None,
    seed: options.SeedFlag = None,
    stop: options.StopFlag = None,
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
    """Answer one prompt, streamed to the terminal."""
    from lfm.chat.defaults import RequestedSampling
    from lfm.chat.messages import Message
    from lfm.cli.loading import load_llm

    model, prompt = _split_words(words)
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
    with load_llm(config) as llm:
        if raw:
            prompt_ids = llm.tokenizer.encode_raw(prompt, param="PROMPT")
        else:
            messages = [Message(role="system", content=system)] if system is not None else []
            prompt_ids = llm.chat_prompt([*messages, Message(role="user", content=prompt)])
        sampling = llm.sampling(requested, max_tokens=max_tokens, num_prompt_tokens=len(prompt_ids))
        _stream(llm, prompt_ids, sampling=sampling, stop=stop or [])


def _split_words(words: list[str]) -> tuple[str, str]:
    """The model and the prompt."""
    if len(words) > 2:
        raise UsageError(f"{len(words)} arguments were given. Give [MODEL] PROMPT, and put the prompt in quotes.")
    model = words[0] if len(words) == 2 else os.environ.get("LFM_MODEL", ENGINE.model)
    return model, sys.stdin.read() if words[-1] == "-" else words[-1]


def _stream(llm: "LLM", prompt_ids: list[int], *, sampling: "SamplingParams", stop: list[str]) -> None:
    start_s = time.monotonic()
    first_s = 0.0
    stream = llm.stream(prompt_ids, sampling=sampling, stop=stop)
    for delta in stream:
        if delta.token_ids and not first_s:
            first_s = time.monotonic() - start_s
        write_text(delta.text)
    write_text("\n")
    note(
        speed_line(
            num_prompt_tokens=stream.num_prompt_tokens,
            num_cached_tokens=stream.num_cached_tokens,
            num_output_tokens=stream.num_output_tokens,
            first_s=first_s,
            total_s=time.monotonic() - start_s,
        )
    )
