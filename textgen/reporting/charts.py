"""Curves as points and ticks of a plot whose sides are 1,000 long; what draws them can stretch it to any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SIDE = 1000
MOST_POINTS = 1200  # of a curve: more than a screen has pixels

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of one run."""

    run: int
    """its place among the runs, which decides its colour"""
    points: Sequence[Point]
    dots: bool = False
    """few and precious: each is marked, and tells its value"""


@dataclass(frozen=True)
class Rung:
    """A value known from elsewhere, drawn as a line from side to side."""

    value: float
    name: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over one axis, with the range that is shown of both."""

    title: str
    unit: str
    x_name: str
    x_range: Point
    y_range: Point
    curves: Sequence[Curve]
    rungs: Sequence[Rung] = ()

    @property
    def has_dots(self) -> bool:
        """Whether some curve is more to be seen than others."""
        return any(curve.dots for curve in self.curves)

    @property
    def top(self) -> float:
        """The highest value of all curves."""
        return max(y for curve in self.curves for _, y in curve.points)

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Where ticks are, in the plot, and what they say."""
        return [(self.x(value), text) for value, text in ticks(*self.x_range)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """The same of the other axis, from its lower end on."""
        return [(SIDE - self.y(value), text) for value, text in ticks(*self.y_range)]

    def x(self, value: float) -> float:
        """Return a place from the left."""
        low, high = self.x_range
        return round((value - low) / (high - low) * SIDE, 2)

    def y(self, value: float) -> float:
        """Return a place from the top."""
        low, high = self.y_range
        return round((high - value) / (high - low) * SIDE, 2)

    def path(self, curve: Curve) -> str:
        """Return a curve as `points` of an SVG polyline."""
        return " ".join(f"{self.x(x):.7g},{self.y(y):.7g}" for x, y in thin(curve.points))


def make_chart(
    title: str,
    unit: str,
    x_name: str,
    curves: Sequence[Curve],
    *,
    rungs: Sequence[Rung] = (),
    least: float | None = None,
    most: float = math.inf,
) -> Chart | None:
    """Return a chart whose ranges hold what is to be seen; None where no curve has points.

    Args:
        title: what is measured.
        unit: of it.
        x_name: of the other axis.
        curves: some may be empty.
        rungs: all of them are seen.
        least: lower end of the range, if it is not to be chosen.
        most: how far the range goes at most beyond the lowest end of a curve; what is above is cut off, as the first
            losses of a training are.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    fixed = [rung.value for rung in rungs]
    ends = [curve.points[-1][1] for curve in curves]
    low = min([*ys, *fixed]) if least is None else least
    high = max([min(max(ys), min(ends) + most), *fixed])
    pad = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    x_low, x_high = (min(xs), max(xs)) if min(xs) != max(xs) else (min(xs) - 1, max(xs) + 1)
    return Chart(
        title=title, unit=unit, x_name=x_name, x_range=(0 if 0 < x_low < 0.2 * x_high else x_low, x_high),
        y_range=(low - pad if least is None else low, high + pad), curves=curves, rungs=rungs,
    )  # fmt: skip


def ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """Return round values between two, about `count`, and how they are written: 1,200, 0.25, 12k, 3.5M, 2e-05."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
    values = [place * step for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    largest = max(abs(low), abs(high))
    sizes = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    size, letter = next(((size, letter) for least, size, letter in sizes if largest >= least), (1.0, ""))
    digits = max(0, -math.floor(math.log10(step / size) + 1e-9))
    return [
        (value, "0" if value == 0 else f"{value:.3g}" if digits > 4 else f"{value / size:,.{digits}f}{letter}")
        for value in values
    ]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return some of many points: first and last, and of each stretch in between the lowest and the highest."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        places = range(start, min(start + stretch, len(points)))
        kept |= {min(places, key=lambda i: points[i][1]), max(places, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]
