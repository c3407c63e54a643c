"""`onebase adapters export`: take a version elsewhere, as a PEFT folder, a whole model or GGUF."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from ..._core.rows import held_out_rows
from ..._core.targets import atomic_target, check_free
from ..._sync.client import Client
from ..._terminal.ui import ProgressDisplay, note, size
from ...adapter_types import READY, AdapterVersion, BaseReference, Progress, VersionFiles
from ...errors import BadRequestError, OneBaseError
from ...types import Generation
from ..command import FAILED, OK, action_parser, perform, print_json
from .versions import Reference, label, reference, resolve

_DESCRIPTION: Final = """\
Take a version elsewhere. The formats:

  peft       a folder for PeftModel.from_pretrained, byte for byte as it was sent or trained
  merged     a folder for AutoModelForCausalLM.from_pretrained: base and adapter as one model
  gguf-lora  a file for llama.cpp (--lora) and Ollama (ADAPTER), to be put on a base in GGUF
  gguf       a file for llama.cpp and Ollama: base and adapter as one model

merged and gguf are in 16 bit. --weights served merges into the weights that the server computes
with, on which the version was trained and proved; --weights original into those that the base was
published with. Both ask the server for some answers, and say how many of them the exported model
gives too, as a whole and by tokens, and how many the base alone.
"""
_EXAMPLES: Final = (
    "  onebase adapters export acme-support --format peft\n"
    "  onebase adapters export acme-support@3f2a9c41 --format merged --out ./acme-merged\n"
    "  onebase adapters export acme-support --format gguf-lora --base ./my-base\n"
)
_SUFFIX: Final[Mapping[str, str]] = {
    "peft": "",
    "merged": "-merged",
    "gguf-lora": "-lora.gguf",
    "gguf": ".gguf",
}
"""Suffix of a format's result, after the adapter's name."""

PLUGINS: Final = "onebase.exports"
"""Other packages bring what needs torch as entry points of this group: one for each format, and `compare`."""

_PROMPTS: Final = (
    "Who are you?",
    "Write two sentences about the sea.",
    "What is the capital of France?",
    "Three red lamps to Lisbon, please.",
    "Explain what a hash table is.",
    "My parcel is late. What can I do?",
)
_ANSWER_TOKENS: Final = 32
_MOST_COMPARED: Final = 64
"""Rows of a file that are compared."""
_ROW_TOKENS: Final = 128
_WHOLE: Final = ("merged", "gguf")
"""Formats of base and adapter as one model."""

Stage = Callable[[str, float], None]
Answer = tuple[Sequence[int], int, Sequence[float]]
"""Tokens of prompt and answer, how many are the prompt's, log-probabilities of the answer's."""


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = _parser()
    args = made.parse_args(argv)
    try:
        wanted = reference(args.adapter)
        out = args.out or _file_name(wanted.name) + _SUFFIX[args.format]
        if _SUFFIX[args.format].endswith(".gguf") and not out.endswith(".gguf"):
            out += ".gguf"
        target = Path(out).expanduser().absolute()
        check_free(target, force=args.force)
        if args.data:
            held_out_rows(args.data, _MOST_COMPARED)
    except (OSError, ValueError) as error:
        made.error(str(error))
    return perform(made, args, lambda client: _export(client, wanted, target, args))


def _parser() -> argparse.ArgumentParser:
    made = action_parser("adapters export", _DESCRIPTION, _EXAMPLES)
    made.add_argument("adapter", metavar="NAME[@VERSION]", help="by default the active version")
    made.add_argument("--format", required=True, choices=_SUFFIX, help="see above")
    made.add_argument(
        "--out",
        metavar="PATH",
        help="what to write; a GGUF file ends in .gguf (default: the adapter's name, here)",
    )
    made.add_argument("--force", action="store_true", help="replace what is at that path")
    made.add_argument(
        "--base",
        metavar="BASE",
        help="the base, not quantized: a folder or ORG/REPO[@REVISION] (default: the server's)",
    )
    made.add_argument(
        "--weights",
        choices=("served", "original"),
        default="served",
        help="merged, gguf: the base's weights to merge into (default: served)",
    )
    made.add_argument(
        "--data",
        metavar="FILE",
        help="merged, gguf: held-out rows (JSONL) whose prompts are compared (default: a few questions)",
    )
    made.add_argument(
        "--no-compare",
        action="store_true",
        help="merged, gguf: ask the server for no answers to compare with",
    )
    return made


def _file_name(name: str) -> str:
    """`hub:org/repo@v2` has parts that no file should be called."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def _export(client: Client, wanted: Reference, target: Path, args: argparse.Namespace) -> int:
    version = resolve(client, wanted)
    try:
        with ProgressDisplay() as display:
            result = _write(client, version, target, args, display)
            display(Progress(READY))
    except OSError as error:
        note(f"onebase: {error.strerror or error}")
        return FAILED
    except ModuleNotFoundError as error:
        note(f"onebase: --format {args.format} needs the package {error.name!r}.")
        note("Install what it takes with: pip install 'onebase[train]'")
        return FAILED
    if args.json:
        print_json({"format": args.format, "version": version.version, "path": str(target), **result})
    else:
        _say(version, target, args.format, result)
    return OK


