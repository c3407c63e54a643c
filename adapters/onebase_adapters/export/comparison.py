"""Compare a 16-bit model with the answers that a server gave on its quantized base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from onebase_adapters.export.base_files import ExportError, OnProgress
from onebase_engine.base.layers import whole_class
from onebase_engine.machine import free_memory

_CPU = torch.device("cpu")
_MARGIN = 1.2
"""Memory that loading and running a model takes, as a multiple of the size of its weights."""


@dataclass(frozen=True)
class Agreement:
    """Agreement over all tokens of all answers, which were generated greedily."""

    tokens: int
    agreeing: int
    """Tokens that this model would have chosen too, after the same tokens before."""
    largest: float
    """Largest difference between the log-probabilities of a token."""
    mean: float
    replies: int
    whole: int
    """Replies of which all tokens agree: the model generates the same one."""


@torch.inference_mode()
def compare(
    place: Path,
    answers: Sequence[tuple[Sequence[int], int, Sequence[float]]],
    *,
    stage: str,
    progress: OnProgress,
) -> dict[str, float]:
    """Score each answer with the model in a folder or GGUF file and return the fields of Agreement.

    Args:
        answers: for each the tokens of prompt and answer, the number of tokens of the prompt, and the
            log-probabilities of the answer's tokens.
        stage: name of this stage in `progress`.

    Raises:
        ExportError: there is too little memory for the model, which is loaded whole.
    """
    from transformers.utils import logging

    in_gguf = place.is_file()
    size = sum(file.stat().st_size for file in ([place] if in_gguf else place.glob("*.safetensors")))
    needed = _MARGIN * size * (2 if in_gguf else 1)  # GGUF is read in fp32
    if (free := free_memory(_CPU)) < needed:
        raise ExportError(
            f"to read with the model takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        )
    logging.disable_progress_bar()
    progress(stage, 0.0)
    model = _gguf(place) if in_gguf else _folder(place)
    agreeing, whole, differences = 0, 0, list[float]()
    for number, (tokens, prompt, logprobs) in enumerate(answers, 1):
        logits = model(input_ids=torch.tensor([list(tokens)])).logits[0, prompt - 1 : -1].float()
        chosen = torch.tensor(list(tokens[prompt:]))
        same = logits.argmax(-1) == chosen
        agreeing, whole = agreeing + int(same.sum()), whole + int(same.all())
        own = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        differences += (own - torch.tensor(list(logprobs))).abs().tolist()
        progress(stage, number / len(answers))
    count = len(differences)
    mean = sum(differences) / max(1, count)
    return asdict(Agreement(count, agreeing, max(differences, default=0.0), mean, len(answers), whole))


def _folder(folder: Path) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    how: dict[str, Any] = {"dtype": "auto", "local_files_only": True, "trust_remote_code": False}
    return whole_class(config).from_pretrained(folder, **how).eval()


def _gguf(file: Path) -> Any:
    """Return the model in a GGUF file, as transformers reads it. Raises ExportError."""
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ExportError(f"transformers cannot read the GGUF file back: {error}") from error
    return model.eval()
