"""From logits to token ids, on the device, for a whole batch, without one wait for it.

    logprobs               fp32 log-softmax of the raw logits, for batches where a row asks
    ids >= num_ids         masked (unless the row says otherwise)
    logit_bias             added
    repetition penalty     over all ids of the sequence
    presence, frequency    over its output ids
    masks                  all ids masked but those that a row's grammar allows, and those that it bans
    min_tokens             stop ids masked while the output is shorter, unless nothing else is left
    temperature, top_k, top_p, min_p, draw     see lfm.kernels.draw_token

Most batches on a GPU need little of this and get it from one or two launches, the same ids bit for bit: see
`lfm.kernels.sample_rows`.

What a row gets depends on its own logits, parameters, seed and position, never on its neighbours, its row or the
batch's size. Every shape depends on the number of rows and the flags alone. Computes in float32, or float64 for
float64 logits.

R rows, V vocabulary, K alternatives, T tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lfm.engine.sampling_rows import MAX_COUNT, RowParams, SampleFlags, SamplingRows
from lfm.kernels.draw_token import DrawParams, Draws, draw_tokens
from lfm.kernels.penalties import count_penalties, repetition_penalty, unpack_bits
from lfm.kernels.sample_rows import MAX_TOP_K, sample_rows, samples_fused
from lfm.kernels.top_k import top_k

# Logits per pass. On a CPU the temporaries of a pass stay in the L2 cache; on a GPU they stay within 64 MB each.
CPU_PASS = 2**19
GPU_PASS = 2**24


class Logprobs(NamedTuple):
    """Log-probabilities under the raw logits, float32.

    `top_ids_RK` and `top_RK` are the alternatives in falling order (equal ones: lower id first), -1 and -inf where a
    row has fewer.
    """

    chosen_R: Tensor
    top_ids_RK: Tensor
    top_RK: Tensor


class SampleOutput(NamedTuple):
    """Sampled ids [R] int64, -1 for rows that failed; `logprobs` where the flags ask for them."""

    ids_R: Tensor
    logprobs: Logprobs | None


def sample(
    rows: SamplingRows,
    logits_RV: Tensor,
    *,
    row_R: Tensor,
    position_R: Tensor,
    flags: SampleFlags,
    ok_R: Tensor | None = None,
) -> SampleOutput:
    """Sample the next id of each row, and mark it in `rows`: last id, its position, seen, counts.

    Args:
        logits_RV: raw logits; left unchanged.
        row_R: row of each sequence (int64), distinct but for the scratch row.
        position_R: position of the token being sampled (int64): the number of tokens before it.
        flags: `rows.flags` of the same rows.
        ok_R: whether a row may be sampled at all (its hidden states are finite); all rows if None.

    A row that is not ok, or whose logits hold NaN, +inf or nothing but -inf, gets -1. Its last id on the device becomes
    0, which any embedding takes, and it is marked nowhere else.
    """
    if _is_fused(logits_RV, flags):
        ids_R = sample_rows(
            logits_RV,
            rows.tables,
            row_R=row_R,
            position_R=position_R,
            ok_R=ok_R,
            repetition=flags.repetition,
            narrow_k=flags.narrow_k,
            mask=flags.mask,
        )
    else:
        ids_R = _sample_plain(rows, logits_RV, row_R, position_R, flags, ok_R)
    if flags.num_logprobs < 0:
        return SampleOutput(ids_R, None)
    return SampleOutput(ids_R, token_logprobs(logits_RV, ids_R, num_top=flags.num_logprobs, num_ids=rows.num_ids))


def _is_fused(logits_RV: Tensor, flags: SampleFlags) -> bool:
    is_rare = flags.counts or flags.bias or flags.min_tokens or flags.wide
    return not is_rare and flags.narrow_k <= MAX_TOP_K and samples_fused(logits_RV)


def _sample_plain(
    rows: SamplingRows,
    logits_RV: Tensor,
    row_R: Tensor,
    position_R: Tensor,
    flags: SampleFlags,
    ok_R: Tensor | None,
) -> Tensor:
    ids = []
    pass_rows = _pass_rows(logits_RV)
    for first in range(0, max(1, len(logits_RV)), pass_rows):
        some = slice(first, first + pass_rows)
        draws = _sample_pass(rows, logits_RV[some], row_R[some], position_R[some], flags)
        failed = ~draws.max_R.isfinite() if ok_R is None else ~(draws.max_R.isfinite() & ok_R[some])
        ids.append(draws.ids_R.masked_fill(failed, -1))
    ids_R = torch.cat(ids)
    _mark(rows, ids_R, row_R, position_R, flags)
    return ids_R


def _sample_pass(rows: SamplingRows, logits_RV: Tensor, row_R: Tensor, position_R: Tensor, flags: SampleFlags) -> Draws:
    params = rows.read(row_R)
    dtype = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32
    x_RV = logits_RV.to(dtype, copy=True)
    if rows.num_ids < rows.vocab_size:
        padded_ids = torch.arange(rows.num_ids, rows.vocab_size, device=x_RV.device)
        x_RV[:, rows.num_ids :].masked_fill_(padded_ids >= params.num_ids, -torch.inf)
    x_RV = _adjust(rows, x_RV, row_R, position_R, params, flags)
    draw_params = DrawParams(
        temperature_R1=params.temperature.to(dtype),
        min_p_R1=params.min_p.to(dtype),
        top_p_R1=params.top_p,
        top_k_R1=params.top_k,
        seed_R1=params.seed,
        position_R1=position_R[:, None],
    )
    return draw_tokens(x_RV, draw_params, narrow_k=flags.narrow_k, wide=flags.wide, wide_prefix=flags.wide_prefix)


def _adjust(
    rows: SamplingRows, x_RV: Tensor, row_R: Tensor, position_R: Tensor, params: RowParams, flags: SampleFlags
) -> Tensor:
    """Biases, penalties, the row's mask and the mask of min_tokens, in this order."""
    dtype = x_RV.dtype
    if flags.bias:
        x_RV = rows.bias.add_to(x_RV, row_R)
    if flags.repetition:
        seen_RV = unpack_bits(rows.seen_RB[row_R], rows.bit_table, rows.vocab_size)
        x_RV = repetition_penalty(x_RV, seen_RV, params.repetition_penalty.to(dtype))
    if flags.counts and rows.counts_RV is not None:
        penalties = params.presence_penalty.to(dtype), params.frequency_penalty.to(dtype)
        x_RV = count_penalties(x_RV, rows.counts_RV[row_R], *penalties)
    if flags.mask and rows.masks_RW is not None:
        allowed_RV = unpack_bits(rows.masks_RW[row_R].view(torch.uint8), rows.bit_table, rows.vocab_size)
        x_RV = x_RV.masked_fill(allowed_RV == 0, -torch.inf)
    if flags.min_tokens:
        masked_RV = rows.stops.add_to(x_RV, row_R, position_R[:, None] < params.min_position)
        x_RV = torch.where(masked_RV.amax(dim=1, keepdim=True) == -torch.inf, x_RV, masked_RV)
    return x_RV