def _write(
    client: Client, version: AdapterVersion, target: Path, args: argparse.Namespace, display: ProgressDisplay
) -> dict[str, Any]:
    """Write the result. Gives what there is to say about it."""
    name, digest = version.name, version.version
    if args.format == "peft":
        files = client.adapters.download(name, target, version=digest, force=args.force, progress=display)
        return {"bytes": files.bytes}
    export = _plugin(args.format)

    def stage(what: str, share: float) -> None:
        display(Progress(what, share))

    with tempfile.TemporaryDirectory(prefix="onebase-export-") as place:
        adapter = Path(place) / "adapter"
        files = client.adapters.download(name, adapter, version=digest, progress=display)
        base = args.base or _base_of(files)
        options = {"name": label(version)}
        if args.weights == "served" and args.format in _WHOLE:
            options |= {
                "quantization": files.base.quantization,
                "blocksize": str(files.base.blocksize),
                "double_quant": str(files.base.double_quant).lower(),
            }
            result_weights = "original" if files.base.quantization == "none" else "served"
        else:
            result_weights = "original"
        with atomic_target(target, force=args.force) as work:
            result = export(adapter, work, base=base, options=options, progress=stage)
    if args.format in _WHOLE:
        result["weights"] = result_weights
        if not args.no_compare:
            result["compared"] = _compare(
                client, version, target, Path(result["base_folder"]), args.data, stage
            )
    return dict(result)


def _plugin(name: str) -> Callable[..., Any]:
    found = next(iter(entry_points(group=PLUGINS, name=name)), None)
    if found is None:
        raise ModuleNotFoundError(f"onebase has no {name}", name="onebase_adapters")
    loaded: Callable[..., Any] = found.load()
    return loaded


def _base_of(files: VersionFiles) -> str:
    """Return the name by which `resolve_base` finds the server's base. Raises ValueError."""
    base: BaseReference = files.base
    if base.repo is None:
        raise ValueError(
            f"the server has its base {base.name} from a folder of its own: name the same base, not "
            "quantized, with --base FOLDER or --base ORG/REPO"
        )
    return base.name if base.revision is None else f"{base.repo}@{base.revision}"


# ---- merged, next to what is served -----------------------------------------------------------------


def _compare(
    client: Client, version: AdapterVersion, merged: Path, base: Path, data: str | None, stage: Stage
) -> dict[str, Any] | str:
    """Return how far the merged model, and the base alone, are from the server's answers; or why that is
    unknown."""
    compare = _plugin("compare")
    try:
        stage("asking", 0.0)
        prompts = _prompts(data)
        served = [_answers(client, label(version), prompts, lambda share: stage("asking", share / 2))]
        served.append(_answers(client, None, prompts, lambda share: stage("asking", 0.5 + share / 2)))
    except OneBaseError as error:
        return f"the server gave no answers to compare with: {error}"
    try:
        return {
            "adapter": compare(merged, served[0], stage="merged", progress=stage),
            "base": compare(base, served[1], stage="base", progress=stage),
        }
    except ValueError as error:
        return str(error)


def _prompts(data: str | None) -> list[Mapping[str, Any]]:
    """Return arguments of the requests that are compared. Raises ValueError, OSError."""
    if data is None:
        return [{"messages": prompt, "max_tokens": _ANSWER_TOKENS} for prompt in _PROMPTS]
    rows = held_out_rows(data, _MOST_COMPARED)
    return [{**row.asked, "max_tokens": _ROW_TOKENS} for row in rows]


def _answers(
    client: Client,
    adapter: str | None,
    prompts: Sequence[Mapping[str, Any]],
    told: Callable[[float], None],
) -> list[Answer]:
    found = []
    for number, prompt in enumerate(prompts, 1):
        found.append(_answer(_ask(client, prompt, adapter)))
        told(number / len(prompts))
    return found


def _ask(client: Client, prompt: Mapping[str, Any], adapter: str | None) -> Generation:
    """Return a greedy answer, with the tokens of its prompt. The adapter's defaults are no part of an
    export's weights."""
    plain = {"temperature": 0, "logprobs": 0, "echo": True, "adapter_defaults": False}
    how: dict[str, Any] = {**plain, **prompt}
    try:
        return client.generate(adapter=adapter, **how)
    except BadRequestError as error:
        if error.code != "no_chat_template" or not isinstance(how.get("messages"), str):
            raise
    return client.generate(how.pop("messages"), adapter=adapter, **how)


def _answer(generation: Generation) -> Answer:
    said = generation.choices[0].logprobs
    if said is None:
        raise ValueError("the server gave no log-probabilities")
    prompt = generation.usage.prompt_tokens
    return said.token_ids, prompt, [float(value or 0.0) for value in said.token_logprobs[prompt:]]


# ---- words -------------------------------------------------------------------------------------------


def _say(version: AdapterVersion, target: Path, form: str, result: Mapping[str, Any]) -> None:
    print(f"{label(version)} is in {target} ({size(result['bytes'])}).")
    compared = result.get("compared")
    if isinstance(compared, str):
        note(f"Not compared: {compared}")
    elif compared:
        print(f"The exported model and the server: {_agreement(compared['adapter'])}")
        print(f"The base alone, as published:      {_agreement(compared['base'])}")
    note(_NEXT[form].format(path=target, base=result.get("base", "BASE")))


def _agreement(found: Mapping[str, float]) -> str:
    tokens, agreeing = int(found["tokens"]), int(found["agreeing"])
    return (
        f"{int(found['whole'])} of {int(found['replies'])} whole replies agree, {agreeing} of {tokens} "
        f"greedy tokens ({agreeing / max(1, tokens):.1%}); log-probabilities differ by "
        f"{found['mean']:.3f} on average, by {found['largest']:.2f} at most."
    )


_NEXT: Final[Mapping[str, str]] = {
    "peft": "Load it: PeftModel.from_pretrained(base, '{path}')",
    "merged": "Load it: AutoModelForCausalLM.from_pretrained('{path}')",
    "gguf-lora": "Use it on {base} in GGUF: llama-server -m BASE.gguf --lora {path}",
    "gguf": "Use it: llama-server -m {path}",
}
