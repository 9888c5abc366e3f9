"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from textgen.tracking import read_metrics


def draw_loss_curve(run_dirs: Mapping[str, Path], path: Path) -> None:
    """Draw training and validation bits per byte over steps, one colour a run, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for place, (name, run_dir) in enumerate(run_dirs.items()):
        rows = read_metrics(run_dir)
        for key, style, width in (("train", "-", 1.0), ("valid", "o-", 2.0)):
            points = [(row["step"], row[f"{key}/bits_per_byte"]) for row in rows if f"{key}/bits_per_byte" in row]
            if points:
                color, alpha = f"C{place}", 0.45 if key == "train" else 1.0
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=color,
                    alpha=alpha,
                    linewidth=width,
                    markersize=4,
                    label=f"{name} {key}",
                )
    axes.set(xlabel="optimizer step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    bottom = [line.get_ydata()[-1] for line in axes.lines]
    if bottom:
        axes.set_ylim(min(bottom) - 0.1, min(bottom) + 2.0)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
