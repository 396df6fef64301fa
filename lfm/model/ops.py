"""The tables of ops that the one model definition is written in.

`PACKED` trains and recomputes in full (autograd, no cache), `REFERENCE` serves from the paged cache in plain torch,
`FAST` is what a step uses where the hardware has something better. A fast entry has the signature of its reference and
a parity test; a capability check inside the op falls back to the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import linear

from lfm.kernels.attention import attend_packed, attend_ref, qkv_rope_ref, write_kv_ref
from lfm.kernels.experts import experts, experts_ref
from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.norm import add_norm_ref
from lfm.kernels.router import route_ref
from lfm.kernels.short_conv import short_conv_packed, short_conv_ref


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One implementation of every semantic op. Shapes are in each op's own module."""

    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]] = add_norm_ref
    project: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear
    short_conv: Callable[[Tensor, Tensor, Tensor | None, ForwardBatch, Tensor], Tensor]
    qkv_rope: Callable[..., tuple[Tensor, Tensor, Tensor]] = qkv_rope_ref
    write_kv: Callable[[Tensor, Tensor, ForwardBatch, Tensor, Tensor], None]
    attend: Callable[[Tensor, Tensor, Tensor, ForwardBatch, Tensor, Tensor], Tensor]
    route: Callable[..., tuple[Tensor, Tensor]] = route_ref
    experts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = experts_ref


def _write_nothing(k_TGK: Tensor, v_TGK: Tensor, batch: ForwardBatch, k_NGBK: Tensor, v_NGBK: Tensor) -> None:
    """Training keeps no cache."""


PACKED = Ops(short_conv=short_conv_packed, write_kv=_write_nothing, attend=attend_packed)
REFERENCE = Ops(short_conv=short_conv_ref, write_kv=write_kv_ref, attend=attend_ref)
FAST = replace(REFERENCE, experts=experts)
