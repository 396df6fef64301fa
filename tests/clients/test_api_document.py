"""`schemathesis` against our own OpenAPI document: no 5xx, and every answer as the document describes it.

It draws requests from the document, valid and not, from a fixed seed: `make test-api`; more of them with
`make test-api ARGS="--cases 200"`.
"""

import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import served_model
from tests.clients.environments import INSTALL_S, locked_python

LOCK = Path(__file__).resolve().parent / "locks" / "schemathesis.txt"
RUN_S = 1200
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)

pytestmark = [pytest.mark.slow, pytest.mark.clients, pytest.mark.timeout(INSTALL_S + RUN_S)]


def test_no_request_is_a_server_error_and_every_answer_is_described(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    python = locked_python(LOCK)
    # A short context: most answers have no limit of their own, and random weights end late.
    with served_model(tmp_path / "serve.log", "--max-model-len", "128") as served:
        command = [
            *(str(python.with_name("st")), "run", f"{served.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {served.api_key}"),
            *("--checks", ",".join(CHECKS), "--phases", "fuzzing", "--continue-on-failure"),
            *("--seed", "1", "--max-examples", str(pytestconfig.getoption("cases", 10)), "--workers", "2"),
            *("--request-timeout", "60", "--suppress-health-check", "all", "--warnings", "off", "--no-color"),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=RUN_S)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
