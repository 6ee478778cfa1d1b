"""Line and bar plots as SVG, written by hand: one file, no library, sharp at any size."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 520, 64, 180, 44, 52
COLOURS = (
    "#d62728 #1f77b4 #2ca02c #ff7f0e #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf #393b79 #637939 #843c39 #7b4173 #000000 "
    "#5254a3 #8ca252 #bd9e39".split()
)
SHADES = "#1f6fa8 #d1662a #3b8f57 #8a6fb0 #7f7f7f #b0485a".split()

Point = tuple[float, float, float, float]
"""x, y, and the ends of y's interval."""


def line_plot(
    file: Path, lines: Mapping[str, Sequence[Point]], title: str, x_label: str, y_label: str, dashed: Collection[str] = ()
) -> None:
    """A line a name, with its interval as a bar at every point. dashed: names that the others are compared with."""
    points = np.array([point for line in lines.values() for point in line])
    x_ticks, y_ticks = (_ticks(values.min(), values.max()) for values in (points[:, 0], points[:, 1:]))

    def x(value: float) -> float:
        return LEFT + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 24, title, more='font-size="15"'),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label),
        _text(18, HEIGHT / 2, y_label, more=f'transform="rotate(-90 18 {HEIGHT / 2})"'),
    ]
    for tick in x_ticks:
        parts.append(f'<path d="M{x(tick):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}"))
    for tick in y_ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, y(tick) + 4, f"{tick:g}", "end"))
    # From the best down, so that the names stand in the order of the lines.
    order = sorted(lines, key=lambda name: -np.mean([point[1] for point in lines[name]]))
    for index, name in enumerate(order):
        colour, line = COLOURS[index % len(COLOURS)], sorted(lines[name])
        dashes = ' stroke-dasharray="6 4"' if name in dashed else ""
        path = "L".join(f"{x(px):.1f} {y(py):.1f}" for px, py, _, _ in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        for px, py, low, high in line:
            parts.append(f'<path d="M{x(px):.1f} {y(low):.1f}V{y(high):.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="3.5" fill="{colour}"/>')
        row = TOP + 12 + 22 * index
        parts.append(f'<path d="M{WIDTH - RIGHT + 14} {row - 4}h22" stroke="{colour}" stroke-width="3"{dashes}/>')
        parts.append(_text(WIDTH - RIGHT + 42, row, name, "start"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([*parts, "</svg>"]) + "\n")


BAR, GAP, LETTER = 20, 10, 7
"""Of a bar plot, in pixels: the height of a bar, the space below it, and the width of what it is called."""


def bar_plot(file: Path, bars: Mapping[str, Mapping[str, float]], title: str, totals: Mapping[str, str]) -> None:
    """A bar a name, divided as its parts are, all of one length. totals: what stands behind each bar."""
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    names = LETTER * max(map(len, bars)) + 10
    width, top = WIDTH - names - 120, TOP + 30
    height = top + len(bars) * (BAR + GAP) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(WIDTH / 2, 24, title, more='font-size="15"'),
    ]
    for index, part in enumerate(parts):
        at = names + index * width / len(parts)
        lines.append(f'<rect x="{at:.1f}" y="{TOP}" width="12" height="12" fill="{SHADES[index % len(SHADES)]}"/>')
        lines.append(_text(at + 18, TOP + 11, part, "start"))
    for row, (name, bar) in enumerate(bars.items()):
        y, at, whole = top + row * (BAR + GAP), float(names), sum(bar.values())
        lines.append(_text(names - 10, y + 15, name, "end"))
        for part, value in bar.items():
            size = width * value / whole
            shade = SHADES[parts.index(part) % len(SHADES)]
            lines.append(f'<rect x="{at:.1f}" y="{y}" width="{size:.1f}" height="{BAR}" fill="{shade}"/>')
            if size > 40:
                lines.append(_text(at + size / 2, y + 15, f"{value / whole:.0%}", more='fill="white"'))
            at += size
        lines.append(_text(names + width + 10, y + 15, totals[name], "start"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([*lines, "</svg>"]) + "\n")


def _text(at_x: int | float, at_y: int | float, what: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}" {more}>{escape(what)}</text>'


def _ticks(low: float, high: float) -> np.ndarray:
    """Round numbers from below `low` to above `high`."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 6
    unit = 10.0 ** np.floor(np.log10(rough))
    step = unit * min((m for m in (1, 2, 5, 10) if m * unit >= rough), default=10)
    return np.arange(np.floor(low / step), np.ceil(high / step) + 1) * step
