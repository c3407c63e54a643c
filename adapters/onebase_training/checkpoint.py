"""Write a run's checkpoints, and in the end the adapter as a PEFT folder."""

from __future__ import annotations

import io
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from onebase_adapters.store.atomic_files import atomic_directory
from onebase_engine.base.load import Quantization
from onebase_training.classes import BASE_BY, confusion_rows, figure_rows
from onebase_training.recipe import Recipe, recipe_fields

_ADAPTER, _OPTIMIZER, _STATE, _PEFT = "adapter.safetensors", "optimizer.pt", "state.json", "adapter"
_STEP = re.compile(r"step-(\d{8})")


class CheckpointError(Exception):
    """The run's folder cannot be used; the message says why and what to do."""

    @classmethod
    def unreadable(cls, path: Path, error: Exception) -> CheckpointError:
        """Return the error for a file without which its folder cannot be used."""
        return cls(f"{path} cannot be read ({error}): remove {path.parent} to start over")

    @classmethod
    def other_run(cls, folder: Path) -> CheckpointError:
        """Return the error for a folder with the results of another run."""
        return cls(
            f"{folder} holds a run with another recipe, other data or another base: continue with the "
            "same ones, choose another folder, or remove this one"
        )


@dataclass
class RunState:
    """State of a run besides its tensors. Losses are nats a supervised token.

    identity: SHA-256 of recipe, data and base: only the same run resumes from a checkpoint.
    """

    identity: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    base_loss: float | None = None
    parent_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    without_better: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run's folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def save(
        self,
        state: RunState,
        adapter: Mapping[str, torch.Tensor],
        optimizer: dict[str, Any],
        export: Callable[[Path], None] = lambda folder: None,
    ) -> Path:
        """Write the state after `state.step` steps and drop the oldest. Raises OSError.

        export: writes the adapter in PEFT's format into an empty folder, for servers of the checkpoint.
        """
        target = self.folder / f"step-{state.step:08d}"
        with atomic_directory(target) as work:
            save_file(_on_cpu(adapter), work / _ADAPTER)
            _save_optimizer(optimizer, work / _OPTIMIZER)
            (work / _STATE).write_text(json.dumps(asdict(state)))
            (work / _PEFT).mkdir()
            export(work / _PEFT)
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.folder / f"step-{old:08d}", ignore_errors=True)
        for work in self.folder.glob(".*.part"):
            shutil.rmtree(work, ignore_errors=True)
        wanted = {self._best(json.loads(self._state(step))["best_step"]) for step in self.steps()}
        for path in self.folder.glob("best-*"):
            if path not in wanted:
                shutil.rmtree(path, ignore_errors=True)
        return target

    def save_best(self, step: int, adapter: Mapping[str, torch.Tensor]) -> None:
        """Save an adapter as the best one; the previous one stays until the next `save`. Raises OSError."""
        with atomic_directory(self._best(step)) as work:
            save_file(_on_cpu(adapter), work / _ADAPTER)

    def best(self, step: int) -> dict[str, torch.Tensor]:
        """Return the adapter that was saved as the best after a step. Raises CheckpointError."""
        try:
            return load_file(self._best(step) / _ADAPTER)
        except Exception as error:
            raise CheckpointError(f"{self._best(step)} cannot be read: {error}") from error

    def _state(self, step: int) -> str:
        return (self.folder / f"step-{step:08d}" / _STATE).read_text()

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps after which there are checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def latest(self, identity: str) -> RunState | None:
        """Return the state of the last checkpoint, or None.

        Raises CheckpointError: it is another run's, or cannot be read.
        """
        if not (steps := self.steps()):
            return None
        path = self.folder / f"step-{steps[-1]:08d}"
        try:
            state = RunState(**json.loads((path / _STATE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}): remove it to continue from the one before"
            ) from error
        if state.identity != identity:
            raise CheckpointError.other_run(self.folder.parent)
        state.losses = [(step, loss) for step, loss in state.losses]
        state.held_out = [(step, loss) for step, loss in state.held_out]
        return state

    def tensors(self, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return adapter and optimizer state after a step, in host memory. Raises CheckpointError."""
        path = self.folder / f"step-{step:08d}"
        try:
            optimizer = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
            return load_file(path / _ADAPTER), optimizer
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}): remove it to continue from the one before"
            ) from error


def _save_optimizer(optimizer: dict[str, Any], path: Path) -> None:
    """Save the optimizer. Raises the OSError of a failed write, where torch.save reports only "unexpected
    pos"."""
    failed: list[OSError] = []

    class Noting(io.FileIO):
        def write(self, data: Any) -> int:
            try:
                return super().write(data)
            except OSError as error:
                failed.append(error)
                raise

    try:
        with Noting(path, "w") as raw, io.BufferedWriter(raw) as file:
            torch.save(optimizer, file)
    except RuntimeError as error:
        if failed:
            raise failed[0] from error
        raise


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """One finished run. Losses are means over held-out rows, nats a supervised token (DPO: a pair;
    classification: a row, the base's as `classes` says).

    better_than: whether the adapter is better than each of those that it was compared with ("base", and
    "parent" and "active" if they exist), by the recipe's `best_by`; None if that was not measured.
    better: than all of them; False if it is not better than one of them, whatever the others.
    metrics_before, metrics_after: base and adapter on the same prompts, each from 0 to 1.
    losses, held_out: (step, loss).
    parent: label of the adapter that training continued; "" if it started from the base. loss_parent,
    metrics_parent: of it.
    active: digest of the version that requests for the adapter used when training ended; "" if there was
    none.
    loss_active, metrics_active: of it, on the same rows. not_compared: reason why it was not measured, or "".
    paired: differences of scores, as `slices.paired_differences` returns them.
    warnings: sentences on why better may not mean better, as `doubts` returns them.
    replies: the first held-out rows (line, slice, prompt, reference) with the reply of each subject ("base",
    "parent", "active", "adapter") that was asked.
    slices: as `slices.slice_report` returns it; None if the held-out rows name none.
    classes: as `classes.class_report` returns it; None without labels, or if nothing was held out.
    """

    name: str
    base: str
    quantization: Quantization
    steps: int
    best_step: int
    tokens: int
    seconds: float
    parameters: int
    adapter_bytes: int
    loss_before: float | None
    loss_after: float | None
    metrics_before: dict[str, float]
    metrics_after: dict[str, float]
    better: bool | None
    losses: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    recipe: dict[str, Any]
    peak_memory_bytes: int
    parent: str = ""
    loss_parent: float | None = None
    metrics_parent: dict[str, float] = field(default_factory=dict)
    better_than: dict[str, bool | None] = field(default_factory=dict)
    active: str = ""
    loss_active: float | None = None
    metrics_active: dict[str, float] = field(default_factory=dict)
    not_compared: str = ""
    paired: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)
    slices: dict[str, Any] | None = None
    classes: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_better(
    recipe: Recipe,
    loss: tuple[float | None, float | None],
    before: dict[str, float],
    after: dict[str, float],
) -> bool | None:
    """Return True if the adapter has a lower held-out loss or a higher metric, by the recipe's `best_by`;
    None if that was not measured.

    Args:
        loss: of the subject that it is compared with, and of the adapter. before, after: their metrics.
    """
    if recipe.best_by == "loss":
        return None if loss[0] is None or loss[1] is None else loss[1] < loss[0]
    name = recipe.best_by
    return after[name] > before[name] if name in before and name in after else None


