"""The README.md of a trained adapter: what it was trained on, how, and what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from onebase_adapters.training.recipe import recipe_fields
from onebase_adapters.training.report import Report

_TRAINED_IN = {"nf4": "  # trained on it in 4-bit (NF4)", "int8": "  # trained on it in int8", "none": ""}
_BARS = "▁▂▃▄▅▆▇█"


def model_card(report: Report, *, repo: str | None, commit: str | None, data: Sequence[DataLine]) -> str:
    """Markdown with the Hub's metadata on top.

    Args:
        repo: the base's name on the Hub, None if it is a folder. commit: of the base.
        data: what was trained on and evaluated with.
    """
    parts = [
        _metadata(report, repo),
        f"# {_heading(report.name)}",
        f"A LoRA adapter for {_base(report, repo, commit)}, trained with OneBase.",
        _results(report),
        _curve(report),
        _data(data),
        _settings(report),
        _use(report, repo),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


class DataLine:
    """One file: name, rows, tokens, supervised tokens, SHA-256 of what was trained on."""

    def __init__(self, part: str, name: str, rows: int, tokens: int, targets: int, digest: str) -> None:
        amounts = [f"{amount:,}" for amount in (rows, tokens, targets)]
        self.cells = [part, f"`{_plain(name)}`", *amounts, f"`{digest[:12]}`"]


def _metadata(report: Report, repo: str | None) -> str:
    base = [f"base_model: {json.dumps(repo)}"] if repo else []
    tags = "lora, qlora, onebase" if report.quantization == "nf4" else "lora, onebase"
    lines = ["library_name: peft", *base, "pipeline_tag: text-generation", f"tags: [{tags}]"]
    return "\n".join(["---", *lines, "---"])


def _base(report: Report, repo: str | None, commit: str | None) -> str:
    name = f"[{repo}](https://huggingface.co/{repo})" if repo else f"`{_plain(report.base)}`"
    return f"{name} at commit `{commit}`" if commit else name


def _results(report: Report) -> str:
    rows = []
    if report.loss_before is not None and report.loss_after is not None:
        rows.append(["held-out loss", f"{report.loss_before:.4f}", f"{report.loss_after:.4f}"])
    for name in report.metrics_after:
        before = report.metrics_before.get(name)
        shown = "" if before is None else f"{before:.1%}"
        rows.append([f"`{_plain(name)}`", shown, f"{report.metrics_after[name]:.1%}"])
    if not rows:
        return "## Results\n\nNothing was held out, so nothing was measured."
    return "## Results\n\n" + _table(["", "base", "adapter"], rows)


def _curve(report: Report) -> str:
    losses = [loss for _, loss in report.losses]
    if not losses:
        return ""
    held_out = ", ".join(f"{loss:.4f} after {step}" for step, loss in report.held_out)
    lines = [f"Training loss, {losses[0]:.4f} to {losses[-1]:.4f}: `{sparkline(losses)}`"]
    if held_out:
        lines.append(f"Held-out loss by steps: {held_out}.")
    lines.append(
        f"{report.steps} steps, {report.tokens:,} tokens, {report.seconds:.0f} s; the adapter is the one "
        f"after step {report.best_step}."
    )
    return "## Curve\n\n" + "\n\n".join(lines)


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Means of `width` equal parts as bars of eight heights."""
    width = min(width, len(values))
    cuts = [len(values) * part // width for part in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _data(data: Sequence[DataLine]) -> str:
    head = ["", "name", "rows", "tokens", "in the loss", "SHA-256 of tokens"]
    return "## Data\n\n" + _table(head, [line.cells for line in data])


def _settings(report: Report) -> str:
    rows = [
        [f"`{item.name}`", f"`{_plain(_value(report.recipe[item.name]))}`"]
        for item, _ in recipe_fields()
        if item.name in report.recipe and report.recipe[item.name] not in ([], {}, "")
    ]
    adapter = f"{report.parameters:,} parameters, {report.adapter_bytes / 1e6:.2f} MB."
    return f"## Settings\n\n{adapter}\n\n" + _table(["setting", "value"], rows)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _use(report: Report, repo: str | None) -> str:
    base = json.dumps(repo or report.base)
    return f"""## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base}){_TRAINED_IN[report.quantization]}
model = PeftModel.from_pretrained(base, "<this folder or repository>")
```

```
onebase serve --base {repo or _plain(report.base)} --adapter {_plain(report.name)}=<this folder>
```"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _heading(name: str) -> str:
    """As it is, if nothing in it is Markdown or HTML."""
    return name if re.fullmatch(r"[\w .-]+", name) else f"`{_plain(name)}`"


def _plain(text: str) -> str:
    """Without what would end a line or a code span of Markdown."""
    return " ".join(text.replace("`", "'").split())
