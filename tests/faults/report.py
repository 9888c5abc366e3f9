"""Puts measured tables into docs/evidence/faults.md.

`python -m tests.faults.report` does so; no figure there is typed by hand.

Each measurement writes `benchmarks/results/faults_NAME.json`; the document has a place for it between
`<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, describe

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "evidence" / "faults.md"


def write_result(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, seconds: float) -> None:
    """Print a measured table and keep it with the command, the machine and the time it took."""
    result = {
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(), "machine": describe(), "seconds": round(seconds),
        "columns": list(columns), "rows": [list(row) for row in rows],
    }  # fmt: skip
    (RESULTS / f"faults_{name}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(render(result))


def _module() -> str:
    """Return the dotted name of the module that was started."""
    return ".".join(Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").parts)


def render(result: dict[str, Any]) -> str:
    """Return a result as a table in Markdown, with where it comes from."""
    lines = ["| " + " | ".join(result["columns"]) + " |", "|" + "---|" * len(result["columns"])]
    lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in result["rows"]]
    machine, minutes = result["machine"], result["seconds"] / 60
    lines += [
        "",
        f"`{result['command']}` at {machine['commit']}, {result['date']}, {minutes:.1f} min; {machine['processor']}, "
        f"torch {machine['torch']}.",
    ]
    return "\n".join(lines)


def rendered(text: str) -> str:
    """Return the document with every result that there is in its place."""
    for path in sorted(RESULTS.glob("faults_*.json")):
        name = path.stem.removeprefix("faults_")
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        table = render(json.loads(path.read_text())).replace("\\", "\\\\")
        text, count = place.subn(rf"\1{table}\n\2", text)
        if count != 1:
            raise SystemExit(f"`{DOCUMENT.name}` has {count} places for `{name}`")
    return text


def main() -> None:
    """Bring the document up to date."""
    DOCUMENT.write_text(rendered(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
