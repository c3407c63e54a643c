"""The links of the package, and the README as a package index shows it, with whole addresses in it.

scikit-build-core calls this when it builds the package (`[[tool.dynamic-metadata]]` in pyproject.toml). The
README itself has links of the repository, which work on any forge and in any branch. The address of the
repository is written down nowhere: a release has that of the workflow which makes it. A package that is built
from a clone has no links, rather than some that lead to a stranger.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^\s*(```|~~~)")


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields `readme` and `urls` of the project's metadata."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    urls = {}
    if source := source_address(os.environ):
        tree = f"{source}/blob/v{project['version']}"
        page = absolute_links(page, tree)
        urls = {
            "Documentation": f"{tree}/docs/index.md",
            "Source": source,
            "Issues": f"{source}/issues",
            "Changelog": f"{tree}/CHANGELOG.md",
        }
    return {"readme": {"content-type": "text/markdown", "text": page}, "urls": urls}


def source_address(environment: Mapping[str, str], folder: Path = ROOT) -> str:
    """Return the address of the repository; empty if nobody knows it.

    The workflow of a release has it in its environment, and its source distribution among its metadata.
    """
    server, repository = (environment.get(f"GITHUB_{name}", "") for name in ("SERVER_URL", "REPOSITORY"))
    if server and repository:
        return f"{server}/{repository}"
    metadata = folder / "PKG-INFO"
    known = metadata.read_text(encoding="utf-8") if metadata.is_file() else ""
    found = re.search(r"^Project-URL: Source, (\S+)$", known.partition("\n\n")[0], re.MULTILINE)
    return found[1] if found else ""


def absolute_links(page: str, tree: str) -> str:
    """Return a Markdown page of the repository's root with its relative links below `tree`."""

    def link(match: re.Match[str]) -> str:
        begin, target, end = match.groups()
        return match[0] if re.match(r"[a-z]+:|#|/", target) else f"{begin}{tree}/{target}{end}"

    lines, code = [], False
    for line in page.split("\n"):
        code ^= bool(_FENCE.match(line))
        lines.append(line if code else _LINK.sub(link, line))
    return "\n".join(lines)
