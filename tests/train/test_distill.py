"""Learning from a teacher: logits in chunks, and whole runs from a recipe."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lfm.cli.app import run as command
from lfm.errors import UsageError
from lfm.model.full_forward import full_logits
from lfm.model.lfm2 import Lfm2
from lfm.model.source import resolve_model
from lfm.model.weights import load_weights
from lfm.train.batches import NO_TARGET, collate
from lfm.train.distill import TopK, chunked_distillation, decoupled_top_k_loss
from lfm.train.metrics import read_metrics
from lfm.train.recipe import DistillSettings
from lfm.train.teacher import Teacher
from tests.train.models import random_rows, recipe_dict, write_tiny_tokenizer
from tests.train.test_cli import write_toml
from tests.train.test_session import files_in, run, stop_after, without_times

torch.set_num_threads(1)


def test_chunks_give_the_loss_and_gradients_of_the_whole() -> None:
    """Also where some rows are padding, whose teacher says nonsense."""
    generator = torch.Generator().manual_seed(3)
    hidden, head, teacher = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 5), (11, 5), (7, 11))
    )
    targets = torch.tensor([1, 2, NO_TARGET, 4, 5, NO_TARGET, 7])
    top = teacher.topk(4, dim=-1)
    stored = TopK(top.indices, top.values, teacher.logsumexp(-1))
    results = []
    for chunk_tokens in (None, 3):
        x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if chunk_tokens is None:
            loss = decoupled_top_k_loss(x @ w.T, *stored, temperature=1.5)[targets != NO_TARGET].sum()
        else:
            loss = chunked_distillation(x, w, targets, stored, temperature=1.5, chunk_tokens=chunk_tokens)
        loss.backward()
        results.append((loss.detach(), x.grad, w.grad))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Path]:
    """A folder, the recipe of a small teacher, and the teacher."""
    folder = tmp_path_factory.mktemp("taught")
    raw = recipe_dict(folder) | {"schedule": {"steps": 12}}
    return folder, raw, run(raw).checkpoint


def student_of(raw: dict[str, Any], output: Path, **distill: Any) -> dict[str, Any]:
    return raw | {"run": raw["run"] | {"output": str(output)}, "distill": distill}


def test_a_teacher_says_what_its_own_logits_say(taught: tuple[Path, dict[str, Any], Path]) -> None:
    folder, _, checkpoint = taught
    config = resolve_model(str(checkpoint)).config
    teacher = Teacher(
        DistillSettings(teacher=str(checkpoint), top_k=5),
        student=config,
        tokenizer_folder=folder / "tokenizer",
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    rows = random_rows([4, 9], share=1.0)
    said = teacher.top_k(collate(rows), chunk_tokens=3)
    model = Lfm2(config)
    load_weights(model, checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        logits = torch.cat(full_logits(model, [row.ids[:-1].tolist() for row in rows]))
    top = logits.topk(5, dim=-1)
    assert torch.equal(said.ids_TK, top.indices)
    torch.testing.assert_close(said.logits_TK, top.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(said.lse_T, logits.logsumexp(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", "float32"), pytest.param("cuda", "bfloat16", marks=pytest.mark.gpu)]
)
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # by the compiler, which asks for it
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_student_comes_nearer_to_its_teacher_and_resumes_bit_for_bit(
    tmp_path: Path, taught: tuple[Path, dict[str, Any], Path], device: str, dtype: str
) -> None:
    _, raw, checkpoint = taught
    raw = raw | {"run": raw["run"] | {"device": device, "dtype": dtype}}
    settings = {"teacher": str(checkpoint), "top_k": 8, "temperature": 1.5, "weight": 0.7}
    whole = run(student_of(raw, tmp_path / "whole", **settings))
    metrics = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert metrics[-1].distill_loss < 0.5 * metrics[0].distill_loss
    assert metrics[-1].loss < metrics[0].loss - 1
    part = student_of(raw, tmp_path / "part", **settings)
    run(part, should_stop=stop_after(5))
    again = run(part)
    one, other = (without_times(files_in(outcome.checkpoint)) for outcome in (whole, again))
    assert [name for name in one if one[name] != other[name]] == []


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(
    tmp_path: Path, taught: tuple[Path, dict[str, Any], Path]
) -> None:
    _, raw, checkpoint = taught
    same = student_of(raw, tmp_path / "same", teacher=str(checkpoint), weight=1.0)
    same |= {"model": {"start": str(checkpoint)}, "loss": {"router_z": 0.0, "output_z": 0.0}, "schedule": {"steps": 1}}
    run(same)
    (step,) = read_metrics(tmp_path / "same" / "metrics.jsonl")
    assert step.distill_loss == pytest.approx(0.0, abs=1e-5)
    assert step.grad_norm < 1e-3
    assert step.loss > 1


def test_a_weight_of_zero_is_training_without_a_teacher(
    tmp_path: Path, taught: tuple[Path, dict[str, Any], Path]
) -> None:
    _, raw, checkpoint = taught
    run(student_of(raw, tmp_path / "zero", teacher=str(checkpoint), weight=0.0) | {"schedule": {"steps": 3}})
    run(raw | {"run": raw["run"] | {"output": str(tmp_path / "plain")}} | {"schedule": {"steps": 3}})
    zero, plain = ([m.loss for m in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("zero", "plain"))
    assert zero == pytest.approx(plain, rel=1e-5)


def test_a_teacher_with_other_ids_is_refused(tmp_path: Path, taught: tuple[Path, dict[str, Any], Path]) -> None:
    _, raw, checkpoint = taught
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "quite another vocabulary emerges whenever unfamiliar paragraphs supply merges"}\n')
    student = student_of(raw, tmp_path / "student", teacher=str(checkpoint))
    student["data"] = raw["data"] | {"tokenizer": str(write_tiny_tokenizer(tmp_path / "tokenizer", other))}
    with pytest.raises(UsageError, match=r"distill.teacher=.* has (another tokenizer.json|\d+ rows of vocabulary)"):
        run(student)
    with pytest.raises(UsageError, match=r"distill.top_k=100000 is more than the vocabulary"):
        run(student_of(raw, tmp_path / "many", teacher=str(checkpoint), top_k=100_000))
    with pytest.raises(UsageError, match="has no weights"):
        run(student_of(raw, tmp_path / "random", teacher="random:tiny"))


def test_a_dry_run_says_what_the_teacher_takes(
    tmp_path: Path, taught: tuple[Path, dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, raw, checkpoint = taught
    recipe = write_toml(tmp_path / "recipe.toml", student_of(raw, tmp_path / "none", teacher=str(checkpoint)))
    assert command(["train", "pretrain", str(recipe), "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("teacher: ")]
    assert re.match(r"teacher: [\d,]+ parameters, [\d,]+ active per token; about .* more", line)
