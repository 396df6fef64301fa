"""Chi-square limits without scipy."""

import math


def chi_square_limit(degrees: int, *, deviations: float = 5.0) -> float:
    """The value that a chi-square number exceeds as rarely as a normal one exceeds `deviations` (Wilson-Hilferty)."""
    share = 2 / (9 * degrees)
    return degrees * (1 - share + deviations * math.sqrt(share)) ** 3
