"""After the processes that compile beside a start have done their work, serving compiles nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# A process of its own: what others have compiled in this one would not be looked for in the cache.
SERVE = """
import json, os, random, sys
from pathlib import Path

from lfm.config import EngineConfig
from lfm.engine.build import build_engine
from lfm.protocol import EngineRequest, SamplingParams

def files():
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

folder = Path(os.environ["TRITON_CACHE_DIR"])
phases = []
config = EngineConfig(
    model="random:tiny", device="cuda", max_model_len=4096, max_running=48, step_tokens=2048, num_blocks=2048,
    **json.loads(sys.argv[1]),
)
engine = build_engine(config, on_phase=phases.append)
compiled = files()
chance = random.Random(0)
drawn = dict(temperature=0.3, top_k=50, min_p=0.15, repetition_penalty=1.05, seed=1)
for num_rows in (1, 2, 3, 9, 40):
    for sampling in (dict(temperature=0.0), drawn, dict(temperature=0.0, banned_ids=[5])):
        for row in range(num_rows):
            prompt = [chance.randrange(8, 200) for _ in range(chance.choice([1, 2, 17, 130, 700]))]
            params = SamplingParams(max_tokens=6, **sampling)
            engine.add(EngineRequest(request_id=f"{row}", prompt_ids=prompt, sampling=params))
        while engine.has_work():
            engine.step()
    for _ in range(10):
        engine.prepare()
print(json.dumps({"phases": phases, "compiled": len(compiled), "new": sorted(files() - compiled)}))
"""


def serve(cache: Path, options: dict[str, str]) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", SERVE, json.dumps(options)],
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [{}, {"quantize": "fp8", "kv_dtype": "fp8"}], ids=["bf16", "fp8"])
def test_serving_compiles_nothing_after_a_start(tmp_path: Path, options: dict[str, str]) -> None:
    """Prompts and decode steps of many sizes, greedy, drawn and masked, eager and captured; then started again."""
    cold = serve(tmp_path, options)
    assert cold["compiled"]
    assert any("kernels are compiled" in phase for phase in cold["phases"])  # type: ignore[attr-defined]
    assert cold["new"] == []
    warm = serve(tmp_path, options)
    assert not any("kernels" in phase for phase in warm["phases"])  # type: ignore[attr-defined]
    assert (warm["new"], warm["compiled"]) == ([], cold["compiled"])
