"""The tables of ops that the one model definition is written in.

`PACKED` trains and recomputes in full (autograd, no cache), `REFERENCE` serves from the paged cache in plain torch,
`FAST` is what a step uses where the hardware has something better, and `CPU` where a CPU computes in fp32 or fp64. A
fast entry has the signature of its reference and a parity test; a check inside the op falls back to the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lfm.kernels.attention import attend, attend_packed, attend_ref, qkv, qkv_ref
from lfm.kernels.cpu_attention import cpu_attend, cpu_qkv
from lfm.kernels.cpu_conv import cpu_conv_in
from lfm.kernels.cpu_experts import cpu_experts
from lfm.kernels.cpu_layers import cpu_dense, cpu_norm, cpu_project_add, cpu_route
from lfm.kernels.experts import experts, experts_ref
from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.moe import moe
from lfm.kernels.norm import (
    dense,
    dense_ref,
    project,
    project_add,
    project_add_ref,
    project_ref,
    rms_norm,
    rms_norm_ref,
)
from lfm.kernels.router import route, route_ref
from lfm.kernels.short_conv import conv_in, conv_in_packed, conv_in_ref
from lfm.kernels.weights import ExpertScales, Linear, Norm, Rope, Router


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One implementation of every semantic op, in the order of a layer. Shapes are in each op's own module."""

    conv_in: Callable[[Tensor, Norm, Linear, Linear, ForwardBatch, Tensor], Tensor]
    qkv: Callable[
        [Tensor, Norm, Linear, Norm, Norm, Rope, ForwardBatch, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
    ] = qkv_ref
    attend: Callable[[Tensor, Tensor, Tensor, ForwardBatch, Tensor, Tensor], Tensor]
    project_add: Callable[[Tensor, Tensor, Linear], Tensor] = project_add_ref
    dense: Callable[[Tensor, Norm, Linear, Linear], Tensor] = dense_ref
    route: Callable[[Tensor, Norm, Router, Tensor | None], tuple[Tensor, Tensor, Tensor]] = route_ref
    experts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, ExpertScales | None], Tensor] = experts_ref
    moe: (
        Callable[
            [Tensor, Norm, Router, Tensor | None, Tensor, Tensor, ExpertScales | None, Norm],
            tuple[Tensor, Tensor | None],
        ]
        | None
    ) = None  # in the place of route and experts; gives the next norm of its result too, or None
    norm: Callable[[Tensor, Norm], Tensor] = rms_norm_ref
    head: Callable[[Tensor, Linear], Tensor] = project_ref
    is_capturable: bool = False  # whether decode steps can be captured: no op reads what only the host knows


PACKED = Ops(conv_in=conv_in_packed, attend=attend_packed)
REFERENCE = Ops(conv_in=conv_in_ref, attend=attend_ref)
FAST = Ops(
    conv_in=conv_in,
    qkv=qkv,
    attend=attend,
    project_add=project_add,
    dense=dense,
    route=route,
    experts=experts,
    moe=moe,
    norm=rms_norm,
    head=project,
    is_capturable=True,
)
CPU = Ops(
    conv_in=cpu_conv_in,
    qkv=cpu_qkv,
    attend=cpu_attend,
    project_add=cpu_project_add,
    dense=cpu_dense,
    route=cpu_route,
    experts=cpu_experts,
    norm=cpu_norm,
)
