"""Replies generated in a run: metrics for the base first and then for the adapter, and samples on the way."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onebase_adapters.store.atomic_files import write_atomically
from onebase_adapters.training import events
from onebase_adapters.training.data.dataset import Dataset
from onebase_adapters.training.data.tokens import dated_tokenizer
from onebase_adapters.training.events import Gate, Listen
from onebase_adapters.training.metrics import mean
from onebase_adapters.training.recipe import Recipe
from onebase_adapters.training.replies import generate_replies
from onebase_adapters.training.trainable import Trainable

_FILE = "base_metrics.json"


class Measuring:
    """Replies of the adapter as it is now, and of the base. Does nothing where the recipe asks for none."""

    def __init__(
        self,
        trainable: Trainable,
        tokenizer: Any,
        recipe: Recipe,
        held_out: Dataset | None,
        folder: Path,
        listen: Listen,
        gate: Gate,
    ) -> None:
        self._trainable = trainable
        self._tokenizer = dated_tokenizer(tokenizer, recipe)
        self._recipe = recipe
        self._prompts = list(held_out.prompts[: recipe.metric_rows]) if held_out is not None else []
        self._samples = [_chat(self._tokenizer, text) for text in recipe.sample_prompts]
        self._file = folder / _FILE
        self._listen = listen
        self._gate = gate

    def base(self) -> dict[str, float]:
        """The base's metrics; measured once in a run, however often it is resumed."""
        if not self._recipe.metrics or not self._prompts:
            return {}
        with contextlib.suppress(OSError, ValueError):
            held: dict[str, float] = json.loads(self._file.read_text())
            return held
        found = self._measure("base")
        write_atomically(self._file, json.dumps(found))
        return found

    def adapter(self) -> dict[str, float]:
        """The adapter's metrics, as it is now."""
        return self._measure("adapter")

    def sample(self, step: int) -> None:
        """Answer the recipe's prompts; at step 0 the base does."""
        if not self._samples:
            return
        replies = self._replies(self._samples, "samples", bare=not step)
        for prompt, text in zip(self._recipe.sample_prompts, replies, strict=True):
            self._listen(events.Sampled(at=time.time(), step=step, prompt=prompt, text=text))

    def _measure(self, subject: str) -> dict[str, float]:
        if not self._recipe.metrics or not self._prompts:
            return {}
        self._listen(events.Phase(at=time.time(), name="measuring", message=subject))
        asked = [prompt.ids.tolist() for prompt in self._prompts]
        replies = self._replies(asked, f"measuring {subject}", bare=subject == "base")
        references = [prompt.reference for prompt in self._prompts]
        found = {name: mean(name, replies, references) for name in self._recipe.metrics}
        self._listen(events.Measured(at=time.time(), subject=subject, metrics=found, rows=len(self._prompts)))
        return found

    def _replies(self, prompts: Sequence[list[int]], name: str, *, bare: bool) -> list[str]:
        def on_progress(part: float) -> None:
            self._listen(events.Progress(at=time.time(), name=name, part=part))

        return generate_replies(
            self._trainable.base,
            None if bare else self._trainable.weights(),
            self._tokenizer,
            prompts,
            self._recipe.metric_tokens,
            on_progress=on_progress,
            wait=self._gate.wait,
        )


def _chat(tokenizer: Any, text: str) -> list[int]:
    """A user's message as the base's chat template renders it; as it is, if the base has none."""
    if not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
