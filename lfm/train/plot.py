"""A run's curves as one SVG file, drawn here: a plotting library would be a large dependency for four lines."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lfm.train.metrics import StepMetrics, format_seconds

_WIDTH, _HEIGHT, _MARGIN = 460, 220, 48
_MAX_POINTS = 800
_PANELS: tuple[tuple[str, Callable[[StepMetrics], float | None]], ...] = (
    ("loss (dots: held out)", lambda m: m.loss),
    ("learning rate", lambda m: m.learning_rate),
    ("tokens per second", lambda m: m.tokens_per_s),
    ("entropy of the expert load (1: uniform), lowest layer", lambda m: m.lowest_balance),
)


def write_plot(path: Path, metrics: Sequence[StepMetrics]) -> None:
    """Draw all steps of a run; with fewer than two there is nothing to draw, and no file."""
    if len(metrics) < 2:
        return
    held_out = [(m.step + 1, m.validation_loss) for m in metrics if m.validation_loss is not None]
    panels = [
        _panel(i, title, _points(metrics, value), dots=() if i else held_out)
        for i, (title, value) in enumerate(_PANELS)
    ]
    width, height = 2 * _WIDTH, 2 * _HEIGHT + 24
    last = metrics[-1]
    caption = f"{last.step + 1} steps, {last.tokens:,} tokens, {format_seconds(last.seconds)}"
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="{width}" height="{height}" fill="white"/>\n{"".join(panels)}'
        f'<text x="{_MARGIN}" y="{height - 8}">{caption}</text>\n</svg>\n'
    )
    path.write_text(text, encoding="utf-8")


def _points(metrics: Sequence[StepMetrics], value: Callable[[StepMetrics], float | None]) -> list[tuple[float, float]]:
    """(step, value), thinned by averaging neighbours."""
    known = [(m.step + 1, y) for m in metrics if (y := value(m)) is not None]
    size = -(-len(known) // _MAX_POINTS) or 1
    groups = [known[i : i + size] for i in range(0, len(known), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _panel(
    index: int, title: str, points: list[tuple[float, float]], *, dots: Sequence[tuple[float, float]] = ()
) -> str:
    left, top = (index % 2) * _WIDTH + _MARGIN, (index // 2) * _HEIGHT + 28
    width, height = _WIDTH - _MARGIN - 16, _HEIGHT - 60
    parts = [f'<text x="{left}" y="{top - 8}" font-weight="bold">{title}</text>\n']
    parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#bbb"/>\n')
    if points:
        first, last = points[0][0], points[-1][0]
        low, high = min(y for _, y in (*points, *dots)), max(y for _, y in (*points, *dots))
        span_x, span_y = (last - first) or 1, (high - low) or 1

        def place(x: float, y: float) -> tuple[str, str]:
            return f"{left + (x - first) / span_x * width:.1f}", f"{top + height - (y - low) / span_y * height:.1f}"

        path = " ".join(",".join(place(x, y)) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="#1f5fa8" stroke-width="1.2"/>\n')
        places = (place(x, y) for x, y in dots)
        parts.extend(f'<circle cx="{x}" cy="{y}" r="2.5" fill="#c0392b"/>\n' for x, y in places)
        parts.append(f'<text x="{left - 4}" y="{top + 9}" text-anchor="end">{_number(high)}</text>\n')
        parts.append(f'<text x="{left - 4}" y="{top + height}" text-anchor="end">{_number(low)}</text>\n')
        parts.append(f'<text x="{left}" y="{top + height + 14}">{first:,}</text>\n')
        parts.append(f'<text x="{left + width}" y="{top + height + 14}" text-anchor="end">{last:,}</text>\n')
    return "".join(parts)


def _number(value: float) -> str:
    return f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.1f}k" if value >= 1e4 else f"{value:.3g}"
