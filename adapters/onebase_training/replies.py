"""Generate greedy replies during a run, with the engine that will serve the adapter: metrics and samples.

A reply is the one that will be served, whatever other prompts are in its batch: bit for bit on the CPU, up to
rounding on CUDA. The model that is trained is not changed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onebase_adapters.store.atomic_files import write_atomically
from onebase_engine.base.chat import ChatTokenizer
from onebase_engine.base.load import UnsupportedBaseError, eos_ids, longest_row
from onebase_engine.engine.batch import StepBatch
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.messages import AdapterRef, Sampling, SequenceOutput, Submit
from onebase_engine.engine.model import Outputs, ServedModel
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.kernels.weights import AdapterWeights
from onebase_engine.machine import is_out_of_memory
from onebase_training import events
from onebase_training.data.dataset import Dataset
from onebase_training.data.tokens import dated_tokenizer
from onebase_training.events import Gate, Listen
from onebase_training.metrics import mean
from onebase_training.recipe import Recipe
from onebase_training.slices import LONGEST, Question
from onebase_training.trainable import Trainable

BATCH_TOKENS = 8192
"""Largest number of tokens whose keys and values are in memory at once, which limits the sequences in a
batch."""
_MAX_ROWS = 64
_STEP_TOKENS = 512
"""Prompt tokens computed in one pass."""
_BLOCK = 16
_VERSION = "version"


def generate_replies(
    base: nn.Module,
    adapter: AdapterWeights | None,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    on_progress: Callable[[float], None] | None = None,
    wait: Callable[[], None] = lambda: None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """Return the most probable reply to each prompt, token by token, without its end-of-turn token.

    Args:
        base: as `load_base` or `attach` returns it.
        adapter: its tensors as they are now; None for the bare base.
        prompts: token ids each. An empty one, or one that fills the base's context, gets an empty reply.
        max_tokens: longest reply.
        on_progress: called with the part that is done, from 0 to 1.
        wait: called between layers, many times for each token; what it raises ends the generation.
        batch_tokens: tokens of sequences generated together, prompts and replies.

    Raises:
        UnsupportedBaseError: the base cannot be served with paged attention.
    """
    limit = longest_row(base.config) or 2**31
    rows = [
        _Row(str(number), list(ids), min(max_tokens, limit - len(ids))) for number, ids in enumerate(prompts)
    ]
    # Rows of like length run together, so that little is padded.
    asked = sorted((row for row in rows if row.ids and row.most > 0), key=lambda row: row.blocks)
    if asked:
        blocks = min(sum(row.blocks for row in asked), batch_tokens // _BLOCK)
        try:
            # Its trials are passes too.
            engine = _engine(base, asked[-1].blocks, blocks, stop_ids(base, tokenizer), wait)
            if adapter is not None:
                engine.put_adapter(_VERSION, adapter)
            _run(engine, asked, [] if adapter is None else [AdapterRef(_VERSION)], on_progress, len(rows))
        except _PassError as error:
            raise error.cause from None
    return [tokenizer.decode(row.reply, skip_special_tokens=True) for row in rows]


def score_choices(
    base: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[int]],
    *,
    on_progress: Callable[[float], None],
    wait: Callable[[], None],
) -> list[list[float]]:
    """Return the log-likelihood of each choice after each prompt by the bare base, nats, [prompts][choices].

    These are the sums of `/v1/decide`.

    Args:
        prompts, choices: token ids each. wait, on_progress: as in `generate_replies`.

    Raises UnsupportedBaseError as `generate_replies`.
    """
    longest = max(map(len, choices))
    found = [[0.0] * len(choices) for _ in prompts]
    rows = -(-(max(map(len, prompts)) + longest) // _BLOCK)
    at_once = min(len(choices), _MAX_ROWS)
    try:
        engine = _engine(base, rows, max(BATCH_TOKENS // _BLOCK, rows * at_once), frozenset(), wait)
        for number, prompt in enumerate(prompts):
            for first in range(0, len(choices), at_once):
                some = [list(choice) for choice in choices[first : first + at_once]]
                sampling = Sampling(max_tokens=0, prompt_logprobs=0)
                submit = Submit(
                    id="choices", prompt=list(prompt), sampling=sampling, n=len(some), branches=some
                )
                engine.submit(submit)
                while engine.busy:
                    engine.step()
                for output in engine.take_outputs():
                    if output.finish == "error":
                        raise RuntimeError(f"the choices cannot be compared: {output.error_message}")
                    logprobs = [one.logprob for one in output.prompt_logprobs or ()]
                    found[number][first + output.choice] = sum(logprobs)
            on_progress((number + 1) / len(prompts))
    except _PassError as error:
        raise error.cause from None
    return found


class ScoringError(Exception):
    """The engine refuses a row; the message says why."""


class Scorer:
    """Scores tokens by the engine that serves, so that a trainer has the sampler's own numbers: bit for bit
    on the CPU, where a pass of training rounds otherwise.

    Args:
        wait: called between layers; what it raises ends the scoring.
        int8_cache: whether the engine keeps keys and values in int8.

    Raises UnsupportedBaseError as `generate_replies`.
    """

    def __init__(self, base: nn.Module, wait: Callable[[], None], *, int8_cache: bool = False) -> None:
        self._base, self._wait = base, wait
        self._kv_dtype = torch.int8 if int8_cache else None
        self._engine: Engine | None = None
        self._blocks = self._versions = 0

    def logprobs(
        self,
        adapter: AdapterWeights,
        rows: Sequence[Sequence[int]],
        targets: Sequence[Sequence[Sequence[int]]],
    ) -> list[list[list[float]] | None]:
        """Return the logprobs, in nats, of the tokens that are named after each token of each row.

        A row whose logits are not finite gets None. Raises ScoringError.
        """
        asked = [_Row(str(number), [*ids, 0], 0) for number, ids in enumerate(rows)]
        engine = self._prepared(max(row.blocks for row in asked), sum(row.blocks for row in asked))
        self._versions += 1
        version = f"{_VERSION} {self._versions}"
        found: list[list[list[float]] | None] = [None] * len(rows)
        try:
            engine.put_adapter(version, adapter)
            for row, named in zip(asked, targets, strict=True):
                places = {place: list(tokens) for place, tokens in enumerate(named, start=1)}
                sampling = Sampling(max_tokens=0, prompt_logprobs=0, prompt_targets=places)
                refs = [AdapterRef(version)]
                engine.submit(Submit(id=row.id, prompt=row.ids, sampling=sampling, adapters=refs))
            while engine.busy:
                engine.step()
            for output in engine.take_outputs():
                if output.finish == "error" and output.error_code != "not_finite":
                    raise ScoringError(f"row {output.id} cannot be scored: {output.error_message}")
                if output.prompt_logprobs is not None and output.finish != "error":
                    found[int(output.id)] = [one.named for one in output.prompt_logprobs]
        except BaseException as error:
            self._engine = None  # its sequences are half done
            raise error.cause if isinstance(error, _PassError) else error from None
        engine.unload_adapter(version)
        engine.versions.take_dropped()  # which nobody else asks for
        return found

    def _prepared(self, longest: int, blocks: int) -> Engine:
        """Return an engine with room for rows of so many blocks, all of them at once if they are few."""
        wanted = max(longest, min(blocks, BATCH_TOKENS // _BLOCK))
        if self._engine is None or wanted > self._blocks:
            self._engine = None
            self._blocks = wanted
            self._engine = _engine(
                self._base, wanted, wanted, frozenset(), self._wait, kv_dtype=self._kv_dtype
            )
        return self._engine


def stop_ids(base: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a reply: those of the base's generation config, its config and the
    tokenizer."""
    own = getattr(tokenizer, "eos_token_id", None)
    return eos_ids(base) | (frozenset() if own is None else {own})


