"""The verb `dashboard`: a W&B workspace as code, its panels in the order in which a person asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from textgen.commands.parsing import Parser, fail
from textgen.config import TrackingConfig

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


NAME = "textgen"

GOAL = "valid/bits_per_byte"
SAMPLES_TABLE = "samples"


@dataclass(frozen=True)
class Panel:
    """Curves of metrics in one picture."""

    title: str
    metrics: tuple[str, ...]
    """names, or one regular expression where `pattern` is set"""
    x: str = "step"
    pattern: bool = False


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Is it learning?": (
        Panel("Bits per byte", ("train/bits_per_byte", "valid/bits_per_byte")),
        Panel("Loss, nats per token", ("train/loss", "valid/loss")),
        Panel("Perplexity per token", ("train/perplexity", "valid/perplexity")),
        Panel("Bits per byte by tokens read", ("train/bits_per_byte", "valid/bits_per_byte"), x="tokens"),
        Panel("Learning rate", ("train/learning_rate",)),
    ),
    "How fast?": (
        Panel("Tokens per second, all and per process",
              ("train/tokens_per_second", "train/tokens_per_second_per_process")),
        Panel("Model FLOP per second", ("train/flops_per_second",)),
        Panel("Share of the device's peak", ("train/flops_share",)),
        Panel("Share of time not spent on steps",
              ("train/data_share", "train/evaluate_share", "train/save_share")),
    ),
    "Is it healthy?": (
        Panel("Gradient norm, before clipping", ("train/gradient_norm",)),
        Panel("Memory of the largest process, GiB", ("memory/peak_gib",)),
        Panel("Processors, share busy", (r"machine/\d+/cpu_share",), pattern=True),
        Panel("Memory of machines, share used", (r"machine/\d+/memory_share",), pattern=True),
        Panel("Steps skipped: float16 overflowed", ("train/skipped_steps",)),
    ),
}  # fmt: skip
"""panels of each section; W&B makes others for what it measures itself"""


def dashboard_command(argv: Sequence[str]) -> None:
    """Create the dashboard in a project, or print what would be sent."""
    parser = Parser(
        prog="textgen dashboard",
        description="Create a W&B workspace for the runs of a project, beside those that it has.",
    )
    parser.add_argument("--project", default=TrackingConfig.project, help="project of W&B")
    parser.add_argument("--entity", type=str | None, default=None, help="user or team; default: that of the key")
    parser.add_argument("--print", action="store_true", help="print the specification as JSON, and send nothing")
    args = parser.parse_args(list(argv))
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        fail("the package wandb-workspaces is not installed: `pip install 'textgen[dashboard]'`")
    if args.print:
        print(json.dumps(specification(build_workspace(args.project, args.entity or "")), indent=2))
        return

    import wandb

    from textgen.tracking.wandb import has_wandb_key

    if not has_wandb_key():
        fail("there is no W&B key, by `wandb login` or in WANDB_API_KEY; `--print` takes none")
    try:
        workspace = build_workspace(args.project, args.entity or wandb.Api().default_entity)
        workspace.save()  # as a new one
    except Exception as error:  # some kinds of W&B's are private
        fail(f"W&B did not take the dashboard: {str(error).partition(chr(10))[0]}")
    print(workspace.url)


def build_workspace(project: str, entity: str) -> Workspace:
    """Return the dashboard; needs no network."""
    from wandb_workspaces.reports import v2 as reports
    from wandb_workspaces.workspaces import Section, SectionLayoutSettings, Workspace

    sections = [
        Section(
            name=name, is_open=True,
            panels=[
                reports.LinePlot(title=panel.title, x=panel.x, metric_regex=panel.metrics[0]) if panel.pattern
                else reports.LinePlot(title=panel.title, x=panel.x, y=list(panel.metrics))
                for panel in panels
            ],
        )
        for name, panels in SECTIONS.items()
    ]  # fmt: skip
    sections += [
        Section(
            name="What does it write?", is_open=True, layout_settings=SectionLayoutSettings(columns=1, rows=1),
            panels=[reports.WeavePanelSummaryTable(table_name=SAMPLES_TABLE)],
        ),
        Section(name="Which settings matter?", panels=[reports.ParameterImportancePlot(with_respect_to=GOAL)]),
    ]  # fmt: skip
    return Workspace(entity=entity, project=project, name=NAME, sections=sections, auto_generate_panels=True)


def specification(workspace: Workspace) -> dict[str, Any]:
    """Return what W&B is sent."""
    sent: dict[str, Any] = json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return sent