def _mark(rows: SamplingRows, ids_R: Tensor, row_R: Tensor, position_R: Tensor, flags: SampleFlags) -> None:
    """Write what was sampled into the rows. Only the scratch row may be named twice, and nothing reads that."""
    valid_ids_R = ids_R.clamp(min=0)
    rows.last_ids_R[row_R] = valid_ids_R
    rows.positions_R[row_R] = position_R
    marked_R = row_R.masked_fill(ids_R < 0, rows.scratch_row)
    byte_R = valid_ids_R >> 3
    bit_R = torch.ones_like(valid_ids_R).bitwise_left_shift_(valid_ids_R & 7).to(torch.uint8)
    rows.seen_RB[marked_R, byte_R] = rows.seen_RB[marked_R, byte_R] | bit_R
    if flags.counts and rows.counts_RV is not None:
        counts_R = rows.counts_RV[marked_R, valid_ids_R]
        rows.counts_RV[marked_R, valid_ids_R] = counts_R.clamp_(max=MAX_COUNT - 1) + 1


def token_logprobs(logits_TV: Tensor, ids_T: Tensor, *, num_top: int, num_ids: int) -> Logprobs:
    """Log-probabilities of `ids_T` and the `num_top` most likely ids below `num_ids`, which have a text.

    Serves prompt logprobs too. The softmax runs over all V logits, as in transformers. Rows with an id of -1 get NaN.
    Works through the tokens in passes: beside the logits it needs a bounded memory.
    """
    parts = []
    pass_rows = _pass_rows(logits_TV)
    for first in range(0, max(1, len(logits_TV)), pass_rows):
        some = slice(first, first + pass_rows)
        parts.append(_logprobs_pass(logits_TV[some], ids_T[some], num_top, num_ids))
    return Logprobs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _logprobs_pass(logits_TV: Tensor, ids_T: Tensor, num_top: int, num_ids: int) -> Logprobs:
    logprobs_TV = logits_TV.to(torch.float32).log_softmax(dim=1)
    chosen_T = logprobs_TV.gather(1, ids_T.clamp(min=0)[:, None])[:, 0].masked_fill_(ids_T < 0, torch.nan)
    if num_top == 0:
        return Logprobs(chosen_T, ids_T.new_zeros((len(ids_T), 0)), chosen_T.new_zeros((len(ids_T), 0)))
    logprobs_TV[:, num_ids:] = -torch.inf
    top_TK, top_ids_TK = top_k(logprobs_TV, min(num_top, logits_TV.shape[1]))
    return Logprobs(chosen_T, top_ids_TK.masked_fill(top_TK == -torch.inf, -1), top_TK)


def _pass_rows(logits: Tensor) -> int:
    return max(1, (CPU_PASS if logits.device.type == "cpu" else GPU_PASS) // logits.shape[1])
