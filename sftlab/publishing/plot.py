"""The loss plot: training and validation loss by step, as an SVG that needs no plotting library and no script."""

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 44, 48
SMOOTHED = 200  # with at least this many losses, a running mean is drawn over them because they are noisy
TRAIN, VAL, INK, GRID = "#2563eb", "#dc6803", "#1f2937", "#e5e7eb"

Point = tuple[float, float]


def loss_plot(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the plot of a run's metrics.jsonl; None if it holds no loss."""
    train = points(lines, "train/loss")
    val = points(lines, "val/loss")
    if not train and not val:
        return None
    both = train + val
    last = max(x for x, _ in both)
    # The loss before training may be many times the final one; the scale is then logarithmic.
    high, low = max(y for _, y in both), min(y for _, y in both)
    log = low > 0 and high / low > 5
    ys = (log_ticks if log else ticks)(low, high)
    bottom, top = min(low, ys[0]), max(high, ys[-1])

    def place(point: Point) -> Point:
        share = part(point[1], bottom, top, log)
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / (last or 1)
        return round(x, 1), round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    body = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place((0, y))[1]}" y2="{place((0, y))[1]}" stroke="{GRID}"/>'
        f'<text x="{LEFT - 10}" y="{place((0, y))[1] + 4}" text-anchor="end">{y:g}</text>'
        for y in ys
    ]
    body += [
        f'<text x="{place((x, bottom))[0]}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{x:,.0f}</text>'
        for x in ticks(0, last)
        if x <= last and x == int(x)
    ]
    long = len(train) >= SMOOTHED
    body.append(line([place(p) for p in train], TRAIN, 1.0 if long else 2.0, 0.35 if long else 1.0))
    if long:
        body.append(line([place(p) for p in smooth(train, len(train) // 50)], TRAIN, 2.2, 1.0))
    body.append(line([place(p) for p in val], VAL, 2.0, 1.0))
    body += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{VAL}"/>' for x, y in map(place, val)]
    names = [("training", TRAIN)] * bool(train) + [("validation", VAL)] * bool(val)
    for i, (name, color) in enumerate(names):
        x = LEFT + 110 * i
        body.append(f'<line x1="{x}" x2="{x + 22}" y1="22" y2="22" stroke="{color}" stroke-width="3"/>')
        body.append(f'<text x="{x + 29}" y="26">{escape(name)}</text>')
    body.append(f'<text x="{WIDTH - RIGHT}" y="26" text-anchor="end">loss, nats per target{", log" * log}</text>')
    body.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">optimiser step</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}" role="img">'
        f"<title>Loss by optimiser step</title>"
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff"/>' + "\n".join(body) + "</svg>\n"
    )


def points(lines: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """Return (step, value) of the lines that have a finite value."""
    return [(float(m["step"]), float(m[key])) for m in lines if key in m and math.isfinite(m[key])]


def line(at: Sequence[Point], color: str, width: float, opacity: float) -> str:
    """Return a line through points."""
    path = " ".join(f"{x},{y}" for x, y in at)
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" stroke-opacity="{opacity}" '
        'stroke-linejoin="round"/>'
    )


def smooth(values: Sequence[Point], window: int) -> list[Point]:
    """Return the running mean over the last `window` values."""
    out, total = [], 0.0
    for i, (x, y) in enumerate(values):
        total += y - (values[i - window][1] if i >= window else 0.0)
        out.append((x, total / min(i + 1, window)))
    return out


def part(value: float, low: float, high: float, log: bool) -> float:
    """Return where a value lies between two others, from 0 to 1."""
    if high == low:
        return 0.5
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Return round numbers from one at or below `low` to one at or above `high`."""
    raw = (high - low or abs(high) or 1.0) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999) * power
    first, final = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, final + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten around two values; only the powers of ten if there are more than 4."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    found = [round(m * 10.0**d, 12) for d in decades for m in factors]
    first = max((i for i, v in enumerate(found) if v <= low), default=0)
    final = min((i for i, v in enumerate(found) if v >= high), default=len(found) - 1)
    return found[first : final + 1]
