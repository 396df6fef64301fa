"""What one step costs the host, by phase: scheduling, batch building, launching, reading and settling, in microseconds.

python bench/host.py                          256 and 1,024 decoding rows
python bench/host.py --rows 256 --shared 4096 --output FILE

The engine is the real one but for the device: a model that computes nothing and graphs that launch nothing stand in, so
that this runs on any machine. Medians over the steps, of the thread's own time, so that neighbours on the machine count
little; a line of JSON per case. What launching a graph costs a GPU's driver is not in it: `host_ms_per_step` of
`lfm bench offline` has both.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lfm.config import EngineConfig
from lfm.engine.build import assemble_engine, load_model
from lfm.engine.engine import Engine
from lfm.engine.graphs import NUM_LINES, DecodeGraph, DecodeGraphs, Shape
from lfm.engine.plan import plan_engine
from lfm.engine.sampling_rows import SampleFlags
from lfm.kernels.forward_batch import CacheTensors, ForwardBatch
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import Ops
from lfm.model.source import resolve_model
from lfm.protocol import EngineRequest, SamplingParams

BLOCK, NUM_BLOCKS, CONTEXT, MAX_ROWS = 128, 16_384, 8192, 1024
PROMPT, STEPS, WARM_STEPS = 256, 200, 20
Times = dict[str, list[float]]


class IdleModel:
    """In the place of the model: hidden states and logits of zeros."""

    def __init__(self, model: Lfm2) -> None:
        self.config, self.model = model.config, model.model

    def __call__(self, batch: ForwardBatch, cache: CacheTensors, ops: Ops) -> Tensor:
        return torch.zeros(len(batch.ids_T), 1)

    def head(self, hidden_RD: Tensor, ops: Ops) -> Tensor:
        return torch.zeros(len(hidden_RD), self.config.vocab_size)


class IdleGraph:
    """In the place of a captured graph."""

    def replay(self) -> None:
        pass


class IdleGraphs(DecodeGraphs):
    """Decode graphs whose inputs are written and uploaded as ever, and whose replay does nothing."""

    def _capture(self, shape: Shape) -> DecodeGraph:
        inputs = [torch.zeros((NUM_LINES, shape.bucket), dtype=torch.int64) for _ in range(3)]
        logits_BV, is_finite_B = torch.zeros(shape.bucket, self._rows.vocab_size), torch.ones(shape.bucket).bool()
        return DecodeGraph(shape, inputs[0], inputs[1:], IdleGraph(), logits_BV, is_finite_B)  # type: ignore[arg-type]

    def _capture_sample(self, decode: DecodeGraph, flags: SampleFlags) -> None:
        decode.samples[flags] = (IdleGraph(), torch.full((decode.shape.bucket,), 5))  # type: ignore[assignment]


def idle_engine(*, prefix_caching: bool) -> Engine:
    """An engine for MAX_ROWS rows that computes nothing."""
    config = EngineConfig(device="cpu", block_size=BLOCK, num_blocks=NUM_BLOCKS, max_model_len=CONTEXT)
    source = resolve_model("random:tiny")
    plan = plan_engine(replace(config, prefix_caching=prefix_caching), source.config)
    plan = replace(plan, max_running=MAX_ROWS, step_tokens=8192, step_tokens_decoding=8192)
    model = load_model(source, plan)
    engine = assemble_engine(model, plan, num_ids=source.config.vocab_size, overlap=True)
    runner = engine.runner
    runner.model = IdleModel(model)  # type: ignore[assignment]
    runner._graphs = IdleGraphs(runner.model, runner.cache, runner.rows, runner._builder, runner.ops)
    return engine


def timed(owner: object, name: str, times: Times, label: str) -> None:
    """Let a method note how long each call takes."""
    method: Callable[..., object] = getattr(owner, name)
    times[label] = []

    def call(*args: object, **named: object) -> object:
        started_s = time.thread_time()
        result = method(*args, **named)
        times[label].append(time.thread_time() - started_s)
        return result

    setattr(owner, name, call)


def measure(num_rows: int, num_shared: int) -> dict[str, object]:
    """Medians of STEPS decode steps of `num_rows` rows, whose prompts begin with `num_shared` common tokens."""
    engine, chance = idle_engine(prefix_caching=num_shared > 0), random.Random(0)
    shared = chance.choices(range(1000), k=num_shared)
    sampling = SamplingParams(max_tokens=MAX_ROWS, temperature=0.0)
    requests = [
        EngineRequest(
            request_id=str(row),
            prompt_ids=shared + chance.choices(range(1000), k=PROMPT),
            sampling=sampling,
            mask_padded_ids=False,
        )
        for row in range(num_rows)
    ]
    started_s = time.thread_time()
    for request in requests:
        engine.add(request)
    add_s = (time.thread_time() - started_s) / num_rows
    while engine.scheduler.num_waiting:
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    times: Times = {}
    timed(engine.scheduler, "schedule", times, "schedule")
    timed(engine.runner, "forward", times, "build_and_launch")
    timed(engine.runner, "sample", times, "sample")
    timed(engine.runner, "read", times, "read")
    timed(engine.scheduler, "update", times, "update")
    timed(engine, "step", times, "step")
    for _ in range(STEPS):
        engine.step()
    return {
        "what": "host",
        "rows": num_rows,
        "shared_tokens": num_shared,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{f"us_{label}": round(statistics.median(values) * 1e6, 1) for label, values in times.items()},
        "us_per_added_request": round(add_s * 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="256,1024", help="decoding rows, with commas (default: %(default)s)")
    parser.add_argument("--shared", type=int, default=0, help="tokens that all prompts begin with")
    parser.add_argument("--output", type=Path, help="file for the results; it is overwritten")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for rows in options.rows.split(","):
        lines.append(json.dumps(measure(int(rows), options.shared)))
        print(lines[-1], flush=True)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
