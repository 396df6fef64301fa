"""What the sampler keeps on the device for each running sequence: one row each, as long as the sequence runs.

Written by `start_many` when a sequence begins or resumes, from all its ids, and then by every `sample` that names the
row. Rows never restarted keep what their last sequence left; nothing reads it. All writes are queued on the current
stream, so a start needs no wait for the steps in flight that still name the row's last sequence.

The last row is scratch: padding rows of a batch name it, and rows without a sampled id are marked there.

R rows with scratch, V vocabulary, B bytes of the bitmap.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lfm.engine.grammar_masks import num_mask_words
from lfm.kernels.draw_token import MAX_NARROW_K
from lfm.kernels.penalties import bits_of_bytes, pack_bits
from lfm.kernels.sample_rows import SampledRows
from lfm.protocol import SamplingParams

# Below this a temperature is 0 (vLLM's rule): dividing logits by it would leave nothing but the largest anyway.
MIN_TEMPERATURE = 1e-5
MAX_COUNT = 2**15 - 1  # of one id in one output; a frequency penalty has long had its full effect there
MIN_LIST_WIDTH = 16
NARROW_BUCKETS = (64, 256, MAX_NARROW_K)  # few sizes, so that few shapes are compiled or captured


class SampleFlags(NamedTuple):
    """Which parts of the sampler a batch needs: static facts that the host knows. More than needed changes no id."""

    repetition: bool = False
    counts: bool = False
    bias: bool = False
    min_tokens: bool = False
    narrow_k: int = 0  # candidates of the rows with 0 < top_k <= MAX_NARROW_K
    wide: bool = False
    wide_prefix: bool = False
    mask: bool = False  # some row may only sample the ids of its mask
    num_logprobs: int = -1  # top alternatives besides the sampled id; -1: no row asks for logprobs

    def __or__(self, other: "SampleFlags") -> "SampleFlags":
        return SampleFlags(
            repetition=self.repetition or other.repetition,
            counts=self.counts or other.counts,
            bias=self.bias or other.bias,
            min_tokens=self.min_tokens or other.min_tokens,
            narrow_k=max(self.narrow_k, other.narrow_k),
            wide=self.wide or other.wide,
            wide_prefix=self.wide_prefix or other.wide_prefix,
            mask=self.mask or other.mask,
            num_logprobs=max(self.num_logprobs, other.num_logprobs),
        )


class RowParams(NamedTuple):
    """The parameters of a batch's rows, each [R, 1]: float64, then int64."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    seed: Tensor
    top_k: Tensor
    min_position: Tensor  # the first position that may hold a stop id
    num_ids: Tensor  # ids from here on are never sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStart:
    """One sequence that begins or resumes in `row`. `ids` are all its ids; those after `num_prompt` are outputs.

    `mask_padded_ids` False lets ids beyond the tokenizer's through.
    """

    row: int
    params: SamplingParams
    seed: int
    ids: Sequence[int]
    num_prompt: int
    mask_padded_ids: bool = True


def flags_of(params: SamplingParams) -> SampleFlags:
    """What one row needs."""
    is_random = params.temperature >= MIN_TEMPERATURE
    is_narrow = 0 < params.top_k <= MAX_NARROW_K
    is_wide = is_random and not is_narrow
    return SampleFlags(
        repetition=params.repetition_penalty != 1,
        counts=_has_counts(params),
        bias=bool(params.logit_bias),
        min_tokens=params.min_tokens > 0 and bool(params.stop_token_ids),
        narrow_k=next(k for k in NARROW_BUCKETS if params.top_k <= k) if is_random and is_narrow else 0,
        wide=is_wide,
        wide_prefix=is_wide and (params.top_p < 1 or params.top_k > 0),
        mask=bool(params.banned_ids),
        num_logprobs=-1 if params.logprobs is None else params.logprobs,
    )


