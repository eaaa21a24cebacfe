"""Charts as inline SVG: no library in the page, colours by CSS (so that light and dark need one drawing), and behind
each chart the table of its numbers."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40  # room for the numbers of the axes and their labels
MAX_TABLE_ROWS = 80
NUM_COLOURS = 6  # of the style sheet: .s0 to .s5


@dataclass(frozen=True)
class Series:
    """One line, or one set of points, of a chart; values that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "line"  # line; dots: a line with points to touch; points; step: edges (N + 1) and heights (N)
    low: Sequence[float] | None = None  # a band around the line
    high: Sequence[float] | None = None
    colour: int | None = None  # default: its place
    labels: Sequence[str] | None = None  # of the points


def chart(
    title: str, x_label: str, y_label: str, series: Sequence[Series], note: str = "", diagonal: bool = False
) -> str:
    """A figure with axes, a legend where there are several series, and a table. "" where there is nothing to draw.

    ``x_label`` and ``y_label`` hold the unit. ``diagonal`` draws y = x.
    """
    drawn = [s for s in series if any(map(math.isfinite, s.y))]
    if not drawn:
        return ""
    xs = [x for s in drawn for x in s.x]
    ys = [y for s in drawn for y in [*s.y, *(s.low or []), *(s.high or [])] if math.isfinite(y)]
    if any(s.kind == "step" for s in drawn):
        ys.append(0.0)
    plot = _Axes(_range(xs), _range(ys))
    parts = [plot.grid(x_label, y_label)]
    if diagonal:
        low, high = max(plot.x[0], plot.y[0]), min(plot.x[1], plot.y[1])
        parts.append(f'<path class="ideal" d="M{plot.at(low, low)}L{plot.at(high, high)}"/>')
    for place, each in enumerate(drawn):
        parts.append(plot.draw(each, f"s{(place if each.colour is None else each.colour) % NUM_COLOURS}"))
    names = ", ".join(s.name for s in drawn)
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(title)}: {_text(names)}">'
        f"{''.join(parts)}</svg>"
    )
    legend = ""
    if len(drawn) > 1:
        keys = (s.colour if s.colour is not None else i for i, s in enumerate(drawn))
        legend = "".join(
            f'<span><i class="s{key % NUM_COLOURS}"></i>{_text(s.name)}</span>'
            for key, s in zip(keys, drawn, strict=True)
        )
        legend = f'<div class="legend">{legend}</div>'
    note = f"<p class='quiet'>{_text(note)}</p>" if note else ""
    return (
        f"<figure><figcaption>{_text(title)}</figcaption>{svg}{legend}{note}"
        f"<details><summary>the numbers</summary>{_numbers(x_label, y_label, drawn)}</details></figure>"
    )


def histogram(title: str, x_label: str, groups: Sequence[tuple[str, Sequence[float]]], num_bins: int = 24) -> str:
    """The distributions of several groups over common bins, as shares of each group's values."""
    given = [(name, [v for v in values if math.isfinite(v)]) for name, values in groups]
    given = [(name, values) for name, values in given if values]
    everything = [v for _, values in given for v in values]
    if not everything:
        return ""
    low, high = min(everything), max(everything)
    if low == high:
        low, high = low - 0.5, high + 0.5
    if all(v == int(v) for v in everything):  # counts: bins of whole numbers
        width = max(1, math.ceil((high - low + 1) / num_bins))
        num_bins = math.ceil((high - low + 1) / width)
        edges = [low + i * width for i in range(num_bins + 1)]
    else:
        edges = [low + (high - low) * i / num_bins for i in range(num_bins + 1)]
    series = []
    for name, values in given:
        counts = [0] * num_bins
        for v in values:
            counts[min(int((v - edges[0]) / (edges[1] - edges[0])), num_bins - 1)] += 1
        mean = sum(values) / len(values)
        label = f"{name}: mean {mean:.3g} (n = {len(values)})"
        series.append(Series(label, edges, [c / len(values) for c in counts], "step"))
    return chart(title, x_label, "share of the answers", series)


