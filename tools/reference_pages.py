"""Additions to docs/ when MkDocs builds the site: pages made from code, and links as GitHub reads them.

A hook of mkdocs.yml. The routes come from the OpenAPI file of the app, which is put together here without a
server, a base or a port. The settings are those of `onebase serve`'s own parser, and the codes of errors are
the protocol's; their pages are kept in docs/, where the forge shows them, and this file run as a program
writes them.
"""

from __future__ import annotations

import argparse
import json
import logging
import posixpath
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fastapi.routing import APIRoute
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("engine", "server", "adapters", "clients/python")]

from onebase_edge.settings import Settings, environment_name, setting_fields  # noqa: E402
from onebase_protocol.errors import ERROR_CODES  # noqa: E402
from onebase_server.app.cli import serve_parser  # noqa: E402
from onebase_server.http.app import create_app  # noqa: E402
from onebase_server.http.authorization import access_of  # noqa: E402
from onebase_server.http.deps import Services  # noqa: E402
from onebase_server.http.openapi import ANY, KEYED  # noqa: E402

Json = dict[str, Any]

JSON_TYPE = "application/json"
EVERYWHERE = ANY | KEYED
"""Statuses of errors that most routes may send."""
ROUTES = {
    "text": (
        "Text",
        {
            "generate": "OneBase's own",
            "openai": "OpenAI's",
            "anthropic": "Anthropic's",
            "tgi": "TGI's",
        },
    ),
    "reading": ("Vectors, classes, scores", {"pooling": "Texts that are read"}),
    "adapters": (
        "Adapters",
        {"adapters": "Adapters and versions", "gates": "Gates", "feedback": "Feedback", "vllm": "vLLM's"},
    ),
    "training": (
        "Training, batches, files",
        {"training": "Jobs", "batches": "Batches", "files": "Files", "tinker": "The Tinker API's"},
    ),
    "access": (
        "Keys, quotas, usage, audit",
        {"keys": "Keys", "usage": "Quotas and usage", "audit": "Audit", "request log": "The log of requests"},
    ),
    "server": ("The server itself", {"health": "Health"}),
}
"""Pages of routes: the name, the title, and the OpenAPI file's tags that are on it, with their titles."""

ELSEWHERE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "examples.md": "examples/README.md",
    "benchmarks.md": "benchmarks/README.md",
}
"""Pages of the site that are kept outside docs/, and where."""

