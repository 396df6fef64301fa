"""The k largest of each row, in falling order; equal values in rising order of id.

torch.topk leaves the order of equal values open, and logits that were rounded to bf16 are full of equal values: the
kept set would depend on the device, and on whatever else the kernel does.

R rows, N values per row.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

# One sort of everything costs 5.4 ms a row at N = 65,536 on a CPU core; these two rounds make 0.11 ms of it for k = 64.
GROUP_SIZES = (64, 8)
# Length up to which torch.topk and a look for ties take a CPU less: 27 us of 85 at N = 8,192; at 65,536 127 of 110.
SMALL_ROW = 2**14


def top_k_ref(x_RN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and ids [R, k]; NaN counts as the largest value. Raises RuntimeError if k is larger than N."""
    values_RN, ids_RN = x_RN.sort(dim=1, descending=True, stable=True)
    return values_RN[:, :k], ids_RN[:, :k]


def top_k(x_RN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same as `top_k_ref`, by narrowing down to groups of neighbours first.

    Groups are contiguous, so ordering them by (largest value, first id) orders their best members by (value, id), and
    the k best values lie in the k best groups. The chosen groups are put back into the order of ids before the next
    round, so that a stable sort settles ties by id.

    Short rows on a CPU try torch.topk first: where the k + 1 largest values differ there is no order to settle.
    """
    if x_RN.device.type == "cpu" and k < x_RN.shape[1] <= SMALL_ROW:
        values_RK, best_RK = x_RN.topk(k + 1)
        if bool((values_RK[:, :-1] > values_RK[:, 1:]).all()):
            return values_RK[:, :k], best_RK[:, :k]
    ids_RN = None
    for size in GROUP_SIZES:
        if x_RN.shape[1] <= size * k:
            continue
        if remainder := x_RN.shape[1] % size:
            x_RN = pad(x_RN, (0, size - remainder), value=-torch.inf)
        best_RG = x_RN.unflatten(1, (-1, size)).amax(dim=2)
        groups_Rk = best_RG.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        columns = (groups_Rk[:, :, None] * size + torch.arange(size, device=x_RN.device)).flatten(1)
        ids_RN = columns if ids_RN is None else ids_RN.gather(1, columns)
        x_RN = x_RN.gather(1, columns)
    values_Rk, columns_Rk = top_k_ref(x_RN, k)
    return values_Rk, columns_Rk if ids_RN is None else ids_RN.gather(1, columns_Rk)