@dataclass(eq=False)
class _Row:
    """A sequence. ids: the prompt. most: tokens of the longest reply."""

    id: str
    ids: list[int]
    most: int
    reply: list[int] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        return -(-(len(self.ids) + self.most) // _BLOCK)


def _run(
    engine: Engine,
    asked: Sequence[_Row],
    adapters: list[AdapterRef],
    on_progress: Callable[[float], None] | None,
    total: int,
) -> None:
    """Generate the replies. A sequence is submitted once its longest reply has room: none is computed
    twice."""
    waiting, live = deque(asked), dict[str, _Row]()
    room = engine.pool.capacity // len(engine.model.groups)
    while waiting or live:
        while waiting and waiting[0].blocks <= room:
            row = waiting.popleft()
            room -= row.blocks
            live[row.id] = row
            sampling = Sampling(temperature=0.0, max_tokens=row.most)
            engine.submit(Submit(id=row.id, prompt=row.ids, sampling=sampling, adapters=adapters))
        engine.step()
        for output in engine.take_outputs():
            row = live[output.id]
            _take(row, output)
            if output.finish is not None:
                del live[output.id]
                room += row.blocks
        if on_progress:
            begun = sum(len(row.reply) / row.most for row in live.values())
            on_progress((total - len(waiting) - len(live) + begun) / total)


def _take(row: _Row, output: SequenceOutput) -> None:
    # A row whose logits overflow has said all that it can say.
    if output.finish == "error" and output.error_code != "not_finite":
        raise RuntimeError(f"no reply can be generated: {output.error_message}")
    row.reply += output.tokens if output.stop_token is None else output.tokens[:-1]


def _engine(
    base: nn.Module,
    longest: int,
    blocks: int,
    stops: frozenset[int],
    wait: Callable[[], None],
    *,
    kv_dtype: torch.dtype | None = None,
) -> Engine:
    """Return an engine with `blocks` of keys and values, and at least those of the `longest` sequence."""
    try:
        model = _GatedModel(base, wait, kv_dtype)
    except UnsupportedBaseError as error:
        raise UnsupportedBaseError(
            f"metrics and sample_prompts need replies, and {error}; leave them out, or choose another base"
        ) from error
    return Engine(
        base,
        name="replies",
        limits=SchedulerLimits(_MAX_ROWS, _STEP_TOKENS, longest * _BLOCK),
        kv_blocks=max(blocks, longest) * len(model.groups) + RESERVED_BLOCKS,
        block_size=_BLOCK,
        slots=1,
        eos_ids=stops,
        model=model,
    )


class _PassError(BaseException):
    """Carries an exception of a pass through the engine, which would otherwise fail its sequences and
    continue."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


class _GatedModel(ServedModel):
    """Calls `wait` between layers. What it raises, or the pass itself, does not concern the pass's
    sequences."""

    def __init__(self, base: nn.Module, wait: Callable[[], None], kv_dtype: torch.dtype | None) -> None:
        super().__init__(base, slots=1, kv_dtype=kv_dtype)

        def wait_or_note(*_: object) -> None:
            try:
                wait()
            except Exception as error:
                raise _PassError(error) from error

        for module in self._view.modules():
            # A decoder layer, which knows its attention. What is in it may run as one call of the kernels.
            if any(getattr(child, "layer_idx", None) is not None for child in module.children()):
                module.register_forward_pre_hook(wait_or_note)

    def forward(self, batch: StepBatch) -> Outputs:
        try:
            return super().forward(batch)
        except Exception as error:
            raise _PassError(error) from error


SHOWN_REPLIES = 5
"""Held-out prompts that a report begins with; answered even where no metric is measured."""
_ROOM = 16
"""Tokens that a generated reply may have beyond one and a half times the longest held-out one."""
_MOST_TOKENS = 1024
_HEAD = 12
"""Characters at the end of a turn's head by which it is found."""
_MARK = "\N{BLACK SQUARE}"
BASE_METRICS, PARENT_METRICS = "base_metrics.json", "parent_metrics.json"


@dataclass(frozen=True)
class Replies:
    """One subject's metrics, and its replies to the held-out prompts, in their order.

    For a classifier the replies are labels, with the loss of each row in nats. how: the source of the labels.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    how: str = ""


class Measuring:
    """Replies of the adapter as it is now, and of the base, to held-out prompts.

    Without metrics a few replies are generated to be looked at.
    """

    def __init__(
        self,
        trainable: Trainable,
        tokenizer: Any,
        recipe: Recipe,
        held_out: Dataset | None,
        folder: Path,
        listen: Listen,
        gate: Gate,
        *,
        asked: bool = True,
    ) -> None:
        """Initialize.

        Args:
            asked: whether the recipe was given metrics. Else a base that cannot generate replies, or too
                little memory for them, is no failure.
        """
        self._trainable = trainable
        self._tokenizer = dated_tokenizer(tokenizer, recipe)
        self._recipe = recipe
        self._required, self._failed = asked, False
        count = recipe.metric_rows if recipe.metrics else min(SHOWN_REPLIES, recipe.metric_rows)
        self._prompts = list(held_out.prompts[:count]) if held_out is not None else []
        self._samples = [as_chat(self._tokenizer, text) for text in recipe.sample_prompts]
        self._folder = folder
        self._listen = listen
        self._gate = gate

    @property
    def prompts(self) -> Sequence[Question]:
        """Held-out rows that replies are generated for."""
        return self._prompts

    def shown(self) -> list[dict[str, Any]]:
        """Return line, slice, prompt and reference of the rows that a report begins with."""
        texts = (prompt.ids.tolist() for prompt in self._prompts)
        return self._rows_of(self._prompts, texts)

    def _rows_of(self, rows: Sequence[Question], ids: Iterable[list[int]]) -> list[dict[str, Any]]:
        return [
            {
                "line": row.line,
                "slice": row.slice,
                "prompt": last_turn(self._tokenizer, tokens)[-LONGEST:],
                "reference": row.reference[:LONGEST],
            }
            for row, tokens in zip(rows[:SHOWN_REPLIES], ids, strict=False)
        ]

    def base(self) -> Replies:
        """Return the base's replies; measured once in a run, however often it is resumed."""
        return self._once("base", self._folder / BASE_METRICS)

    def parent(self) -> Replies:
        """Return the replies of the parent adapter, if there is one; measured once, as the base's."""
        if not self._trainable.has_parent:
            return Replies()
        with self._trainable.at_start():
            return self._once("parent", self._folder / PARENT_METRICS)

    def _once(self, subject: str, file: Path) -> Replies:
        if not self.prompts:
            return Replies()
        with contextlib.suppress(OSError, ValueError, TypeError):
            held = Replies(**json.loads(file.read_text()))
            if len(held.texts) == len(self.prompts) and set(held.metrics) >= set(self._recipe.metrics):
                return held
        found = self._measure(subject)
        write_atomically(file, json.dumps(asdict(found)))
        return found

    def adapter(self) -> Replies:
        """Return the replies of the adapter as it is now."""
        return self._measure("adapter")

    def active(self) -> Replies:
        """Return the replies of the active version; this one's model has its weights."""
        return self._measure("active")

    def sample(self, step: int) -> None:
        """Answer the recipe's prompts; at step 0 with the base."""
        if not self._samples:
            return
        replies = self._replies(self._samples, "samples", bare=not step)
        for prompt, text in zip(self._recipe.sample_prompts, replies, strict=True):
            self._listen(events.Sampled(at=time.time(), step=step, prompt=prompt, text=text))

    def _measure(self, subject: str) -> Replies:
        if not self.prompts or self._failed:
            return Replies()
        self._listen(events.Phase(at=time.time(), name="measuring", message=subject))
        asked = [prompt.ids.tolist() for prompt in self._prompts]
        try:
            replies = self._replies(
                asked, f"measuring {subject}", bare=subject == "base", longest=self._reply_tokens()
            )
        except Exception as error:
            if self._required or not (isinstance(error, UnsupportedBaseError) or is_out_of_memory(error)):
                raise
            self._failed = True
            message = f"No replies to held-out prompts are compared: {error}"
            self._listen(events.Notice(at=time.time(), level="warn", message=message))
            return Replies()
        references = [prompt.reference for prompt in self._prompts]
        found = {name: mean(name, replies, references) for name in self._recipe.metrics}
        if found:
            rows = len(self._prompts)
            self._listen(events.Measured(at=time.time(), subject=subject, metrics=found, rows=rows))
        return Replies(found, replies)

    def _reply_tokens(self) -> int:
        """Return the tokens of the longest generated reply: no held-out one is cut unless that was asked."""
        recipe = self._recipe
        if self._required:
            return recipe.metric_tokens
        longest = max(len(prompt.reply) for prompt in self._prompts)
        most = _MOST_TOKENS if recipe.metrics else recipe.metric_tokens
        return min(most, longest + longest // 2 + _ROOM)

    def _replies(
        self, prompts: Sequence[list[int]], name: str, *, bare: bool, longest: int | None = None
    ) -> list[str]:
        def on_progress(part: float) -> None:
            self._listen(events.StageProgress(at=time.time(), name=name, part=part))

        return generate_replies(
            self._trainable.base,
            None if bare else self._trainable.weights(),
            self._tokenizer,
            prompts,
            longest or self._recipe.metric_tokens,
            on_progress=on_progress,
            wait=self._gate.wait,
        )


def last_turn(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of a prompt's last turn, without what the chat template puts around it."""
    text: str = tokenizer.decode(ids)
    if tokenizer.chat_template:
        before, _, after = tokenizer.decode(as_chat(tokenizer, _MARK)).partition(_MARK)
        # The end of a turn's head: of the user, or of a tool.
        text = text.removesuffix(after).rpartition(before[-_HEAD:])[2]
    for special in tokenizer.all_special_tokens:
        text = text.replace(special, "")
    return text.strip()


def as_chat(tokenizer: Any, text: str) -> list[int]:
    """Return a user's message as the base's chat template renders it; as it is, if the base has none."""
    if not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    return ChatTokenizer(tokenizer).encode_messages([{"role": "user", "content": text}])
