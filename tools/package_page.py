"""The README as a package index shows it: links and pictures that leave the page are whole addresses.

scikit-build-core calls this when it builds the package (`[[tool.dynamic-metadata]]` in pyproject.toml). The
README itself has links of the repository, which work on any forge and in any branch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "README.md"
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^\s*(```|~~~)")


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field `readme` of the project's metadata."""
    tree = f"{project['urls']['Source']}/blob/v{project['version']}"
    page = absolute_links(README.read_text(encoding="utf-8"), tree)
    return {"readme": {"content-type": "text/markdown", "text": page}}


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