_log = logging.getLogger("mkdocs.hooks")
_OPENING = re.compile(r"# .+\n\n\*For [^*]+\. At the end [^*]+\b(minutes?|hours?)\b[^*]+\*\n")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^\s*(```|~~~)")
_CODE_WORD = re.compile(r"<code>([^\s<>&]+)</code>")
_BREAK = re.compile(r"(?<=\w[_/,.:{}])(?=[^_/,.:{}])")
_BLOCK = re.compile(r"^(\s*)([-*] |\d+\. |\|)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from code."""
    logging.getLogger("onebase_server").setLevel(logging.ERROR)
    app = create_app(cast(Services, SimpleNamespace(settings=Settings())))
    api = app.openapi()
    scopes = {
        (method, route.path_format): access_of(route)
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    made = {"reference/openapi.json": json.dumps(api, indent=1)}
    tags = {tag for operations in api["paths"].values() for one in operations.values() for tag in one["tags"]}
    if missing := tags - {tag for _, on_page in ROUTES.values() for tag in on_page}:
        raise ValueError(f"ROUTES in tools/reference_pages.py has no page for the tags {sorted(missing)}")
    for name, (title, on_page) in ROUTES.items():
        made[f"reference/routes-{name}.md"] = RoutesPage(api, scopes, on_page).text(title)
    for path, source in ELSEWHERE.items():
        made[path] = (ROOT / source).read_text()
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page as GitHub shows it. Lists and tables need no empty line before them; links may leave
    docs/. Warn of a page that does not begin with what a reader gets from it."""
    if page.file.src_uri != "changelog.md" and not has_opening(markdown):
        _log.warning(
            "%s does not begin with a line such as *For operators. At the end you know ... Five minutes.*",
            page.file.src_uri,
        )
    if page.file.src_uri.startswith(("quick-start", "concepts/", "how-to/")):
        page.meta.setdefault("search", {"boost": 2})
    elif page.file.src_uri == "reference/settings.md":
        page.meta.setdefault("search", {"boost": 3})
    source = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {there: here for here, there in ELSEWHERE.items()}

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        if re.match(r"[a-z]+:|#|/", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        whole = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if whole in pages or whole.startswith("docs/"):
            place = pages.get(whole) or whole.removeprefix("docs/")
            if (ROOT / whole).is_dir():
                place += "/README.md"
            place = posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")
            return f"[{label}]({place}{mark}{anchor})"
        if not (ROOT / whole).exists():
            _log.warning("%s links to %s, which is not there", page.file.src_uri, target)
        if config.repo_url:
            return f"[{label}]({config.repo_url.rstrip('/')}/blob/main/{whole}{mark}{anchor})"
        return f"`{whole}`" if label == posixpath.basename(whole) else label

    return "\n".join(line if code else _LINK.sub(link, line) for line, code in _with_empty_lines(markdown))


def has_opening(markdown: str) -> bool:
    """Return True if the first paragraph says for whom the page is, what one has at the end, and how long it
    takes."""
    return bool(_OPENING.match(markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Warn of a table that became a paragraph, and say where words of code may be broken."""
    if found := re.search(r"<p>\|.*", html):
        _log.warning("%s has a table that is none: %s", page.file.src_uri, found[0])
    return _CODE_WORD.sub(_breakable, html)


def _breakable(match: re.Match[str]) -> str:
    word = match[1]
    if len(word) <= 22:
        return f'<code class="whole">{word}</code>'
    return f"<code>{_BREAK.sub('<wbr>', word)}</code>"


def _with_empty_lines(markdown: str) -> Iterator[tuple[str, bool]]:
    """Yield the lines, an empty one before each list and table; and whether a line is code."""
    before, code = "", False
    for line in markdown.split("\n"):
        if _FENCE.match(line):
            code = not code
        elif not code and _BLOCK.match(line) and before.strip():
            goes_on = re.match(r"\s*\|" if line.lstrip()[0] == "|" else r"\s*([-*]|\d+\.) |\s+[^\s|]", before)
            if not goes_on:
                yield "", False
        yield line, code or bool(_FENCE.match(line))
        before = line


def settings_page() -> str:
    """Return every option of `onebase serve` as a table, by the groups of its help."""
    parser = serve_parser()
    fields = {item.name: item for item, _ in setting_fields()}
    lines = [
        "# Settings",
        "",
        "*For operators. At the end you know the option, its limits and its default. One minute to look one "
        "up.*",
        "",
        "Every setting of a server, made from its code. A value comes from the command line, else from the "
        "environment, else it is the default. Sizes are bytes, or have a suffix: `2GB` (powers of 1000), "
        "`512MiB` (of 1024). Times are seconds, lengths are tokens. `onebase serve --help` prints the same.",
    ]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest in fields]
        if not actions:
            continue
        title = str(group.title)
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", "| option | what | default |", "|---|---|---|"]
        for action in actions:
            text, _, default = str(action.help).replace("%%", "%").rpartition(" (default: ")
            text, default = (text, default[:-1]) if text else (str(action.help), "")
            meta = fields[action.dest].metadata
            limits = _limits(meta["low"], meta["high"])
            if action.choices:
                limits = "one of " + ", ".join(f"`{choice}`" for choice in action.choices)
            variable = environment_name(action.dest)
            name = f'<a id="{action.dest}"></a>`{action.option_strings[0]}`<br>`{variable}`'
            said = _cell(text[0].upper() + text[1:]) + (f". <small>{limits}</small>" if limits else "")
            lines.append(f"| {name} | {said} | {f'`{default}`' if default not in ('', 'none') else '–'} |")
    return "\n".join(lines) + "\n"


def _limits(low: float | None, high: float | None) -> str:
    if low is None:
        return ""
    return f"at least {low:,g}" if high is None else f"{low:,g} to {high:,g}"


def _cell(text: str) -> str:
    """Return text for a table's cell, in which markup is escaped."""
    text = re.sub(r"(?<![`\w])(--[a-z][a-z-]+|<[^>\s]*>|'[^']*\*')", r"`\1`", " ".join(text.split()))
    return text.replace("|", "\\|")


