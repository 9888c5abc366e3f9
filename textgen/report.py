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

    runs = {name: read_metrics(run_dir) for name, run_dir in run_dirs.items()}
    lossless = any("train/bits_per_byte" in row for rows in runs.values() for row in rows)
    unit = "bits_per_byte" if lossless else "loss"
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for place, (name, rows) in enumerate(runs.items()):
        step_tokens = next((row["tokens"] / row["step"] for row in rows if "tokens" in row), 1)
        scale = step_tokens / 1e6 if len(runs) > 1 else 1  # runs of other batch sizes are compared by tokens
        for key, style, width in (("train", "-", 1.0), ("valid", "o-", 2.0)):
            points = [(row["step"] * scale, row[f"{key}/{unit}"]) for row in rows if f"{key}/{unit}" in row]
            if points:
                color, alpha = f"C{place}", 0.45 if key == "train" else 1.0
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=color,
                    alpha=alpha,
                    linewidth=width,
                    markersize=4,
                    label=f"{name} {key}".strip(),
                )
    axes.set(
        xlabel="million tokens" if len(runs) > 1 else "optimizer step",
        ylabel="bits per byte" if lossless else "nats per token",
    )
    axes.grid(alpha=0.3)
    bottom = [line.get_ydata()[-1] for line in axes.lines]
    if bottom:
        top = max(max(line.get_ydata()) for line in axes.lines)
        axes.set_ylim(min(bottom) - 0.1, min(top, min(bottom) + 2.0) + 0.1)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
