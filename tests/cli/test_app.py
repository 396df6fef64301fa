"""Every failure is one line and an exit code that says whose fault it is; a flag wins over the environment."""

import socket
from dataclasses import fields
from pathlib import Path

import pytest

from lfm.cli import service
from lfm.config import EngineConfig, ServerConfig, default_model
from lfm.engine import plan as plan_module
from lfm.engine.machine import Machine
from lfm.errors import InternalError, LfmError, MachineError, ModelError, UsageError
from tests.cli.conftest import Lfm

SERVE_FLAGS = """
    --host --port --device --dtype --quantize --kv-dtype --max-model-len --max-running --step-tokens
    --block-size --plain-loop --api-workers --served-model-name --api-key --insecure --revision --memory-fraction
    --max-queue --drain-seconds --debug
"""


@pytest.fixture
def served_with(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerConfig]]:
    """What `lfm serve` would have run; nothing is started."""
    calls: list[tuple[EngineConfig, ServerConfig]] = []
    monkeypatch.setattr(service, "run_service", lambda engine, server, search: calls.append((engine, server)))
    return calls


def raising(error: BaseException) -> object:
    def fail(*args: object, **options: object) -> None:
        raise error

    return fail


def test_every_flag_of_serve_is_a_field_of_a_config(
    lfm: Lfm, served_with: list[tuple[EngineConfig, ServerConfig]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = lfm("serve", "--help").out
    names = {field.name for config in (EngineConfig, ServerConfig) for field in fields(config)}
    for name in SERVE_FLAGS.split():
        assert f" {name} " in shown
        assert name.removeprefix("--").replace("-", "_") in names


def test_without_flags_the_configs_defaults_hold(
    lfm: Lfm, served_with: list[tuple[EngineConfig, ServerConfig]]
) -> None:
    assert lfm("serve").code == 0
    assert served_with == [(EngineConfig(), ServerConfig())]


def test_every_flag_of_serve_arrives(lfm: Lfm, served_with: list[tuple[EngineConfig, ServerConfig]]) -> None:
    line = """
        serve some/model --host 0.0.0.0 --port 1 --device cpu --dtype bfloat16 --max-model-len 2 --max-running 3
        --step-tokens 4 --block-size 5 --plain-loop --api-workers 6 --served-model-name n --api-key k --insecure
        --revision r --memory-fraction 0.5 --max-queue 7 --drain-seconds 8 --debug
    """
    assert lfm(*line.split()).code == 0
    engine = EngineConfig(
        model="some/model",
        device="cpu",
        dtype="bfloat16",
        max_model_len=2,
        max_running=3,
        step_tokens=4,
        block_size=5,
        plain_loop=True,
        revision="r",
        memory_fraction=0.5,
        max_queue=7,
    )
    server = ServerConfig(
        host="0.0.0.0",
        port=1,
        api_workers=6,
        served_model_name="n",
        api_key="k",
        insecure=True,
        drain_seconds=8.0,
        debug=True,
    )
    assert served_with == [(engine, server)]


def test_a_flag_wins_over_the_environment_which_wins_over_the_default(
    lfm: Lfm, served_with: list[tuple[EngineConfig, ServerConfig]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PORT": "1234", "MAX_RUNNING": "5", "PLAIN_LOOP": "1", "API_KEY": "k", "MODEL": "m"}.items():
        monkeypatch.setenv(f"LFM_{name}", value)
    lfm("serve")
    lfm("serve", "other", "--port", "4321")
    (engine, server), (other_engine, other_server) = served_with
    assert (engine.model, engine.max_running, engine.plain_loop, server.port, server.api_key) == (
        "m",
        5,
        True,
        1234,
        "k",
    )
    assert (other_engine.model, other_engine.max_running, other_server.port) == ("other", 5, 4321)


def test_the_environment_is_read_when_the_command_starts(
    lfm: Lfm, served_with: list[tuple[EngineConfig, ServerConfig]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for port in ("1001", "1002"):
        monkeypatch.setenv("LFM_PORT", port)
        lfm("serve")
    assert [server.port for _, server in served_with] == [1001, 1002]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--quantize", "int8"], "'int8' is not one of 'none', 'fp8'"),
        (["serve", "--kv-dtype", "fp16"], "'fp16' is not one of 'auto', 'fp8'"),
        (["serve", "random:nothing", "--port", "0"], "random:nothing is not known. Allowed: random:"),
        (["serve", "./no/such/folder", "--port", "0"], "There is no folder './no/such/folder'"),
        (["serve", "--host", "0.0.0.0"], "Add --api-key KEY, or --insecure"),
        (["serve", "--host", "192.168.0.1", "--api-key", " "], "--api-key is empty"),
        (["serve", "--port", "99999"], "--port 99999 is out of range. Allowed: 0 to 65535."),
        (["serve", "--port", "x"], "Invalid value for '--port'"),
        (["serve", "--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["serve", "--api-workers", "65"], "--api-workers 65 is out of range. Allowed: 1 to 64."),
        (["serve", "--memory-fraction", "nan"], "--memory-fraction nan is out of range"),
        (["serve", "--revision", "main", "--port", "0"], f"--revision main is of no use with {default_model()}"),
        (["serve", "--nothing"], "No such option: --nothing"),
        (["serv"], "No such command 'serv'. Did you mean 'serve'?"),
        (["generate"], "Missing argument '[MODEL] PROMPT'. See lfm generate --help."),
        (["generate", "a", "b", "c"], "3 arguments were given"),
        (["chat", "--url", "ftp://x"], "ftp://x is no address"),
        (["info", "random:nothing"], "random:nothing is not known"),
        (["bench", "offline", "--workload", "b1,zz"], "--workload zz is not known. Allowed: all, b1, b8"),
        (["bench", "offline", "--workload", ","], "--workload names nothing"),
        (["bench", "offline", "--runs", "0"], "--runs 0 is out of range"),
        (["bench", "serve", "--rate", "0"], "--rate 0.0 is out of range"),
        (["bench", "serve", "--rate", "1", "--concurrency", "1"], "--rate and --concurrency exclude each other"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(lfm: Lfm, words: list[str], message: str) -> None:
    done = lfm(*words)
    assert done.code == 2
    assert message in done.error
    assert "Traceback" not in done.err


def test_a_wrong_value_in_the_environment_is_wrong_usage(lfm: Lfm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM_PORT", "abc")
    done = lfm("serve")
    assert done.code == 2
    assert "--port" in done.error


def test_a_port_in_use_is_the_machine_s_fault_and_found_before_the_model_loads(
    lfm: Lfm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "check_before_download", raising(AssertionError("the model was looked for")))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = lfm("serve", "--port", str(port))
    assert done.code == 3
    assert f"127.0.0.1:{port} cannot be used (Address already in use). Choose another --port" in done.error


def test_too_little_memory_says_needed_had_and_what_would_fit(lfm: Lfm, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Machine(cuda_devices=(), cpu_total_bytes=2 * 10**10, cpu_available_bytes=10**10, cpu_count=2)
    monkeypatch.setattr(plan_module, "probe_machine", lambda: small)
    done = lfm("generate", "random:lfm2-24b-a2b", "Hello")
    assert done.code == 3
    assert "needs 47.7 GB for weights in bfloat16" in done.error
    assert "the CPU can give 9.0 GB" in done.error
    assert done.error.endswith("Run: lfm serve random:tiny")


def test_a_model_folder_without_weights_is_wrong_input(lfm: Lfm, tmp_path: Path) -> None:
    done = lfm("generate", str(tmp_path), "Hello")
    assert done.code == 2
    assert "has no config.json" in done.error


def test_an_output_that_cannot_be_written_is_found_before_the_model_loads(lfm: Lfm, tmp_path: Path) -> None:
    done = lfm("bench", "offline", "--output", str(tmp_path / "no" / "folder.json"))
    assert done.code == 3
    assert "cannot be written" in done.error
    assert "is loaded" not in done.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("a"), 2),
        (ModelError("a"), 2),
        (MachineError("a"), 3),
        (InternalError("a"), 1),
        (LfmError("a"), 1),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 3),
        (ZeroDivisionError("a"), 1),
    ],
)
def test_every_kind_of_failure_has_its_exit_code(
    lfm: Lfm, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    monkeypatch.setattr(service, "run_service", raising(error))
    done = lfm("serve")
    assert done.code == code
    assert "Traceback" not in done.err


def test_a_bug_is_called_one_and_debug_shows_the_traceback(
    lfm: Lfm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "run_service", raising(ZeroDivisionError("division\nby zero")))
    done = lfm("serve")
    assert done.error.startswith("a bug in lfm: ZeroDivisionError: division by zero. Run again with --debug")
    assert not caplog.text
    lfm("serve", "--debug")
    assert "Traceback" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_debug_may_come_from_the_environment(
    lfm: Lfm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "run_service", raising(UsageError("wrong")))
    monkeypatch.setenv("LFM_DEBUG", "1")
    done = lfm("serve")
    assert done.error == "wrong"
    assert "Traceback" in caplog.text


def test_no_arguments_show_the_help_and_version_the_version(lfm: Lfm) -> None:
    done = lfm()
    assert done.code == 2
    assert "serve" in done.out
    assert not done.err
    assert lfm("--version").out.startswith("lfm 0.")


def test_completion_can_be_installed(lfm: Lfm) -> None:
    shown = lfm("--help").out
    assert "--install-completion" in shown
    assert "--show-completion" in shown


def test_the_api_key_of_a_config_is_never_shown() -> None:
    assert "secret" not in repr(ServerConfig(api_key="secret"))
