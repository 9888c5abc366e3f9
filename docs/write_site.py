"""Builds the documentation's site: `make docs`.

The pages in docs/ read well on a forge, so their links to other files of the repository are relative paths. A site has
only pages: this script copies the pages to build/pages, with the Markdown of `PAGES` beside them, and adapts the links.
A link to a file that is no page becomes its text. A notebook becomes a page with the outputs that are saved in it.
"""

from __future__ import annotations

import base64
import json
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
    if not path.startswith("docs/"):
        return PAGES.get(path)
    return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))


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


def notebook_page(path: Path, images: Path | None = None) -> str:
    """Return a notebook as Markdown: its texts, its code, and the outputs that are saved in it.

    Args:
        path: the notebook.
        images: folder for its pictures; None to leave them out.
    """
    parts = []
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                parts.append(f"```\n{''.join(output['text']).rstrip()}\n```")
            elif images is not None and (picture := output.get("data", {}).get("image/png")):
                name = f"{path.stem}-{number}.png"
                (images / name).write_bytes(base64.b64decode(picture))
                parts.append(f"![the picture that the code draws]({images.name}/{name})")
    return "\n\n".join(parts) + "\n"


def write_pages(folder: Path) -> None:
    """Write all pages and images into a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.py", "*.ipynb", "__pycache__"))
    sources = [str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")]
    for source in [*sources, *PAGES]:
        (folder / str(site_path(source))).write_text(adapt((ROOT / source).read_text(), source=source))
    for notebook in (ROOT / "docs").glob("*.ipynb"):
        source = str(notebook.relative_to(ROOT))
        page = notebook_page(notebook, folder / "images")
        (folder / str(site_path(source))).write_text(adapt(page, source=source))


if __name__ == "__main__":
    write_pages(ROOT / "build" / "pages")
    zensical = Path(sys.executable).with_name("zensical")
    sys.exit(subprocess.run([zensical, "build", "--strict", "--clean"], cwd=ROOT).returncode)
