"""The workloads of `bench offline`, by the names that results are compared under."""

from lfm.errors import UsageError
from lfm.model.limits import Workload

_ALL = (
    Workload(name="b1", requests=1, input_tokens=128, output_tokens=512),
    Workload(name="b8", requests=8, input_tokens=128, output_tokens=256),
    Workload(name="b32", requests=32, input_tokens=128, output_tokens=256),
    Workload(name="b128", requests=128, input_tokens=1024, output_tokens=256),
    Workload(name="b1024", requests=1024, input_tokens=1024, output_tokens=512),
    Workload(name="prefill", requests=1, input_tokens=8192, output_tokens=1),
    Workload(name="long", requests=16, input_tokens=30_000, output_tokens=256),
    # 256 agents with one prompt prefix: computed once, found in the cache by the others.
    Workload(name="agents", requests=256, input_tokens=256, output_tokens=64, shared_tokens=4096),
    Workload(name="b32-zipf", requests=32, input_tokens=128, output_tokens=256, routing="zipf"),
    Workload(name="b128-default", requests=128, input_tokens=1024, output_tokens=256, sampling="default"),
    Workload(name="decode-30k", requests=32, input_tokens=30_000, output_tokens=128, is_decode_only=True),
)
WORKLOADS = {workload.name: workload for workload in _ALL}
# Not among all: what `bench serve` sends to a server. With --max-running N it is a closed loop of N clients.
HTTP = Workload(name="http", requests=2048, input_tokens=1024, output_tokens=256, sampling="default")


def find_workloads(names: str) -> list[Workload]:
    """The workloads that a comma-separated list names, or `all`. Raises UsageError for an unknown one."""
    if names.strip() == "all":
        return list(WORKLOADS.values())
    found: list[Workload] = []
    known = {**WORKLOADS, HTTP.name: HTTP}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known:
            raise UsageError(f"--workload {name} is not known. Allowed: all, {', '.join(known)}.")
        found.append(known[name])
    if not found:
        raise UsageError(f"--workload names nothing. Allowed: all, {', '.join(WORKLOADS)}.")
    return found
