"""Curves and ticks as places in a plot whose sides are 1,000 long; a page can stretch the plot to any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SIDE = 1000
MOST_POINTS = 1200  # drawn of a curve: more than a page has pixels in a row

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of one run."""

    run: int
    """index of the run, which decides the colour"""
    points: Sequence[Point]
    dots: bool = False
    """whether each point is marked and shows its value, as for the few points of validations"""


@dataclass(frozen=True)
class ReferenceLine:
    """A known value to compare with, drawn as a horizontal line."""

    value: float
    name: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over one axis, with the ranges of both axes."""

    title: str
    unit: str
    x_name: str
    x_range: Point
    y_range: Point
    curves: Sequence[Curve]
    references: Sequence[ReferenceLine] = ()

    @property
    def has_dots(self) -> bool:
        """Whether a curve has dots; the other curves are drawn thin then."""
        return any(curve.dots for curve in self.curves)

    @property
    def top(self) -> float:
        """The highest value of all curves, which may be above the range."""
        return max(y for curve in self.curves for _, y in curve.points)

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Place from the left and text of each tick of the x axis."""
        return [(self.x(value), text) for value, text in ticks(*self.x_range)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Place from the bottom and text of each tick of the y axis."""
        return [(SIDE - self.y(value), text) for value, text in ticks(*self.y_range)]

    def x(self, value: float) -> float:
        """Return the place of an x value, from the left."""
        low, high = self.x_range
        return round((value - low) / (high - low) * SIDE, 2)

    def y(self, value: float) -> float:
        """Return the place of a y value, from the top."""
        low, high = self.y_range
        return round((high - value) / (high - low) * SIDE, 2)

    def path(self, curve: Curve) -> str:
        """Return a curve as the attribute `points` of an SVG polyline."""
        return " ".join(f"{self.x(x):.7g},{self.y(y):.7g}" for x, y in thin(curve.points))


def make_chart(
    title: str,
    unit: str,
    x_name: str,
    curves: Sequence[Curve],
    *,
    references: Sequence[ReferenceLine] = (),
    y_min: float | None = None,
    y_span: float = math.inf,
) -> Chart | None:
    """Return a chart with fitting ranges; None if no curve has points.

    Args:
        title: name of the y values.
        unit: of the y values.
        x_name: name of the x values.
        curves: some may be empty.
        references: the y range includes all of them.
        y_min: lower end of the y range; None to fit it to the curves.
        y_span: the y range ends at most this far above the lowest last value of a curve. The curves are cut off above
            it, as the first losses of a training are.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    fixed = [reference.value for reference in references]
    last = [curve.points[-1][1] for curve in curves]
    low = min([*ys, *fixed]) if y_min is None else y_min
    high = max([min(max(ys), min(last) + y_span), *fixed])
    # The ranges of both axes must not be empty: a single point, or a constant, gets some space around it.
    pad = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    x_low, x_high = (min(xs), max(xs)) if min(xs) != max(xs) else (min(xs) - 1, max(xs) + 1)
    return Chart(
        title=title,
        unit=unit,
        x_name=x_name,
        x_range=(0 if 0 < x_low < 0.2 * x_high else x_low, x_high),
        y_range=(low - pad if y_min is None else low, high + pad),
        curves=curves,
        references=references,
    )


def ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """Return about `count` round values of a range, and their texts: 1,200, 0.25, 12k, 3.5M, 2e-05."""
    # The step is 1, 2 or 5 times a power of ten.
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
    values = [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    largest = max(abs(low), abs(high))
    # One letter for all ticks; the digits tell neighbours apart.
    sizes = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    size, letter = next(((size, letter) for least, size, letter in sizes if largest >= least), (1.0, ""))
    digits = max(0, -math.floor(math.log10(step / size) + 1e-9))
    return [
        (value, "0" if value == 0 else f"{value:.3g}" if digits > 4 else f"{value / size:,.{digits}f}{letter}")
        for value in values
    ]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most about `most` points: the first, the last, and the lowest and highest of each stretch between."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        indices = range(start, min(start + stretch, len(points)))
        kept |= {min(indices, key=lambda i: points[i][1]), max(indices, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]