class RoutesPage:
    """The routes with certain tags, their fields and answers, and then each object that these are made of.

    scopes: of each method and path, what a key needs.
    """

    def __init__(self, api: Json, scopes: Mapping[tuple[str, str], str], tags: Mapping[str, str]) -> None:
        self._schemas: Json = api["components"]["schemas"]
        self._scopes, self._tags = scopes, tags
        self._routes: dict[str, list[tuple[str, str, Json]]] = defaultdict(list)
        for path, operations in api["paths"].items():
            for method, operation in operations.items():
                for tag in tags:
                    if tag in operation["tags"]:
                        self._routes[tag].append((method.upper(), path, operation))
        self._objects: dict[str, Json] = {}
        """Objects that the page names, by name, in the order in which they appear."""

    def text(self, title: str) -> str:
        """Return the page, as Markdown."""
        lines = [
            f"# {title}",
            "",
            "*For whoever writes requests. At the end you know a route's fields and what it answers, type by "
            "type. One minute to look one up.*",
            "",
            "Made from the [OpenAPI file](openapi.json) of this release. What the fields do, with examples: "
            "[HTTP](../http.md). Errors have [one shape](../http.md#errors) on every route; any may "
            f"answer with {', '.join(map(str, sorted(EVERYWHERE)))}.",
        ]
        for tag, title in self._tags.items():
            lines += ["", f"## {title}"]
            for method, path, operation in self._routes[tag]:
                lines += self._route(method, path, operation)
        lines += ["", "## Objects"]
        done: set[str] = set()
        while waiting := [name for name in self._objects if name not in done]:
            for name in waiting:
                done.add(name)
                lines += ["", f"### {name}", "", *self._object(self._objects[name])]
        return "\n".join(lines) + "\n"

    def _route(self, method: str, path: str, operation: Json) -> Iterator[str]:
        scope = self._scopes[method, path]
        words = {"open": "No key needed.", "any": "Any key.", "feedback": "Scope `generate`."}
        needs = words.get(scope, f"Scope `{scope}`.")
        said = " ".join(str(operation.get("description", "")).split())
        yield from ("", f"### `{method} {path}`", "", f"{said} {needs}")
        rows = [
            (one["name"], one.get("description", ""), one["schema"], one.get("required", False))
            for one in operation.get("parameters", ())
            if one["in"] != "path"
        ]
        if rows:
            yield from ("", '??? abstract "In the query"', "")
            yield from (f"    {line}" for line in self._table(rows))
        for kind, content in operation.get("requestBody", {}).get("content", {}).items():
            form = " of the form" if "multipart" in kind else ""
            yield from ("", f'??? abstract "Fields{form}"', "")
            yield from (f"    {line}" for line in self._object(self._resolved(content["schema"])))
        answers = [
            f"{status}, {self._answer(answer)}"
            for status, answer in operation["responses"].items()
            if status[0] == "2"
        ]
        errors = sorted(set(map(int, operation["responses"])) - EVERYWHERE)
        own = ", ".join(str(status) for status in errors if status >= 400)
        refused = f" Own errors: {own}." if own else ""
        yield from ("", f"Answers {'; '.join(answers)}.{refused}")

    def _answer(self, answer: Json) -> str:
        kinds = [
            f"events: {self._type(content['x-itemSchema'])}"
            if "x-itemSchema" in content
            else self._type(content.get("schema", {})) + (f" (`{kind}`)" if kind != JSON_TYPE else "")
            for kind, content in answer.get("content", {}).items()
        ]
        return " or ".join(kinds) or "nothing"

    def _resolved(self, schema: Json) -> Json:
        name = schema.get("$ref", "").rpartition("/")[2]
        return cast(Json, self._schemas[name]) if name else schema

    def _object(self, schema: Json) -> list[str]:
        """Return an object's fields as a table; of anything else what it is."""
        lines = [" ".join(str(schema["description"]).split()), ""] if "description" in schema else []
        needed = schema.get("required", [])
        rows = [
            (name, field.get("description", ""), field, name in needed)
            for name, field in schema.get("properties", {}).items()
        ]
        return lines + (self._table(rows) if rows else [self._type({**schema, "title": ""})])

    def _table(self, rows: list[tuple[str, str, Json, bool]]) -> list[str]:
        lines = ["| field | what it is | |", "|---|---|---|"]
        for name, said, schema, needed in rows:
            default = schema.get("default")
            beside = "needed" if needed else f"default `{json.dumps(default)}`" if default is not None else ""
            told = "; ".join(part for part in (_cell(said), beside) if part)
            lines.append(f"| `{name}` | {self._type(schema)} | {told} |")
        return lines

    def _type(self, schema: Json) -> str:
        """Return the type of a value in words; objects by name, which are described at the end of the
        page."""
        if "$ref" in schema:
            whole = self._resolved(schema)
            if str(whole.get("title", "")).startswith(("ListAnswer", "PageAnswer")):
                return f"a list, whose `data` are of {self._type(whole['properties']['data']['items'])}"
            return self._named(schema["$ref"].rpartition("/")[2], whole)
        for key in ("anyOf", "oneOf", "allOf"):
            if key in schema:
                kinds = [self._type(one) for one in schema[key] if one.get("type") != "null"]
                return " or ".join(dict.fromkeys(kinds)) or "null"
        if "const" in schema or "enum" in schema:
            values = schema.get("enum", [schema.get("const")])
            return " or ".join(f"`{json.dumps(value)}`" for value in values).replace("|", "\\|")
        kinds = schema.get("type", "any value")
        kind = next(one for one in kinds if one != "null") if isinstance(kinds, list) else kinds
        if kind == "array":
            return f"list of {self._type(schema.get('items', {}))}"
        if kind == "object" and schema.get("properties"):
            return self._named(schema.get("title") or "object", schema)
        if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
            return f"object of {self._type(schema['additionalProperties'])}"
        return f"{'text' if kind == 'string' else kind}{_range(schema)}"

    def _named(self, name: str, schema: Json) -> str:
        if not schema.get("properties"):
            return self._type(schema)
        self._objects.setdefault(name, schema)
        return f"[{name}](#{name.lower()})"


