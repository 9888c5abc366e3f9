"""Packages that may be missing, and the commands that install them.

textgen is on no index, and `textgen` on PyPI is another project: no command of a message names it.
"""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from textgen.errors import TextgenError, in_backticks

HOME = Path(__file__).resolve().parents[1]
"""the checkout; of an installed wheel, the folder of all packages"""


def require_packages(what: str, *packages: str, extra: str | None) -> None:
    """Raise TextgenError if optional packages are missing.

    Args:
        what: needs them: a command or a setting, as the message names it.
        packages: their names on an index; a module has the same name, with `_` for `-`.
        extra: the extra of pyproject.toml that has them; None for requirements of textgen.
    """
    if missing := [name for name in packages if find_spec(name.replace("-", "_")) is None]:
        raise TextgenError(f"{what} needs {in_backticks(missing)}: {how_to_install(*packages, extra=extra)}")


def how_to_install(*packages: str, extra: str | None = None, home: Path = HOME) -> str:
    """Return the command that installs packages: in a checkout by their extra, elsewhere by their names and versions.

    Args:
        packages: their names on an index.
        extra: the extra of pyproject.toml that has them; None for requirements of textgen.
        home: the checkout, if there is one.
    """
    if (home / "pyproject.toml").is_file():
        return f"run `pip install -e '.[{extra}]'` in `{home}`" if extra else f"run `pip install -e .` in `{home}`"
    try:
        requirements = [line.partition(";")[0].strip() for line in metadata.requires("textgen") or ()]
    except metadata.PackageNotFoundError:
        requirements = []
    versions = {re.split(r"[^\w.-]", line)[0]: line for line in requirements}
    return f"run `pip install {' '.join(repr(versions.get(name, name)) for name in packages)}`"


def foreign_version() -> str | None:
    """Return the version of the other project if that one is installed as `textgen`; None if it is not."""
    try:
        installed = metadata.distribution("textgen")
    except metadata.PackageNotFoundError:
        return None
    return None if any(point.value == "textgen.cli:main" for point in installed.entry_points) else installed.version
