"""Whole runs on a CPU: the loss falls, a stopped run resumes bit for bit, what is saved is usable, errors are told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import AutoModelForCausalLM, AutoTokenizer

from lfm.config import EngineConfig
from lfm.errors import LfmError, MachineError, ModelError, UsageError
from lfm.llm import LLM
from lfm.model.full_forward import full_logits
from lfm.model.lfm2 import Lfm2
from lfm.model.source import resolve_model
from lfm.model.weights import load_weights
from lfm.protocol import SamplingParams
from lfm.train import checkpoint as checkpoints
from lfm.train import learner
from lfm.train.checkpoint import checkpoint_folders
from lfm.train.dataset import Dataset
from lfm.train.metrics import StepMetrics, read_metrics
from lfm.train.recipe import TrainRecipe, parse_recipe
from lfm.train.session import Outcome, train
from lfm.train.steps import StepReader
from tests.train.models import recipe_dict

torch.set_num_threads(1)


def recipe_of(raw: dict[str, Any]) -> TrainRecipe:
    return parse_recipe(raw, TrainRecipe, origin="recipe.toml")


def run(raw: dict[str, Any], *, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
    return train(recipe_of(raw), "pretrain", should_stop=should_stop, on_progress=lambda line: None)


def stop_after(num_steps: int) -> Callable[[], bool]:
    calls = iter(range(num_steps))
    return lambda: next(calls) == num_steps - 1


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    state = json.loads(files["training/state.json"])
    del state["seconds"]
    return files | {"training/state.json": json.dumps(state).encode()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls(tmp_path: Path, optimizer: str) -> None:
    raw = recipe_dict(tmp_path)
    raw["optimizer"]["name"] = optimizer
    raw["schedule"]["steps"] = 30
    outcome = run(raw)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert outcome.is_finished
    assert [m.step for m in metrics] == list(range(30))
    assert metrics[-1].loss < metrics[0].loss - 1.0
    assert (tmp_path / "run" / "metrics.svg").read_text().count("<polyline") == 4


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", "float32"), ("cpu", "bfloat16"), pytest.param("cuda", "bfloat16", marks=pytest.mark.gpu)],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # by the compiler, which asks for it
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_stopped_run_resumes_bit_for_bit(tmp_path: Path, device: str, dtype: str) -> None:
    """20 steps at once and 10 + 10 by the same command write the same checkpoint: weights, optimizer, position.

    On a GPU with steps that are recorded and replayed, and a held-out loss between them.
    """
    raw = recipe_dict(tmp_path, device=device, dtype=dtype, save_every_steps=5)
    raw["data"]["validation_rows"] = 7
    whole = run({**raw, "run": {**raw["run"], "output": str(tmp_path / "whole")}})
    first = run(raw, should_stop=stop_after(10))
    assert (first.num_steps, first.is_finished) == (10, False)
    second = run(raw)
    assert (second.num_steps, second.is_finished) == (20, True)
    assert whole.loss == second.loss
    one, other = without_times(files_in(whole.checkpoint)), without_times(files_in(second.checkpoint))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    losses = [
        [(m.loss, m.validation_loss) for m in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "run")
    ]
    assert losses[0] == losses[1]


def test_steps_beyond_the_newest_checkpoint_are_done_again_with_the_same_result(tmp_path: Path) -> None:
    """What a killed process leaves: metrics of 6 steps, half a line, and a checkpoint of 3."""
    raw = recipe_dict(tmp_path, save_every_steps=3) | {"schedule": {"steps": 6}}
    outcome = run(raw)
    expected = files_in(outcome.checkpoint)["model.safetensors"]
    before = [m.loss for m in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    for path in sorted(outcome.checkpoint.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    outcome.checkpoint.rmdir()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    again = run(raw)
    assert files_in(again.checkpoint)["model.safetensors"] == expected
    assert [m.loss for m in read_metrics(tmp_path / "run" / "metrics.jsonl")] == before


def test_what_is_held_back_is_measured_and_never_learnt(tmp_path: Path) -> None:
    raw = recipe_dict(tmp_path, save_every_steps=4) | {"schedule": {"steps": 10}}
    raw["data"]["validation_rows"] = 7
    outcome = run(raw)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [m.step + 1 for m in metrics if m.validation_loss is not None] == [4, 8, 10]
    assert metrics[9].validation_loss < metrics[3].validation_loss
    config = resolve_model(str(outcome.checkpoint)).config
    with torch.device("meta"):
        model = Lfm2(config)
    load_weights(model, outcome.checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    dataset = Dataset(tmp_path / "run" / "data")
    nll, count = 0.0, 0
    for index in range(dataset.num_rows - 7, dataset.num_rows):
        ids = dataset[index].ids.tolist()
        logits = full_logits(model, [ids[:-1]])[0]
        nll += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        count += len(ids) - 1
    assert metrics[9].validation_loss == pytest.approx(nll / count, rel=1e-4)
    reader = StepReader(dataset, batch_tokens=128, accumulation=1, seed=0, num_held_back=7)
    assert reader.num_rows == dataset.num_rows - 7
    raw["data"]["validation_rows"] = dataset.num_rows
    with pytest.raises(UsageError, match=r"validation_rows=\d+ leaves none"):
        run(raw | {"run": raw["run"] | {"output": str(tmp_path / "all")}})


def test_a_compiler_that_fails_costs_speed_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raw = recipe_dict(tmp_path) | {"schedule": {"steps": 2}}
    expected = run({**raw, "run": {**raw["run"], "output": str(tmp_path / "other")}}).loss
    original, stances = learner.chunked_cross_entropy, []
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)

    def failing(*arguments: Any, **settings: Any) -> Any:
        if not stances:
            raise TorchDynamoException("no such kernel")
        return original(*arguments, **settings)

    monkeypatch.setattr(learner, "chunked_cross_entropy", failing)
    assert run(raw).loss == expected
    assert stances == ["force_eager"]
    assert "torch.compile failed (no such kernel)" in caplog.text


def test_a_time_limit_saves_and_ends(tmp_path: Path) -> None:
    raw = recipe_dict(tmp_path)
    outcome = train(recipe_of(raw), "pretrain", minutes=1e-9, on_progress=lambda line: None)
    assert (outcome.num_steps, outcome.is_finished) == (1, False)
    assert [path.name for path in checkpoint_folders(tmp_path / "run")] == ["step-00000001"]


def test_accumulated_micro_batches_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    """The same rows as one micro-batch or as four: one step but for rounding, though they hold unlike many targets."""
    raw = recipe_dict(tmp_path)
    raw |= {"schedule": {"steps": 1}, "optimizer": {"name": "adamw", "learning_rate": 0.01}}

    def first_step(name: str, *, tokens: int, accumulation: int) -> StepMetrics:
        output = {"output": str(tmp_path / name)}
        run(raw | {"run": raw["run"] | output, "batch": {"tokens": tokens, "accumulation": accumulation}})
        return read_metrics(tmp_path / name / "metrics.jsonl")[0]

    many = first_step("many", tokens=97, accumulation=4)
    one = first_step("one", tokens=many.tokens, accumulation=1)
    assert many.tokens == one.tokens
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    assert many.router_z_loss == pytest.approx(one.router_z_loss, rel=1e-5)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(recipe_dict(tmp_path, save_every_steps=1, keep_checkpoints=2) | {"schedule": {"steps": 4}})
    assert [path.name for path in checkpoint_folders(tmp_path / "run")] == ["step-00000003", "step-00000004"]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


def test_what_is_saved_loads_in_transformers_and_serves_the_trainers_logits(tmp_path: Path) -> None:
    folder = run(recipe_dict(tmp_path) | {"schedule": {"steps": 5}}).checkpoint
    source = resolve_model(str(folder))
    ours = Lfm2(source.config)
    load_weights(ours, folder, device=torch.device("cpu"), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the small cat sees Zürich")["input_ids"]
    assert ids[0] == 1
    with torch.no_grad():
        mine = full_logits(ours, [ids])[0]
        torch.testing.assert_close(mine, theirs(torch.tensor([ids])).logits[0], rtol=1e-4, atol=1e-4)
    with LLM(EngineConfig(model=str(folder), device="cpu", dtype="float32")) as llm:
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, logprobs=1)
        (output,) = llm.generate([ids], sampling=sampling)
    assert output.token_ids[0] == int(mine[-1, : llm.tokenizer.num_ids].argmax())
    expected = mine[-1].log_softmax(-1)[output.token_ids[0]].item()
    assert output.logprobs[-1].logprob == pytest.approx(expected, abs=1e-4)


def test_a_run_can_start_from_another_runs_output(tmp_path: Path) -> None:
    raw = recipe_dict(tmp_path) | {"schedule": {"steps": 8}}
    first = run(raw)
    tuned = raw | {"model": {"start": str(tmp_path / "run")}, "run": raw["run"] | {"output": str(tmp_path / "tuned")}}
    tuned["data"] = {name: value for name, value in raw["data"].items() if name != "tokenizer"}
    run(tuned)
    assert read_metrics(tmp_path / "tuned" / "metrics.jsonl")[0].loss < first.loss + 0.5


def test_a_run_does_not_start_from_one_that_is_not_done(tmp_path: Path) -> None:
    raw = recipe_dict(tmp_path)
    outcome = run(raw, should_stop=stop_after(1))
    tuned = raw | {"model": {"start": str(tmp_path / "run")}, "run": raw["run"] | {"output": str(tmp_path / "tuned")}}
    with pytest.raises(UsageError, match=r"stopped at step 1 of 20. Let it finish"):
        run(tuned)
    tuned = tuned | {"model": {"start": str(outcome.checkpoint)}, "schedule": {"steps": 1}}
    assert run(tuned).is_finished


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = recipe_dict(tmp_path, save_every_steps=5) | {"schedule": {"steps": 10}}
    original = learner.chunked_cross_entropy
    calls = []

    def poisoned(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        loss = original(*args, **settings)
        return loss._replace(objective=loss.objective * float("nan")) if len(calls) > 14 else loss

    monkeypatch.setattr(learner, "chunked_cross_entropy", poisoned)
    with pytest.raises(UsageError, match=r"Step 8 has loss .*step-00000005"):
        run(raw)
    assert [path.name for path in checkpoint_folders(tmp_path / "run")] == ["step-00000005"]
    monkeypatch.setattr(learner, "chunked_cross_entropy", original)
    raw["optimizer"]["learning_rate"] = 0.001  # what the message advises
    assert run(raw).is_finished


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = recipe_dict(tmp_path) | {"schedule": {"steps": 4}}
    run(raw, should_stop=stop_after(2))

    def full(path: Path, tensors: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_tensors", full)
        with pytest.raises(MachineError, match=r"disk is full.*step-00000004"):
            run(raw)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert run(raw).num_steps == 4


def test_a_recipe_that_disagrees_with_the_checkpoint_is_refused(tmp_path: Path) -> None:
    raw = recipe_dict(tmp_path)
    run(raw, should_stop=stop_after(1))
    other_batch = raw | {"batch": {"tokens": 64}}
    with pytest.raises(UsageError, match=r"batch.accumulation was 2, is 1; batch.tokens was 128, is 64"):
        run(other_batch)
    shape = raw["model"]["shape"] | {"hidden_size": 64}
    with pytest.raises(UsageError, match=r"another shape: .*hidden_size was 32, is 64"):
        run(raw | {"model": {"shape": shape}})


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    raw = recipe_dict(tmp_path) | {"schedule": {"steps": 2}}
    outcome = run(raw)
    path = outcome.checkpoint / "training" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"step-00000002 is damaged"):
        run(raw)


def test_missing_changed_and_truncated_data_are_refused(tmp_path: Path) -> None:
    raw = recipe_dict(tmp_path)
    missing = raw | {"data": raw["data"] | {"files": [str(tmp_path / "none.jsonl")]}}
    with pytest.raises(UsageError, match=r"none.jsonl cannot be read: No such file"):
        run(missing)
    run(raw, should_stop=stop_after(1))
    documents = Path(raw["data"]["files"][0])
    text = documents.read_text()
    documents.write_text(text[:-20])
    with pytest.raises(UsageError, match=r"prepared from other files"):
        run(raw)
    again = raw | {"run": raw["run"] | {"output": str(tmp_path / "again")}}
    with pytest.raises(UsageError, match=r"documents.jsonl:60 is not JSON.*truncated"):
        run(again)
    shard = tmp_path / "run" / "data" / "file-00000.tokens"
    shard.write_bytes(shard.read_bytes()[:-4])
    documents.write_text(text)
    with pytest.raises(LfmError, match=r"prepared from other files|truncated"):
        run(raw)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    raw = recipe_dict(tmp_path)

    def start_another() -> bool:
        with pytest.raises(UsageError, match="Another process is training"):
            run(raw)
        return True

    assert run(raw, should_stop=start_another).num_steps == 1
