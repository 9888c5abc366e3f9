"""The command `dashboard`: a W&B workspace with panels in the order of a reader's questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from textgen.commands.parsing import Parser, fail
from textgen.config import DEFAULT_PROJECT, TrackingConfig
from textgen.errors import first_line
from textgen.packages import require_packages
from textgen.tracking.wandb_settings import find_mode, setting_value

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


NAME = "textgen"
"""name of the workspace"""
GOAL = "valid/bits_per_byte"
"""metric whose dependence on the settings is shown"""
SAMPLES_TABLE = "samples"
"""W&B table that the tracker fills"""


@dataclass(frozen=True)
class Panel:
    """One picture with a curve for each metric."""

    title: str
    metrics: tuple[str, ...]
    """names of metrics; one regular expression if `pattern` is set"""
    x: str = "step"
    pattern: bool = False


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Is it learning?": (
        Panel("Bits per byte", ("train/bits_per_byte", "valid/bits_per_byte")),
        Panel("Loss, nats per token", ("train/loss", "valid/loss")),
        Panel("Perplexity per token", ("train/perplexity", "valid/perplexity")),
        Panel("Bits per byte by tokens read", ("train/bits_per_byte", "valid/bits_per_byte"), x="tokens"),
        Panel("Bits per byte of each of several sources", (r"valid/bits_per_byte/[\w-]+",), pattern=True),
        Panel("Learning rate", ("train/learning_rate",)),
    ),
    "How fast?": (
        Panel("Tokens per second, all and per process",
              ("train/tokens_per_second", "train/tokens_per_second_per_process")),
        Panel("Model FLOP per second", ("train/flops_per_second",)),
        Panel("Share of the device's peak", ("train/flops_share",)),
        Panel("Share of time not spent on computing steps",
              ("train/data_share", "train/exchange_share", "train/evaluate_share", "train/save_share")),
    ),
    "Is it healthy?": (
        Panel("Gradient norm, before clipping", ("train/gradient_norm",)),
        Panel("Memory of the largest process, GiB", ("memory/peak_gib",)),
        Panel("Processors, share busy", (r"machine/\d+/cpu_share",), pattern=True),
        Panel("Memory of machines, share used", (r"machine/\d+/memory_share",), pattern=True),
        Panel("Steps skipped: float16 overflowed", ("train/skipped_steps",)),
    ),
}  # fmt: skip
"""panels by section; W&B adds panels for its own measurements of the machine"""


def dashboard_command(argv: Sequence[str]) -> None:
    """Create the dashboard in a project and print its address; with `--print`, print its specification instead."""
    parser = Parser(
        prog="textgen dashboard",
        description="Create a W&B workspace for the runs of a project. Its other workspaces are not changed.",
    )
    parser.add_argument(
        "--project",
        type=str | None,
        default=None,
        help="W&B project; default: that of W&B's own settings, else textgen",
    )
    parser.add_argument("--entity", type=str | None, default=None, help="W&B user or team; default: the key's")
    parser.add_argument("--print", action="store_true", help="print the specification as JSON and send nothing")
    args = parser.parse_args(list(argv))
    require_packages("`textgen dashboard`", "wandb-workspaces", extra="dashboard")
    project = args.project or setting_value("project") or DEFAULT_PROJECT
    if args.print:
        print(json.dumps(specification(build_workspace(project, args.entity or "")), indent=2))
        return

    import wandb

    from textgen.tracking.wandb import has_wandb_key

    if (mode := find_mode(TrackingConfig())).value == "disabled":
        fail(f"W&B is switched off by {mode.place}; `--print` needs no W&B")
    if not has_wandb_key():
        fail("no W&B key, neither from `wandb login` nor in WANDB_API_KEY; `--print` needs no key")
    try:
        workspace = build_workspace(project, args.entity or wandb.Api().default_entity)
        workspace.save()  # creates a new workspace
    except Exception as error:  # some of W&B's exception classes are private
        fail(f"W&B refused the dashboard: {first_line(error)}")
    print(workspace.url)


def build_workspace(project: str, entity: str) -> Workspace:
    """Return the dashboard of a project; needs no network.

    Args:
        project: the W&B project.
        entity: the user or team that owns it.
    """
    from wandb_workspaces.reports import v2 as reports
    from wandb_workspaces.workspaces import Section, SectionLayoutSettings, Workspace

    def line_plot(panel: Panel) -> reports.LinePlot:
        if panel.pattern:
            return reports.LinePlot(title=panel.title, x=panel.x, metric_regex=panel.metrics[0])
        return reports.LinePlot(title=panel.title, x=panel.x, y=list(panel.metrics))

    sections = [
        Section(name=name, is_open=True, panels=[line_plot(panel) for panel in panels])
        for name, panels in SECTIONS.items()
    ]
    sections += [
        Section(
            name="What does it write?",
            is_open=True,
            layout_settings=SectionLayoutSettings(columns=1, rows=1),
            panels=[reports.WeavePanelSummaryTable(table_name=SAMPLES_TABLE)],
        ),
        Section(name="Which settings matter?", panels=[reports.ParameterImportancePlot(with_respect_to=GOAL)]),
    ]
    return Workspace(entity=entity, project=project, name=NAME, sections=sections, auto_generate_panels=True)


def specification(workspace: Workspace) -> dict[str, Any]:
    """Return the JSON object that `Workspace.save` sends to W&B."""
    content: dict[str, Any] = json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return content
