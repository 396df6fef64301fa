"""The Node clients of OpenAI and Together against a served model, the product page's TypeScript call, Vercel's `ai`."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.clients.served import Served

HERE = Path(__file__).resolve().parent
MIN_NODE = 20

pytestmark = pytest.mark.slow


def why_no_node() -> str | None:
    """None where Node is present and new enough, else the reason."""
    if not (shutil.which("node") and shutil.which("npm")):
        return "needs node and npm, which are not installed"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < MIN_NODE:
        return f"needs node {MIN_NODE} or newer; this is {version}"
    return None


def node_modules(lock_folder: Path) -> Path:
    """A folder outside the tree with the locked packages installed; kept for the next run, one for each lock."""
    if reason := why_no_node():
        pytest.skip(reason)
    lock = (lock_folder / "package-lock.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lfm" / "tests"
    folder = cache / f"node-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            making = Path(temporary) / "made"
            making.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(lock_folder / name, making)
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=making, capture_output=True, text=True, timeout=90)
            assert done.returncode == 0, f"npm ci failed:\n{done.stderr}"
            with contextlib.suppress(FileExistsError):  # another run was faster
                making.rename(folder)
    return folder / "node_modules"


def run_node(script: Path, *, served: Served, flaky_url: str, lock_folder: Path, folder: Path) -> str:
    """Run a script beside the packages that it imports (Node looks for them upwards from the script)."""
    (folder / "node_modules").symlink_to(node_modules(lock_folder))
    copy = folder / f"{script.stem}.mjs"
    shutil.copy(script, copy)
    shutil.copy(HERE / "node" / "common.mjs", folder)
    environment = served.environment(together_suffix="/v1", flaky_url=flaky_url)
    command = ["node", str(copy), served.model]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{script.name} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", ["openai_client.mjs", "together_client.mjs"])
def test_official_node_client_works_unchanged(name: str, served: Served, flaky_url: str, tmp_path: Path) -> None:
    script = HERE / "node" / name
    output = run_node(script, served=served, flaky_url=flaky_url, lock_folder=script.parent, folder=tmp_path)
    assert output == "passed\n"


def test_product_page_typescript_prints_the_answer(served: Served, flaky_url: str, tmp_path: Path) -> None:
    script = HERE / "product_page" / "chat.ts"
    output = run_node(script, served=served, flaky_url=flaky_url, lock_folder=HERE / "node", folder=tmp_path)
    assert output.endswith("\n")
    assert output not in ("undefined\n", "null\n")


@pytest.mark.clients
def test_vercels_ai_works_with_both_providers(served: Served, flaky_url: str, tmp_path: Path) -> None:
    script = HERE / "node_ai" / "ai_client.mjs"
    output = run_node(script, served=served, flaky_url=flaky_url, lock_folder=script.parent, folder=tmp_path)
    print(output)
    assert output.endswith("passed\n")
