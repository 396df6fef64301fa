"""Where a cache block in fp8 keeps what. No torch.

Per head a block holds B rows of K values, one byte each, and behind them the scales of its tokens, one byte each, in as
many further rows as those fill: R = B + ceil(B / K) rows. So K of a layer is one tensor [N, G, R, K] that a block's id
indexes, as without fp8 (R = B). A scale is a power of two, 2^(byte - 127): the largest magnitude of a token's vector
falls into (224, 448]. Powers of two cost e4m3 nothing but half a bit of its range, and a byte instead of four lets
6.8 million tokens of the 24B fit beside its bf16 weights.
"""

EXPONENT_BIAS = 127
MIN_EXPONENT = 27  # a vector of zeros, or all below 2^-92, has the scale 2^-100


def num_rows(block_size: int, head_dim: int, *, is_fp8: bool) -> int:
    """Rows R of a block of `block_size` tokens."""
    return block_size + -(-block_size // head_dim) if is_fp8 else block_size


def num_tokens(rows: int, head_dim: int, *, is_fp8: bool) -> int:
    """Tokens B of a block of `rows` rows."""
    return rows * head_dim // (head_dim + 1) if is_fp8 else rows