def _float_params(params: SamplingParams) -> list[float]:
    return [
        params.temperature if params.temperature >= MIN_TEMPERATURE else 0.0,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    ]


def _has_counts(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0


class SamplingRows:
    """Rows 0 .. num_rows - 1 for sequences, and `scratch_row`. `last_ids_R` and `positions_R` feed the next forward.

    `num_ids`: ids from here to `vocab_size` have no text and are masked. Buffers keep their addresses, but for the
    pools of counts, biases and stop ids: these come with the first row that needs them and may grow with a later one.
    Masks come with the first row that needs one, and stay where they are then.
    """

    def __init__(self, num_rows: int, vocab_size: int, *, num_ids: int, device: torch.device) -> None:
        if not 0 < num_ids <= vocab_size:
            raise ValueError(f"num_ids={num_ids} must lie in 1..vocab_size={vocab_size}.")
        self.num_rows = num_rows
        self.scratch_row = num_rows
        self.vocab_size = vocab_size
        self.num_ids = num_ids
        self.device = device
        size = num_rows + 1
        self.last_ids_R = torch.zeros(size, dtype=torch.int64, device=device)
        self.positions_R = torch.zeros(size, dtype=torch.int64, device=device)  # of the last id
        self.seen_RB = torch.zeros((size, (vocab_size + 7) // 8), dtype=torch.uint8, device=device)
        self.bit_table = bits_of_bytes(device)
        self.counts_RV: Tensor | None = None  # int16
        self.masks_RW: Tensor | None = None  # int32: bit i % 32 of word i // 32 is set if id i may be sampled
        self._masked: set[int] = set()  # rows whose mask is not all ones
        self.num_changes = 0  # while it stays, so do the flags of every row
        self.bias = IdLists(size, device)
        self.stops = IdLists(size, device)
        neutral = torch.tensor(_float_params(SamplingParams(max_tokens=1, temperature=0.0)), dtype=torch.float64)
        self._floats = neutral.to(device).repeat(size, 1)
        self._ints = torch.tensor([0, 0, 0, num_ids], dtype=torch.int64).to(device).repeat(size, 1)
        self._flags = [SampleFlags()] * size

    @property
    def tables(self) -> SampledRows:
        """What the fused sampler reads and marks; none of it ever moves."""
        return SampledRows(self._floats, self._ints, self.seen_RB, self.masks_RW, self.last_ids_R, self.positions_R)

    def flags(self, rows: Iterable[int]) -> SampleFlags:
        """What a batch of these rows needs of the sampler."""
        rows = list(rows)
        merged = SampleFlags()
        for flags in {self._flags[row] for row in rows}:
            merged |= flags
        return merged if self._masked.isdisjoint(rows) else merged._replace(mask=True)

    def read(self, row_R: Tensor) -> RowParams:
        """The parameters of rows `row_R` (int64, on the device)."""
        return RowParams(*self._floats[row_R][:, :, None].unbind(1), *self._ints[row_R][:, :, None].unbind(1))

    def start(self, start: RowStart) -> None:
        """Begin or resume one sequence; see `start_many`."""
        self.start_many([start])

    def start_many(self, starts: Sequence[RowStart]) -> None:
        """Write the rows of sequences that begin or resume: parameters, the ids seen, counts of the output ids.

        Rows must be distinct. Copies from pinned memory; never waits for the device. Raises ValueError for a row or an
        id out of range, and then changes nothing: ids and biases are the engine's to refuse before they come here.
        """
        if not starts:
            return
        # numpy reads a list at 40 ns an id, torch.tensor at 100: 1.2 ms less for 32,000 ids.
        ids = [torch.from_numpy(np.array(start.ids, dtype=np.int64)) for start in starts]
        for start, row_ids in zip(starts, ids, strict=True):
            self._check(start, row_ids)
        rows = self._upload(torch.tensor([start.row for start in starts]))
        self._floats[rows] = self._upload(torch.tensor([_float_params(s.params) for s in starts], dtype=torch.float64))
        self._ints[rows] = self._upload(torch.tensor([self._int_params(s) for s in starts], dtype=torch.int64))
        self.last_ids_R[rows] = self._upload(torch.tensor([start.ids[-1] for start in starts]))
        self.positions_R[rows] = self._upload(torch.tensor([len(start.ids) - 1 for start in starts]))
        self.seen_RB[rows] = self._upload(self._bitmaps(ids))
        self._start_counts(starts, ids)
        self._start_masks(starts)
        self.bias.write(rows, [list(start.params.logit_bias.items()) for start in starts], self._upload)
        self.stops.write(rows, [self._stop_entries(start.params) for start in starts], self._upload)
        for start in starts:
            self._flags[start.row] = flags_of(start.params)
        self.num_changes += 1

    def _check(self, start: RowStart, ids: Tensor) -> None:
        if not 0 <= start.row < self.num_rows:
            raise ValueError(f"row={start.row} is out of range. Allowed: 0 to {self.num_rows - 1}.")
        if not 0 < start.num_prompt <= len(start.ids):
            raise ValueError(f"num_prompt={start.num_prompt} is out of range. Allowed: 1 to the {len(start.ids)} ids.")
        biased, banned = torch.tensor(list(start.params.logit_bias)), torch.tensor(start.params.banned_ids)
        for name, values in (("ids", ids), ("logit_bias", biased), ("banned_ids", banned)):
            if len(values) and not (values.min() >= 0 and values.max() < self.vocab_size):
                given = f"{int(values.min())} to {int(values.max())}"
                raise ValueError(f"{name} holds ids from {given}. Allowed: 0 to {self.vocab_size - 1}.")

    def _int_params(self, start: RowStart) -> list[int]:
        params = start.params
        num_ids = self.num_ids if start.mask_padded_ids else self.vocab_size
        return [start.seed, params.top_k, start.num_prompt + params.min_tokens, num_ids]

    def _stop_entries(self, params: SamplingParams) -> list[tuple[int, float]]:
        if params.min_tokens == 0:
            return []
        # A stop id beyond the vocabulary is never sampled: nothing to mask.
        return [(i, -torch.inf) for i in sorted(set(params.stop_token_ids)) if 0 <= i < self.vocab_size]

    def _bitmaps(self, ids: list[Tensor]) -> Tensor:
        seen = torch.zeros((len(ids), self.vocab_size), dtype=torch.bool)
        for seen_V, row_ids in zip(seen, ids, strict=True):
            seen_V[row_ids] = True
        return pack_bits(seen)

    def _start_counts(self, starts: Sequence[RowStart], ids: list[Tensor]) -> None:
        users = [i for i, start in enumerate(starts) if _has_counts(start.params)]
        if not users:
            return
        if self.counts_RV is None:
            shape = (self.num_rows + 1, self.vocab_size)
            self.counts_RV = torch.zeros(shape, dtype=torch.int16, device=self.device)
        counts = [torch.bincount(ids[i][starts[i].num_prompt :], minlength=self.vocab_size) for i in users]
        counts_UV = torch.stack(counts).clamp_(max=MAX_COUNT).to(torch.int16)
        rows = self._upload(torch.tensor([starts[i].row for i in users]))
        self.counts_RV[rows] = self._upload(counts_UV)

    def _start_masks(self, starts: Sequence[RowStart]) -> None:
        """Give rows that ban ids a mask without them, and others back the mask that allows all."""
        users = [start for start in starts if start.params.banned_ids or start.row in self._masked]
        if not users:
            return
        allowed = torch.ones((len(users), 32 * num_mask_words(self.vocab_size)), dtype=torch.bool)
        for allowed_V, start in zip(allowed, users, strict=True):
            allowed_V[list(start.params.banned_ids)] = False
        masks_UW = pack_bits(allowed).view(torch.int32)
        self.write_masks([start.row for start in users], self._pinned(masks_UW))
        self._masked -= {start.row for start in users if not start.params.banned_ids}

    def write_masks(self, rows: Sequence[int], masks_KW: Tensor) -> None:
        """Let these rows sample only the ids of these masks (int32, on the host), until they get others or restart.

        Never waits for the device if they are pinned; they may change again once a step that samples them was read.
        """
        if self.masks_RW is None:
            shape = (self.num_rows + 1, masks_KW.shape[1])
            self.masks_RW = torch.full(shape, -1, dtype=torch.int32, device=self.device)
        self.masks_RW[self._upload(torch.tensor(rows))] = masks_KW.to(self.device, non_blocking=True)
        if not self._masked.issuperset(rows):
            self._masked.update(rows)
            self.num_changes += 1

    def mark(self, outputs: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Mark output ids that were not sampled as seen, and count them: pairs of a row and its ids."""
        users = [(row, ids) for row, ids in outputs if self._flags[row].repetition or self._flags[row].counts]
        if not users:
            return
        counts = Counter((row, token_id) for row, ids in users for token_id in ids)
        bits: dict[tuple[int, int], int] = {}
        for row, token_id in counts:
            bits[row, token_id >> 3] = bits.get((row, token_id >> 3), 0) | 1 << (token_id & 7)
        row_N, byte_N, bits_N = self._upload(torch.tensor([(*place, value) for place, value in bits.items()]).T)
        self.seen_RB[row_N, byte_N] = self.seen_RB[row_N, byte_N] | bits_N.to(torch.uint8)
        if self.counts_RV is not None:
            row_N, id_N, new_N = self._upload(torch.tensor([(*place, num) for place, num in counts.items()]).T)
            self.counts_RV[row_N, id_N] = (self.counts_RV[row_N, id_N] + new_N).clamp_(max=MAX_COUNT).to(torch.int16)

    def _upload(self, tensor: Tensor) -> Tensor:
        """Copy to the device without waiting: torch keeps the pinned memory until the copy is done."""
        return self._pinned(tensor).to(self.device, non_blocking=True)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


class IdLists:
    """Pairs (id, value) per row, for a sparse addition to the logits; padded with (0, 0.0) to a common width.

    The width is 0 until a row has entries, then a power of two that holds the longest list so far.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.ids = torch.zeros((num_rows, 0), dtype=torch.int64, device=device)
        self.values = torch.zeros((num_rows, 0), dtype=torch.float64, device=device)

    def write(self, rows: Tensor, lists: list[list[tuple[int, float]]], upload: Callable[[Tensor], Tensor]) -> None:
        """Replace the lists of `rows` (int64, on the device)."""
        longest = max(map(len, lists))
        if longest > self.ids.shape[1]:
            width = max(MIN_LIST_WIDTH, 1 << (longest - 1).bit_length())
            self.ids = pad(self.ids, (0, width - self.ids.shape[1]))
            self.values = pad(self.values, (0, width - self.values.shape[1]))
        if width := self.ids.shape[1]:
            padded = [entries + [(0, 0.0)] * (width - len(entries)) for entries in lists]
            self.ids[rows] = upload(torch.tensor([[i for i, _ in entries] for entries in padded]))
            self.values[rows] = upload(
                torch.tensor([[v for _, v in entries] for entries in padded], dtype=torch.float64)
            )

    def add_to(self, x_RV: Tensor, row_R: Tensor, is_active_R1: Tensor | None = None) -> Tensor:
        """`x_RV` plus the values of rows `row_R`; where given, only of those that are active."""
        values = self.values[row_R]
        if is_active_R1 is not None:
            values = values.masked_fill(~is_active_R1, 0.0)
        # Exact in any order: the ids of a row are distinct but for the padding, which adds 0.
        return x_RV.scatter_add(1, self.ids[row_R], values.to(x_RV.dtype))
