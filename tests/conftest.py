"""What every test shares: one thread per process, no settings from outside, the gpu marker, free ports, hypothesis.

Nothing here imports torch unless a test marked `gpu` is about to run.
"""

import functools
import os

import pytest
from hypothesis import HealthCheck, settings

from tests.waiting import unused_port

# Read by torch when it is first imported, here and in every process that a test starts: on two cores, threads of
# several tests that run at once only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith("LFM_")]:
    del os.environ[name]

# "fixed" makes every run the same run; `HYPOTHESIS_PROFILE=search make test` looks for new counterexamples.
settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@functools.cache
def why_no_cuda() -> str | None:
    """None where a CUDA device can be used, else the reason."""
    import torch

    if not torch.backends.cuda.is_built():
        return f"needs a CUDA device; this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "needs a CUDA device; torch.cuda.is_available() is False"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := why_no_cuda()):
        pytest.skip(reason)


@pytest.fixture
def free_port() -> int:
    return unused_port()
