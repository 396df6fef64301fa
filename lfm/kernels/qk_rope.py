"""Between the projection and attention: per-head q/k norm, RoPE, and the write of K and V, in one launch.

    q, k = rotate(rms_norm(q)), rotate(rms_norm(k));  rotate(x) = (low cos - high sin, high cos + low sin)

Reads the projection's output once, and writes q, and K and V into their slots of the cache: 6 KB + 6 KB a token at the
24B's shapes. Rounds once after the norm, as the reference does, and then only the result; to fp8 once more, where K and
V are kept so.
Legend: T tokens, H q heads, G kv heads, K head dim, N blocks, B block size.
"""

from torch import Tensor

from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.fp8 import FP8_MAX
from lfm.kernels.kv_fp8 import as_bytes, block_size_of, scale_bytes
from lfm.kernels.kv_layout import MIN_EXPONENT
from lfm.kernels.triton_guard import has_dependent_launch, tl, triton
from lfm.kernels.weights import Norm, Rope

HEADS_PER_PROGRAM = 16
# Tokens per program by the number of tokens: one while programs are fewer than the GPU holds.
FEW_TOKENS, TOKENS_PER_PROGRAM = 512, 2


@triton.jit(do_not_specialize=["num_tokens"])
def _norm_rotate_write(
    qkv_TN, q_weight_K, k_weight_K, cos_PK, sin_PK, positions_T, slots_T, q_THK, k_NGRK, v_NGRK, k_bytes, v_bytes,
    q_eps, k_eps, num_tokens,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
    MAX: tl.constexpr, LEAST: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """qkv [T, (H + 2G) K], rows of one token: q heads, k heads, v heads. Program (i, j): TOKENS tokens, HEADS heads.

    R > B: K and V are in fp8, and their scales' bytes behind them.

    Everything read before `gdc_wait` was complete before the step's first kernel began.
    """
    rows = tl.arange(0, TOKENS * HEADS)
    token = tl.program_id(0) * TOKENS + rows // HEADS
    head = tl.program_id(1) * HEADS + rows % HEADS
    is_real = ((TOKENS == 1) | (token < num_tokens)) & (head < H + 2 * G)
    is_q, is_v = head < H, head >= H + G
    half = tl.arange(0, K // 2)
    position = tl.load(positions_T + token, mask=is_real, other=0)
    slot = tl.load(slots_T + token, mask=is_real, other=0)
    cos = tl.load(cos_PK + position[:, None] * K + half[None, :]).to(tl.float32)
    sin = tl.load(sin_PK + position[:, None] * K + half[None, :]).to(tl.float32)
    weight_low = tl.where(is_q[:, None], tl.load(q_weight_K + half)[None, :], tl.load(k_weight_K + half)[None, :])
    q_high, k_high = tl.load(q_weight_K + K // 2 + half), tl.load(k_weight_K + K // 2 + half)
    weight_high = tl.where(is_q[:, None], q_high[None, :], k_high[None, :])
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    source = qkv_TN + (token.to(tl.int64) * (H + 2 * G) + head)[:, None] * K + half[None, :]
    low = tl.load(source, mask=is_real[:, None], other=0.0)
    high = tl.load(source + K // 2, mask=is_real[:, None], other=0.0)
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    mean = (tl.sum(wide_low * wide_low, 1) + tl.sum(wide_high * wide_high, 1)) / K
    scale = tl.rsqrt(mean + tl.where(is_q, q_eps, k_eps))[:, None]
    normed_low = (wide_low * scale).to(low.dtype).to(tl.float32) * weight_low.to(tl.float32)
    normed_high = (wide_high * scale).to(low.dtype).to(tl.float32) * weight_high.to(tl.float32)
    out_low = tl.where(is_v[:, None], low, (normed_low * cos - normed_high * sin).to(low.dtype))
    out_high = tl.where(is_v[:, None], high, (normed_high * cos + normed_low * sin).to(low.dtype))

    to_q = q_THK + (token.to(tl.int64) * H + head)[:, None] * K + half[None, :]
    tl.store(to_q, out_low, mask=(is_real & is_q)[:, None])
    tl.store(to_q + K // 2, out_high, mask=(is_real & is_q)[:, None])
    group = tl.where(is_v, head - H - G, head - H)
    first_row = ((slot // B) * G + group) * R
    cached = (first_row + slot % B)[:, None] * K + half[None, :]
    is_k = is_real & (head >= H) & (head < H + G)
    if R > B:
        wide_low, wide_high = out_low.to(tl.float32), out_high.to(tl.float32)
        largest = tl.max(tl.maximum(tl.abs(wide_low), tl.abs(wide_high)), 1)
        scale_byte, inverse = scale_bytes(largest, MAX, LEAST)
        out_low = tl.clamp(wide_low * inverse[:, None], -MAX, MAX).to(k_NGRK.dtype.element_ty)
        out_high = tl.clamp(wide_high * inverse[:, None], -MAX, MAX).to(k_NGRK.dtype.element_ty)
        at = (first_row + B) * K + slot % B
        tl.store(k_bytes + at, scale_byte, mask=is_k)
        tl.store(v_bytes + at, scale_byte, mask=is_real & is_v)
    tl.store(k_NGRK + cached, out_low, mask=is_k[:, None])
    tl.store(k_NGRK + cached + K // 2, out_high, mask=is_k[:, None])
    tl.store(v_NGRK + cached, out_low, mask=(is_real & is_v)[:, None])
    tl.store(v_NGRK + cached + K // 2, out_high, mask=(is_real & is_v)[:, None])


def norm_rotate_write(
    qkv_TN: Tensor,
    q_norm: Norm,
    k_norm: Norm,
    rope: Rope,
    batch: ForwardBatch,
    k_NGBK: Tensor,
    v_NGBK: Tensor,
) -> Tensor:
    """q [T, H, K], normed and rotated, of projections [T, (H + 2G) K]; K and V of the tokens go to their slots."""
    _, groups, rows, head_dim = k_NGBK.shape
    num_tokens = qkv_TN.shape[0]
    num_heads = qkv_TN.shape[1] // head_dim - 2 * groups
    q_THK = qkv_TN.new_empty(num_tokens, num_heads, head_dim)
    tokens = 1 if num_tokens <= FEW_TOKENS else TOKENS_PER_PROGRAM
    grid = (triton.cdiv(num_tokens, tokens), triton.cdiv(num_heads + 2 * groups, HEADS_PER_PROGRAM))
    is_dependent = has_dependent_launch(qkv_TN.device)
    _norm_rotate_write[grid](
        qkv_TN,
        q_norm.weight,
        k_norm.weight,
        rope.cos,
        rope.sin,
        batch.positions_T,
        batch.slots_T,
        q_THK,
        k_NGBK,
        v_NGBK,
        as_bytes(k_NGBK),
        as_bytes(v_NGBK),
        q_norm.eps,
        k_norm.eps,
        0 if tokens == 1 else num_tokens,
        H=num_heads,
        G=groups,
        K=head_dim,
        B=block_size_of(k_NGBK),
        R=rows,
        MAX=FP8_MAX,
        LEAST=MIN_EXPONENT,
        TOKENS=tokens,
        HEADS=HEADS_PER_PROGRAM,
        PDL=is_dependent,
        num_warps=4,
        launch_pdl=is_dependent,
    )
    return q_THK