class _Axes:
    """From values to places on the drawing."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self.x, self.y = x, y

    def px(self, value: float) -> float:
        return LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)

    def at(self, x: float, y: float) -> str:
        return f"{self.px(x):.1f},{self.py(y):.1f}"

    def grid(self, x_label: str, y_label: str) -> str:
        parts = []
        for value in ticks(*self.y):
            y = f"{self.py(value):.1f}"
            parts.append(f'<path class="grid" d="M{LEFT},{y}H{WIDTH - RIGHT}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 6}" y="{y}" dy=".32em" text-anchor="end">{_short(value)}</text>'
            )
        for value in ticks(*self.x):
            x = f"{self.px(value):.1f}"
            parts.append(
                f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_short(value)}</text>'
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{_text(x_label)}</text>')
        centre = (TOP + HEIGHT - BOTTOM) / 2
        turned = f'transform="translate(12 {centre}) rotate(-90)" text-anchor="middle"'
        parts.append(f'<text class="label" {turned}>{_text(y_label)}</text>')
        return "".join(parts)

    def draw(self, series: Series, colour: str) -> str:
        if series.kind == "step":
            return self._steps(series, colour)
        points = [(x, y, i) for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)) if math.isfinite(y)]
        parts = []
        if series.low is not None and series.high is not None:
            band = [i for _, _, i in points if math.isfinite(series.low[i]) and math.isfinite(series.high[i])]
            top = [self.at(series.x[i], series.high[i]) for i in band]
            bottom = [self.at(series.x[i], series.low[i]) for i in reversed(band)]
            if top:
                parts.append(f'<path class="band {colour}" d="M{"L".join(top + bottom)}Z"/>')
        if series.kind != "points":
            parts.append(f'<path class="line {colour}" d="M{"L".join(self.at(x, y) for x, y, _ in points)}"/>')
        if series.kind != "line" or len(points) == 1:
            for x, y, i in points:
                label = series.labels[i] if series.labels else f"{series.name}: {_short(x)}, {_short(y)}"
                place = f'cx="{self.px(x):.1f}" cy="{self.py(y):.1f}"'
                parts.append(f'<circle class="{colour}" {place} r="3.2"><title>{_text(label)}</title></circle>')
        return "".join(parts)

    def _steps(self, series: Series, colour: str) -> str:
        path = f"M{self.at(series.x[0], 0)}"
        for left, right, height in zip(series.x, series.x[1:], series.y, strict=False):
            path += f"L{self.at(left, height)}L{self.at(right, height)}"
        path += f"L{self.at(series.x[-1], 0)}"
        return f'<path class="band {colour}" d="{path}Z"/><path class="line {colour}" d="{path}"/>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``, about ``count`` of them."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where the screen is narrow; a column in which nothing stands is left out."""
    kept = [i for i, name in enumerate(header) if any(row[i] for row in rows) or not rows]
    header, rows = [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
    head = "".join(f"<th scope='col'>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide' tabindex='0'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _numbers(x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """What the chart shows, evenly thinned out where it is long."""
    if series[0].kind == "step":
        rows = [
            [f"{_short(left)} to {_short(right)}", *(_short(s.y[i]) for s in series)]
            for i, (left, right) in enumerate(zip(series[0].x, series[0].x[1:], strict=False))
        ]
        return table_html([x_label, *(s.name for s in series)], rows)
    columns = [dict(zip(s.x, s.y, strict=True)) for s in series]
    places = sorted(set().union(*columns))
    stride = -(-len(places) // MAX_TABLE_ROWS)
    kept = places[::stride] + ([places[-1]] if (len(places) - 1) % stride else [])
    rows = [[_short(x), *(_short(column[x]) if x in column else "" for column in columns)] for x in kept]
    names = [s.name if len(series) > 1 else y_label for s in series]
    thin = (
        f"<p class='quiet'>every {stride}th of {len(places)} rows; all are in metrics.jsonl</p>" if stride > 1 else ""
    )
    return table_html([x_label, *names], rows) + thin


def _range(values: Sequence[float]) -> tuple[float, float]:
    """With a little room on both sides; of a constant some around it."""
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    room = (high - low) * 0.04
    return low - (0.0 if low == 0 else room), high + room


def _short(value: float) -> str:
    if not math.isfinite(value):
        return ""
    if value == int(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.4g}"


def _text(text: str) -> str:
    return html.escape(text)