def _range(schema: Json) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is not None and high is not None and abs(high) < 1e9:
        return f", {low:g} to {high:g}"
    if "maxLength" in schema:
        return f", up to {schema['maxLength']:,} characters"
    return ""


def with_error_codes(markdown: str) -> str:
    """Return the page on HTTP with the table of codes as `onebase_protocol` has it."""
    head = "| status | `code` | when |\n|---|---|---|\n"
    before, _, rest = markdown.partition(head)
    lines = rest.splitlines(keepends=True)
    after = next(number for number, line in enumerate(lines) if not line.startswith("|"))
    rows = [
        f"| {status} | {', '.join(f'`{code}`' for code in codes)} | {when} |\n"
        for status, codes, when in ERROR_CODES
    ]
    return "".join([before, head, *rows, *lines[after:]])


def main() -> int:
    parser = argparse.ArgumentParser(description="Write what pages of docs/ have from the server's code.")
    parser.add_argument("--check", action="store_true", help="write nothing; say what is out of date")
    settings, http = ROOT / "docs" / "reference" / "settings.md", ROOT / "docs" / "http.md"
    pages = {settings: settings_page(), http: with_error_codes(http.read_text())}
    check = parser.parse_args().check
    stale = [page for page, made in pages.items() if not page.is_file() or page.read_text() != made]
    for page in stale:
        if check:
            print(f"{page.relative_to(ROOT)} is out of date: run python tools/reference_pages.py")
        else:
            page.write_text(pages[page])
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
