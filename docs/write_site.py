"""Builds the documentation's site: `make docs`.

The pages in docs/ read well on a forge, so their links to other files of the repository are relative paths. A site has
only pages: this script copies the pages to build/pages, with the Markdown of `PAGES` beside them, and adapts the links.
A link to a file that is no page becomes its text.
"""

from __future__ import annotations

import os.path
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Markdown outside of docs/ that is a page too, and its place among the pages.
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "launch/README.md": "launch.md"}


def site_path(path: str) -> str | None:
    """Return the place of a file of the repository among the pages; None if it has none."""
    return path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path)


def adapt(text: str, *, source: str) -> str:
    """Return a page with the links that it needs in the site.

    Args:
        text: the Markdown of the page.
        source: the page's path in the repository.
    """
    here = os.path.dirname(site_path(source) or "")

    def link(found: re.Match[str]) -> str:
        label, target = found.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or "://" in target:
            return found[0]
        place = site_path(os.path.normpath(os.path.join(os.path.dirname(source), path)))
        return f"[{label}]({os.path.relpath(place, here or '.')}{hash_sign}{anchor})" if place else label

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def write_pages(folder: Path) -> None:
    """Write all pages and images into a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    sources = [str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")]
    for source in [*sources, *PAGES]:
        (folder / str(site_path(source))).write_text(adapt((ROOT / source).read_text(), source=source))


if __name__ == "__main__":
    write_pages(ROOT / "build" / "pages")
    zensical = Path(sys.executable).with_name("zensical")
    sys.exit(subprocess.run([zensical, "build", "--strict", "--clean"], cwd=ROOT).returncode)
