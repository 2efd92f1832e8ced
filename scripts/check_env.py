"""Check that the requirements of pyproject.toml are installed: `python scripts/check_env.py run|dev`.

Prints one line with every missing or incompatible package and exits with 1 if there is one.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def unmet(requirements: list[str]) -> list[str]:
    """Return the requirements that the running interpreter does not meet."""
    # pip is in every .venv, and has a copy of the parser.
    from pip._vendor.packaging.requirements import Requirement

    missing = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(text)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{text} (found {version})")
    return missing


def _extra(project: dict[str, Any], name: str) -> list[str]:
    """Return the requirements of an extra, including those of the extras of this project that it names."""
    requirements: list[str] = []
    for text in project["optional-dependencies"][name]:
        own = re.fullmatch(re.escape(project["name"]) + r"\[([\w,]+)\]", text)
        requirements += [part for extra in own[1].split(",") for part in _extra(project, extra)] if own else [text]
    return requirements


def main(argv: list[str] | None = None) -> None:
    """Compare pyproject.toml with what is installed."""
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    if (sys.argv[1:] if argv is None else argv) == ["dev"]:
        requirements += _extra(project, "dev")
    missing = unmet(requirements)
    if missing:
        print(f"error: missing packages: {', '.join(missing)}; install them with pip", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
