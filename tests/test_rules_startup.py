"""Rules on start-up: what an import loads, and how long a user waits for `import lfm` and `lfm --help`.

Times are those of the processor: on an idle machine they are the user's wait (nothing is read over a network), and
tests that run at the same time do not lengthen them.
"""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NUM_RUNS = 5  # the best of them counts: shared caches slow a run down, nothing speeds one up

pytestmark = pytest.mark.slow

HELP = """
import sys
from lfm.cli import main
sys.argv = ["lfm", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def processor_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def modules_under(*parts: str) -> list[str]:
    """The dotted names of all modules in the given files and folders of lfm/."""
    names = []
    for part in parts:
        path = ROOT / "lfm" / part
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            names.append(dotted.removesuffix(".__init__"))
    return [name for name in names if not name.endswith("__main__")]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(["chat"], id="chat"),
        pytest.param(["server"], id="server"),
        pytest.param(["cli/app.py", "cli/serve.py", "cli/service.py", "cli/api_process.py"], id="serve-command"),
        pytest.param(["engine/scheduler.py", "engine/cache.py"], id="scheduler-and-cache"),
        pytest.param(["engine/process.py", "engine/client.py"], id="engine-client"),
        pytest.param(["__init__.py", "config.py", "errors.py", "protocol.py"], id="foundations"),
    ],
)
def test_importing_it_does_not_load_torch(parts: list[str]) -> None:
    modules = modules_under(*parts)
    assert modules
    loaded = run_python(f"import sys, {', '.join(modules)}; print('torch' in sys.modules)")
    assert loaded.strip() == "False"


def test_import_lfm_takes_less_than_300_ms_and_loads_no_torch() -> None:
    code = (
        "import sys, time; t = time.process_time(); import lfm; print(time.process_time() - t, 'torch' in sys.modules)"
    )
    runs = [run_python(code).split() for _ in range(NUM_RUNS)]
    assert {has_torch for _, has_torch in runs} == {"False"}
    assert min(float(seconds) for seconds, _ in runs) < 0.3


def test_help_takes_less_than_500_ms_and_loads_no_torch() -> None:
    assert "serve" in run_python(HELP)
    assert run_python(HELP + "print('torch' in sys.modules)").split()[-1] == "False"
    runs = []
    for _ in range(NUM_RUNS):
        start = processor_seconds_of_children()
        run_python(HELP)
        runs.append(processor_seconds_of_children() - start)
    assert min(runs) < 0.5
