"""`instructor`: typed answers in its modes, lists, partial objects, its own retries after a failed validation."""

from collections.abc import Iterable
from typing import Annotated, Literal

import instructor
import openai
from common import FLAKY_URL, KEY, MODEL, QUESTION, SEEDS, V1, begin, did, raises, wait_for_running
from instructor.core import InstructorRetryException
from pydantic import BaseModel, Field, field_validator

begin("instructor", "openai")
messages = [{"role": "user", "content": QUESTION}]

TOOL_CALL_START = "10"  # the id of LFM2's token that begins a call


class Weather(BaseModel):
    """How warm it is."""

    city: Literal["Bern", "Thun"]
    days: Annotated[int, Field(ge=0, le=9)]


def client(mode=instructor.Mode.TOOLS, *, url=V1, key=KEY, retries=0):
    return instructor.from_openai(openai.OpenAI(base_url=url, api_key=key, max_retries=retries), mode=mode)


def ask(made, kind=Weather, *, seed=1, model=MODEL, **fields):
    fields = {"max_tokens": 600, "max_retries": 1, **fields}
    return made.chat.completions.create(model=model, messages=messages, response_model=kind, seed=seed, **fields)


modes = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]
for mode in modes:
    assert isinstance(ask(client(mode)), Weather)
did(f"structured parse in modes {', '.join(mode.value for mode in modes)}")

for seed in SEEDS:
    several = ask(client(), list[Weather], seed=seed, max_tokens=2000)
    assert all(isinstance(item, Weather) for item in several)
    if several:
        break
else:
    raise AssertionError("no seed gave an item")
did(f"a list of {len(several)}")

partial = list(client().chat.completions.create_partial(
    model=MODEL, messages=messages, response_model=Weather, seed=1, max_tokens=600
))  # fmt: skip
assert isinstance(partial[-1].city, str)
did(f"stream of {len(partial)} partial objects")

parallel = instructor.from_openai(openai.OpenAI(base_url=V1, api_key=KEY), mode=instructor.Mode.PARALLEL_TOOLS)
for seed in SEEDS:
    calls = list(ask(parallel, Iterable[Weather], seed=seed, logit_bias={TOOL_CALL_START: 100}))  # it sends "auto"
    assert all(isinstance(call, Weather) for call in calls)
    if len(calls) > 1:
        break
else:
    raise AssertionError("no seed gave two calls")
did(f"parallel calls: {len(calls)}")

attempts = []


class Picky(Weather):
    @field_validator("days")
    @classmethod
    def second_time_lucky(cls, days: int) -> int:
        attempts.append(days)
        if len(attempts) < 3:
            raise ValueError("think again")
        return days


assert isinstance(ask(client(), Picky, max_retries=4), Picky)
assert len(attempts) == 3
did("two failed validations returned to the model, the third answer taken")

for name, made, model in (("404", client(), "no/model"), ("401", client(key="wrong"), MODEL)):
    with raises(InstructorRetryException, name):
        ask(made, model=model)
did("errors")

assert isinstance(ask(client(url=f"{FLAKY_URL}/instructor/v1", retries=1)), Weather)
did("retry after a 503")

stream = client().client.chat.completions.create(
    model=MODEL, messages=messages, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
)
next(iter(stream))
wait_for_running(1)
stream.close()
wait_for_running(0)
did("cancel")
print("passed")
