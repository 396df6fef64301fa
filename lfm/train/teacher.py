"""The teacher of a distillation: a frozen model that says, of every token to be predicted, which are likeliest.

It runs beside the student on the same packed batches. Legend: R tokens that predict, K kept logits per token, V vocab.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from lfm.config import ModelConfig
from lfm.errors import UsageError
from lfm.kernels.norm import widen
from lfm.model.source import resolve_model
from lfm.model.weights import load_weights
from lfm.train.batches import TrainBatch
from lfm.train.distill import TopK
from lfm.train.models import build_model
from lfm.train.ops import train_ops
from lfm.train.recipe import DistillSettings
from lfm.train.routing import RouteRecorder


class Teacher:
    """A model that is not trained, and how much of what it says is kept."""

    def __init__(
        self,
        settings: DistillSettings,
        *,
        student: ModelConfig,
        tokenizer_folder: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Load the teacher. Raises UsageError if its ids are not the student's, ModelError if it is broken."""
        source = resolve_model(settings.teacher)
        if source.folder is None:
            raise UsageError(f"distill.teacher={settings.teacher} has no weights. Give a folder or a hub id.")
        _check_ids(settings, source.config, source.folder, student, tokenizer_folder)
        self._num_kept, self.settings = settings.top_k, settings
        self._model = build_model(source.config, device=device, dtype=dtype).requires_grad_(False)
        load_weights(self._model, source.folder, device=device, dtype=dtype)
        self._ops = train_ops(RouteRecorder(source.config, device))

    @torch.no_grad()
    def top_k(self, batch: TrainBatch, *, chunk_tokens: int) -> TopK:
        """What the teacher says of each token in `batch.predicting_R`; never all logits at once."""
        model = self._model
        hidden_TD = model(batch.forward, None, self._ops)
        head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
        rows_R = batch.predicting_R.clamp(max=hidden_TD.shape[0] - 1)
        parts = [self._chunk(hidden_TD[chunk_C], head.weight) for chunk_C in rows_R.split(chunk_tokens)]
        return TopK(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _chunk(self, hidden_CD: Tensor, head_VD: Tensor) -> TopK:
        logits_CV = widen(linear(hidden_CD, head_VD))
        logits_CK, ids_CK = logits_CV.topk(self._num_kept, dim=-1)
        return TopK(ids_CK, logits_CK, logits_CV.logsumexp(-1))


def _check_ids(
    settings: DistillSettings, teacher: ModelConfig, folder: Path, student: ModelConfig, tokenizer_folder: Path
) -> None:
    if teacher.vocab_size != student.vocab_size:
        raise UsageError(
            f"distill.teacher={settings.teacher} has {teacher.vocab_size} rows of vocabulary, the model "
            f"{student.vocab_size}. A teacher needs the tokenizer of the model that it teaches."
        )
    if (folder / "tokenizer.json").read_bytes() != (tokenizer_folder / "tokenizer.json").read_bytes():
        raise UsageError(
            f"distill.teacher={settings.teacher} has another tokenizer.json than {tokenizer_folder}. "
            "A teacher needs the tokenizer of the model that it teaches."
        )
    if settings.top_k > teacher.vocab_size:
        raise UsageError(f"distill.top_k={settings.top_k} is more than the vocabulary of {teacher.vocab_size}.")
