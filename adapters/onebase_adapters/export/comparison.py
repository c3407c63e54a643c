"""Compare a 16-bit model with the answers that a server gave on its quantized base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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


@torch.inference_mode()
def compare(
    folder: Path,
    answers: Sequence[tuple[Sequence[int], int, Sequence[float]]],
    *,
    stage: str,
    progress: OnProgress,
) -> dict[str, float]:
    """Score each answer with the model in `folder` and return the fields of Agreement.

    Args:
        answers: for each the tokens of prompt and answer, the number of tokens of the prompt, and the
            log-probabilities of the answer's tokens.
        stage: name of this stage in `progress`.

    Raises:
        ExportError: there is too little memory for the model, which is loaded whole.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    needed = _MARGIN * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if (free := free_memory(_CPU)) < needed:
        raise ExportError(
            f"to read with the model takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        )
    logging.disable_progress_bar()
    progress(stage, 0.0)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = (
        whole_class(config)
        .from_pretrained(folder, dtype="auto", local_files_only=True, trust_remote_code=False)
        .eval()
    )
    agreeing, differences = 0, list[float]()
    for number, (tokens, prompt, logprobs) in enumerate(answers, 1):
        logits = model(input_ids=torch.tensor([list(tokens)])).logits[0, prompt - 1 : -1].float()
        chosen = torch.tensor(list(tokens[prompt:]))
        agreeing += int((logits.argmax(-1) == chosen).sum())
        own = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        differences += (own - torch.tensor(list(logprobs))).abs().tolist()
        progress(stage, number / len(answers))
    count = len(differences)
    mean = sum(differences) / max(1, count)
    return asdict(Agreement(count, agreeing, max(differences, default=0.0), mean))