def all_better(better_than: Mapping[str, bool | None]) -> bool | None:
    """Return True if it is better than all of them; None if that depends on one that was not measured."""
    found = better_than.values()
    return False if False in found else None if None in found else True


def doubts(
    better: bool | None,
    best_by: str,
    subjects: Mapping[str, Mapping[str, float]],
    after: Mapping[str, float],
) -> list[str]:
    """Return sentences on metrics by which an adapter that is called better is not.

    Args:
        better, best_by: of the report. subjects: metrics of each that it was compared with, by its name.
        after: metrics of the adapter.
    """
    if not better:
        return []
    by = "held-out loss" if best_by == "loss" else best_by
    if after.get("json_valid") == 0:
        return [f"It is better by {by}, but none of its replies to held-out prompts is valid JSON."]
    found = []
    for name, share in after.items():
        best, subject = max(
            ((one[name], who) for who, one in subjects.items() if name in one), default=(0, "")
        )
        if share < best:
            found.append(f"It is better by {by}, but {name} is {share:.1%}; {subject} has {best:.1%}.")
    return found


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
"""Config file of a classifier: the base's with the names of the labels, as transformers writes and reads
it."""


def write_adapter(
    model: Any,
    folder: Path,
    *,
    base: str,
    commit: str | None,
    card: Callable[[int], str],
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write a folder that `PeftModel.from_pretrained` loads; returns the size of the tensors' file in bytes.

    The folder appears whole. It never holds base weights, also when `lm_head` is a target.

    Args:
        model: a PeftModel with one adapter in fp32.
        base: the base's name in the config. commit: of the base, if it has one.
        card: returns the text of README.md, given the bytes of the tensors' file.
        dtype: of the tensors in the file; they are always loaded as fp32 again.
    """
    with atomic_directory(folder) as work:
        save_peft(model, work, base=base, commit=commit)
        tensors = load_file(work / WEIGHTS)
        _check(tensors)
        if dtype != torch.float32:
            halved = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            save_file(halved, work / WEIGHTS, metadata={"format": "pt"})
        # safetensors writes files that only their owner may read.
        (work / WEIGHTS).chmod((work / CONFIG).stat().st_mode)
        (work / "README.md").write_text(card((work / WEIGHTS).stat().st_size), encoding="utf-8")
    return (folder / WEIGHTS).stat().st_size


def save_peft(model: Any, folder: Path, *, base: str, commit: str | None) -> None:
    """Write the configs and the tensors, as `write_adapter`, into an existing folder. Raises OSError."""
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = base
    config.revision = commit
    if isinstance(config.target_modules, set):
        # Each process writes a set in another order: the same adapter would have another digest.
        config.target_modules = sorted(config.target_modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(folder, save_embedding_layers=False)
    if config.task_type == "SEQ_CLS":
        model.get_base_model().config.save_pretrained(folder)


def _check(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} of the trained adapter is not finite")


REPLY_SUBJECTS = ("base", "parent", "active", "adapter")
"""Subjects whose replies a report's row has, in the order in which they are shown."""
_TRAINED_IN = {"nf4": "  # trained on it in 4-bit (NF4)", "int8": "  # trained on it in int8", "none": ""}
_BARS = "▁▂▃▄▅▆▇█"


def model_card(
    report: RunReport,
    *,
    repo: str | None,
    commit: str | None,
    data: Sequence[DataLine],
    loader: str = "AutoModelForCausalLM",
) -> str:
    """Return the model card: Markdown with the Hub's metadata on top.

    It quotes no rows, as it may be published: the report alone has the replies to held-out prompts.

    Args:
        repo: the base's name on the Hub, None if it is a folder. commit: of the base.
        data: files for training and evaluation.
        loader: transformers' automatic class that loads the base.
    """
    parts = [
        _metadata(report, repo),
        f"# {_heading(report.name)}",
        f"A LoRA adapter for {_base(report, repo, commit)}, trained with OneBase{_parent(report)}.",
        _results(report),
        _classes(report),
        _curve(report),
        _data(data),
        _settings(report),
        _use(report, repo, loader),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


class DataLine:
    """One file: name, rows, tokens, supervised tokens, SHA-256 of its tokens."""

    def __init__(self, part: str, name: str, rows: int, tokens: int, targets: int, digest: str) -> None:
        amounts = [f"{amount:,}" for amount in (rows, tokens, targets)]
        self.cells = [part, f"`{_plain(name)}`", *amounts, f"`{digest[:12]}`"]


def _metadata(report: RunReport, repo: str | None) -> str:
    base = [f"base_model: {json.dumps(repo)}"] if repo else []
    tags = "lora, qlora, onebase" if report.quantization == "nf4" else "lora, onebase"
    pipeline = "text-classification" if _classifies(report) else "text-generation"
    lines = ["library_name: peft", *base, f"pipeline_tag: {pipeline}", f"tags: [{tags}]"]
    return "\n".join(["---", *lines, "---"])


def _base(report: RunReport, repo: str | None, commit: str | None) -> str:
    name = f"[{repo}](https://huggingface.co/{repo})" if repo else f"`{_plain(report.base)}`"
    return f"{name} at commit `{commit}`" if commit else name


def _results(report: RunReport) -> str:
    head, *rows = results(report)
    if not rows:
        return "## Results\n\nNothing was held out, so nothing was measured."
    named = [[f"`{_plain(name)}`" if name in report.metrics_after else name, *rest] for name, *rest in rows]
    warnings = "".join(f"\n\n**{warning}**" for warning in report.warnings)
    return "## Results\n\n" + _table(head, named) + warnings + _slices(report)


def _classifies(report: RunReport) -> bool:
    return report.recipe.get("method") == "classification"


def _classes(report: RunReport) -> str:
    """Return tables of how well each label is predicted."""
    if report.classes is None:
        return ""
    tables = [
        _table(head, [[f"`{_plain(name)}`", *cells] for name, *cells in rows])
        for head, *rows in (figure_rows(report.classes), _named_heads(confusion_rows(report.classes)))
    ]
    lines = [f"Base: {BASE_BY[report.classes['base_by']]}.", tables[0]]
    return "\n\n".join(
        ["## Labels", *lines, "Held-out rows, by their label and by the one given:", tables[1]]
    )


def _named_heads(rows: list[list[str]]) -> list[list[str]]:
    """Quote the labels in a table's head, which may hold Markdown."""
    (first, *names), *rest = rows
    return [[_plain(first), *(f"`{_plain(name)}`" for name in names)], *rest]


def _slices(report: RunReport) -> str:
    if report.slices is None:
        return ""
    head, *rows = slice_rows(report.slices)
    return "\n\n" + _table(head, [[f"`{_plain(name)}`", *rest] for name, *rest in rows])


def slice_rows(slices: Mapping[str, Any]) -> list[list[str]]:
    """Return a table of `RunReport.slices`: its head, then a line for each slice."""
    by_loss = slices["by"] == "loss"

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}" if by_loss else f"{value:.1%}"

    has_active = any(one["active"] is not None for one in slices["slices"])
    subjects = [slices["against"], *(["active"] if has_active else []), "adapter"]
    fields = ["before", *(["active"] if has_active else []), "after"]
    made = [[f"{'held-out loss' if by_loss else slices['by']} by slice", "rows", *subjects, ""]]
    for one in slices["slices"]:
        verdict = "worse than allowed" if one["regressed"] else "worse" if one["worse_by"] > 0 else ""
        made.append([one["slice"], str(one["measured"]), *(shown(one[name]) for name in fields), verdict])
    return made


def results(report: RunReport) -> list[list[str]]:
    """Return a table of the results on held-out rows: its head, then one line for the loss and each
    metric."""
    subjects = [("base", report.loss_before, report.metrics_before)]
    if report.parent:
        subjects.append(("parent", report.loss_parent, report.metrics_parent))
    if report.active:
        subjects.append(("active", report.loss_active, report.metrics_active))
    subjects.append(("adapter", report.loss_after, report.metrics_after))
    made = [["", *(name for name, _, _ in subjects)]]
    if report.loss_before is not None and report.loss_after is not None:
        losses = [loss for _, loss, _ in subjects]
        made.append(["held-out loss", *("" if loss is None else f"{loss:.4f}" for loss in losses)])
    for metric in report.metrics_after:
        values = [metrics.get(metric) for _, _, metrics in subjects]
        made.append([metric, *("" if value is None else f"{value:.1%}" for value in values)])
    return made


def _parent(report: RunReport) -> str:
    return f", going on from `{_plain(report.parent)}`" if report.parent else ""


def _curve(report: RunReport) -> str:
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
    """Return the means of `width` equal parts, as bars of eight heights."""
    width = min(width, len(values))
    cuts = [len(values) * part // width for part in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _data(data: Sequence[DataLine]) -> str:
    head = ["", "name", "rows", "tokens", "in the loss", "SHA-256 of tokens"]
    return "## Data\n\n" + _table(head, [line.cells for line in data])


def _settings(report: RunReport) -> str:
    rows = [
        [f"`{item.name}`", f"`{_plain(_value(report.recipe[item.name]))}`"]
        for item, _ in recipe_fields()
        if item.name in report.recipe and report.recipe[item.name] not in ([], {}, "")
    ]
    adapter = f"{report.parameters:,} parameters, {report.adapter_bytes / 1e6:.2f} MB."
    return f"## Settings\n\n{adapter}\n\n" + _table(["setting", "value"], rows)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _use(report: RunReport, repo: str | None, loader: str) -> str:
    base = json.dumps(repo or report.base)
    trained_in = _TRAINED_IN[report.quantization]
    if _classifies(report):
        return f"""## Use

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

config = AutoConfig.from_pretrained("<this folder or repository>")  # has the names of the labels
base = AutoModelForSequenceClassification.from_pretrained({base}, config=config){trained_in}
model = PeftModel.from_pretrained(base, "<this folder or repository>")
```

```
onebase serve --base {repo or _plain(report.base)} --adapter {_plain(report.name)}=<this folder>
curl localhost:8000/classify -d '{{"model": "{_plain(report.name)}", "input": ["..."]}}'
```"""
    return f"""## Use

```python
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained({base}){trained_in}
model = PeftModel.from_pretrained(base, "<this folder or repository>")
```

```
onebase serve --base {repo or _plain(report.base)} --adapter {_plain(report.name)}=<this folder>
```"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _heading(name: str) -> str:
    """Return the name as it is, if nothing in it is Markdown or HTML; else as code."""
    return name if re.fullmatch(r"[\w .-]+", name) else f"`{_plain(name)}`"


def _plain(text: str) -> str:
    """Return the text without characters that would end a line or a code span of Markdown."""
    return " ".join(text.replace("`", "'").split())
