"""Grammars that sequences follow: JSON schemas, regular expressions, grammars in Lark's or GBNF's notation.

Grammars come from anybody, so other processes compile them and compute which tokens may come next
(`grammar_process.py`, by llguidance). One of them, the template, knows the tokenizer and forks the others in
milliseconds: one for each grammar that is new, to compile it on trial, and one for each tenant, its follower
(`grammar_follower.py`), which compiles what a trial has shown to be harmless and computes masks next to the
forward pass.

No step waits for a grammar, and for masks at most GRACE_SECONDS. A sequence whose grammar is being compiled,
or whose mask is not there yet, sits out steps while others continue. What hangs or ends a process costs the
request that it came with its answer, and other sequences of the same tenant the time until the next process
has caught up.
"""

from __future__ import annotations

import logging
import select
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np

from onebase_engine.engine import grammar_link as link
from onebase_engine.engine.grammar_follower import DEATHS, Follower, GrammarError
from onebase_engine.engine.grammar_link import (
    DID_NOT_START,
    TOOK_MORE,
    WAS_NOT_STARTED,
    Compile,
    Compiled,
    Process,
    ProcessGoneError,
    Template,
)
from onebase_engine.engine.messages import Grammar
from onebase_engine.engine.sequence import Segment, SequenceState

COMPILING = 2
"""Limit of the grammars that are compiled on trial at once, one of each tenant: a slow one lets others
pass."""
COMPILE_BUDGET, BUDGET_SECONDS = 12.0, 60.0
"""Seconds of a processor that compiling may take of one tenant, on trial and in its follower, in so many
seconds."""
LEAST_CHARGE = 0.01
"""Seconds that a trial is charged at least, for the process that it takes."""
GRACE_SECONDS = 0.01
"""Longest time that a step waits for masks after its forward pass."""
IDLE_SECONDS = 0.01
"""Longest time that an engine waits whose sequences all sit out."""
FOLLOWERS, IDLE_FOLLOWERS = 64, 8
"""Limits of the tenants whose grammars are followed at once, and of the followers kept without sequences."""
HARMFUL_SECONDS = 600.0
"""Time for which a grammar that ended processes is refused without another trial."""
REMEMBERED = 1000
"""Limit of the grammars that are remembered as harmful, and of those remembered as harmless."""

logger = logging.getLogger(__name__)


Code = Literal["grammar_refused", "grammars_busy", "grammar_limit"]


@dataclass(frozen=True)
class Opened:
    """A grammar that a tenant's sequences may follow from now on, or why they may not."""

    tenant: str
    key: str
    error: str | None = None
    code: Code = "grammar_refused"
    retry_after: float | None = None
    """Seconds."""


@dataclass
class _Trial:
    """A grammar that no process has compiled yet."""

    grammar: Grammar
    tenants: list[str]
    """Tenants that sent it, in order."""
    payer: str = ""
    """The tenant that is charged for the process."""
    process: Process | None = None
    deaths: int = 0
    unstarted_since: float | None = None
    """Monotonic time since which its process has not started."""

    def waited(self) -> float:
        """Return the seconds for which its process has not started."""
        return 0.0 if self.unstarted_since is None else time.monotonic() - self.unstarted_since


class RefusedGrammarError(Exception):
    """A grammar that may not be followed now. retry_after: seconds, where it may be later."""

    def __init__(self, code: Code, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class Grammars:
    """Grammars of one engine. Not thread-safe. The first process begins with the first grammar.

    Args:
        folder: the base's, whose tokenizer says which text a token stands for.
        vocabulary: logits of a sequence.
        places: sequences and tokens of drafts in one step.
    """

    def __init__(self, folder: Path, vocabulary: int, eos_ids: Iterable[int], places: int) -> None:
        self._vocabulary = vocabulary
        self._shape = places, -(-vocabulary // 32)
        self._settings: dict[str, object] = {
            "folder": str(folder),
            "vocabulary": vocabulary,
            "eos_ids": sorted(eos_ids),
            "places": places,
            "words": self._shape[1],
        }
        self._template: Template | None = None
        self._unusable: str | None = None
        """Reason for which the tokenizer cannot be used."""
        self._followers: OrderedDict[str, Follower] = OrderedDict()
        """Followers by tenant, the least recently used first."""
        self._trials: OrderedDict[str, _Trial] = OrderedDict()
        """Trials by grammar, in order of arrival."""
        self._harmless: OrderedDict[str, None] = OrderedDict()
        """Grammars that a trial has compiled."""
        self._harmful: OrderedDict[tuple[str | None, str], tuple[float, str]] = OrderedDict()
        """Grammars that ended a trial, or for one tenant its follower: until when they are refused, and the
        reason."""
        self._spent: dict[str, float] = {}
        """Monotonic time up to which each tenant's compilations are accounted for; see COMPILE_BUDGET."""
        self._opened: list[Opened] = []

    # ---- compiling --------------------------------------------------------------------------

    def open_grammar(self, grammar: Grammar, tenant: str, count: int) -> str:
        """Have a grammar compiled for `count` sequences of a tenant, and return its key.

        `opened` reports when it is compiled. Each sequence is to be given to `forget`, or all of them to
        `close`.

        Raises:
            RefusedGrammarError: it is known to be harmful, or too much is being compiled.
        """
        key = blake2b(
            f"{grammar.kind}\n{grammar.text}\n{grammar.before}".encode(), digest_size=16
        ).hexdigest()
        follower = self._followers.get(tenant)
        self._check(key, tenant, follower)
        if follower is None:
            follower = self._followers[tenant] = Follower(self._shape, self._vocabulary)
        self._followers.move_to_end(tenant)
        follower.users[key] = follower.users.get(key, 0) + count
        follower.grammars[key] = grammar
        if key in follower.compiled:
            self._opened.append(Opened(tenant, key))
            return key
        follower.opening.add(key)
        follower.errors.pop(key, None)
        if key in self._harmless:
            follower.queue(key)
            return key
        tenants = self._trials.setdefault(key, _Trial(grammar, [])).tenants
        if tenant not in tenants:
            tenants.append(tenant)
        return key

    def close(self, tenant: str, key: str, count: int) -> None:
        """Note that so many sequences of a tenant follow a grammar no longer."""
        self._followers[tenant].release(key, count)
        trial = self._trials.get(key)
        if trial is not None and not any(key in follower.users for follower in self._followers.values()):
            self._end_trial(key)
        idle = [name for name, follower in self._followers.items() if not follower.users]
        for name in idle[:-IDLE_FOLLOWERS]:
            self._followers.pop(name).end()

    def opened(self, timeout: float = 0.0) -> list[Opened]:
        """Return the grammars that have been compiled since the last call, or refused.

        timeout: longest time to wait for anything to come, in seconds.
        """
        if any(follower.users or follower.process for follower in self._followers.values()):
            self._work()
            if timeout and not self._opened:
                self._poll([*self._running_trials(), *self._followers.values()], timeout)
            self._receive()
        opened, self._opened = self._opened, []
        return opened

    def _check(self, key: str, tenant: str, follower: Follower | None) -> None:
        """Raise RefusedGrammarError if a grammar cannot be opened now."""
        now = time.monotonic()
        until, reason = max(self._harmful.get((who, key), (0.0, "")) for who in (None, tenant))
        if self._unusable is not None:
            raise RefusedGrammarError("grammar_refused", self._unusable)
        if now < until:
            raise RefusedGrammarError("grammar_refused", reason)
        active = sum(bool(one.users) for one in self._followers.values())
        if (follower is None or not follower.users) and active >= FOLLOWERS:
            message = f"grammars of {FOLLOWERS} tenants are followed at the moment, and no more can be"
            raise RefusedGrammarError("grammars_busy", message, 5.0)
        if key not in self._harmless and key not in self._trials:
            self._check_budget(tenant)

    def _check_budget(self, tenant: str) -> None:
        """Raise RefusedGrammarError if a tenant's grammars have taken all the time that they may."""
        wait = self._overspent(tenant)
        if wait >= 0:
            raise RefusedGrammarError("grammar_limit", _limit_message(), wait + 1.0)

    def _overspent(self, tenant: str) -> float:
        """Return the seconds until a tenant's grammars may be compiled again; negative if they may be."""
        return self._spent.get(tenant, 0.0) - time.monotonic() - BUDGET_SECONDS

    def _charge(self, tenant: str, seconds: float) -> None:
        now = time.monotonic()
        if len(self._spent) > REMEMBERED:
            self._spent = {name: at for name, at in self._spent.items() if at > now}
        self._spent[tenant] = (
            max(self._spent.get(tenant, 0.0), now) + seconds * BUDGET_SECONDS / COMPILE_BUDGET
        )

    def _work(self) -> None:
        """Start what can be: the template, trials, followers, and what they can do next."""
        try:
            if self._template is None and self._unusable is None:
                self._template = Template(self._settings)
        except OSError as error:
            self._refuse_all(f"the process that compiles it cannot begin ({error.strerror})", busy=True)
            return
        lives = self._template_lives()
        if self._unusable is not None:
            self._refuse_all(self._unusable, busy=False)
        elif lives:
            self._start_trials()
            for tenant, follower in self._followers.items():
                self._have_work(tenant, follower)

    def _start_trials(self) -> None:
        """Begin trials of tenants that have none, as far as COMPILING allows."""
        busy = {trial.payer for trial in self._trials.values() if trial.process is not None}
        for key, trial in list(self._trials.items()) if len(busy) < COMPILING else ():
            payer = self._payer(key, trial, busy) if trial.process is None else None
            if payer is not None and len(busy) < COMPILING:
                trial.payer = payer
                self._try(key, trial)
                busy.add(payer)

    def _have_work(self, tenant: str, follower: Follower) -> None:
        """Have a follower send what it can; where none can be started, later steps try again."""
        try:
            if self._template is not None:
                follower.work(self._template, kept_only=self._overspent(tenant) >= 0)
        except OSError:
            self._lose_follower(tenant, follower, WAS_NOT_STARTED, blameless=True)

    def _payer(self, key: str, trial: _Trial, busy: set[str]) -> str | None:
        """Return the first tenant that waits for a trial, has no other one and may take the time.

        Those whose earlier ones have taken too long are refused.
        """
        trial.tenants = [one for one in trial.tenants if key in self._keys_opening(one)]
        for tenant in trial.tenants[:]:
            if tenant in busy:
                continue
            try:
                self._check_budget(tenant)
            except RefusedGrammarError as error:
                trial.tenants.remove(tenant)
                self._refuse(key, str(error), error.code, error.retry_after, only=tenant)
            else:
                return tenant
        if not trial.tenants:
            del self._trials[key]
        return None

    def _keys_opening(self, tenant: str) -> set[str]:
        follower = self._followers.get(tenant)
        return follower.opening if follower is not None else set()

    def _try(self, key: str, trial: _Trial) -> None:
        """Begin a trial, if there is still a template."""
        if self._template is None:
            return
        if trial.unstarted_since is None:
            trial.unstarted_since = time.monotonic()
        try:
            trial.process = Process(self._template)
        except OSError:
            self._lose_trial(key, trial, WAS_NOT_STARTED)
            return
        trial.process.expect(link.COMPILE_SECONDS)
        with suppress(ProcessGoneError):
            trial.process.send(Compile(key, trial.grammar))

    def _running_trials(self) -> list[Process]:
        return [trial.process for trial in self._trials.values() if trial.process is not None]

    def _receive(self) -> None:
        """Take in what has come from all processes."""
        for key, trial in list(self._trials.items()):
            if trial.process is None:
                continue
            try:
                for message in trial.process.receive():
                    if isinstance(message, Compiled) and key in self._trials:
                        self._finish_trial(key, message)
                if key in self._trials:
                    trial.process.check_deadline()
            except ProcessGoneError as error:
                self._lose_trial(key, trial, str(error))
        for tenant, follower in self._followers.items():
            self._receive_from(tenant, follower)

    def _receive_from(self, tenant: str, follower: Follower, *, in_time: bool = False) -> None:
        try:
            for compiled in follower.receive(in_time=in_time):
                self._charge(tenant, compiled.seconds)
                self._report_compiled(tenant, follower, compiled)
        except ProcessGoneError as error:
            blameless = self._is_blameless(str(error))
            if follower.process is not None:  # else it has been lost with the template
                self._lose_follower(tenant, follower, str(error), blameless)

    def _report_compiled(self, tenant: str, follower: Follower, compiled: Compiled) -> None:
        """Report the end of a compilation, unless nobody waits for it."""
        if compiled.key not in follower.opening:
            return
        follower.opening.discard(compiled.key)
        if compiled.not_kept:
            wait = max(self._overspent(tenant), 0.0) + 1.0
            self._opened.append(Opened(tenant, compiled.key, _limit_message(), "grammar_limit", wait))
            return
        code: Code = "grammars_busy" if compiled.busy else "grammar_refused"
        self._opened.append(Opened(tenant, compiled.key, compiled.error, code))

    def _lose_follower(self, tenant: str, follower: Follower, reason: str, blameless: bool) -> None:
        if not blameless:
            self._charge(tenant, follower.compile_cost())
        for key, why in follower.lose(reason, blameless=blameless):
            self._blame(key, why, only=tenant)
        if follower.gives_up:
            for key in list(follower.users):
                follower.fail(key, reason)
                self._refuse(key, f"the process that compiles it {reason}", "grammars_busy", only=tenant)

    def _is_blameless(self, reason: str) -> bool:
        """Return True if nothing that a process did is the reason for its end: the template is.

        A process ends with the template, whose own end is seen before.
        """
        if reason == DID_NOT_START:
            self._lose_template()
        return not self._template_lives() or reason == WAS_NOT_STARTED

    def _template_lives(self) -> bool:
        """Return False if the template has ended, and all processes with it."""
        try:
            if self._template is not None:
                self._unusable = self._unusable or self._template.error()
        except ProcessGoneError:
            self._lose_template()
        return self._template is not None

    def _finish_trial(self, key: str, compiled: Compiled) -> None:
        payer = self._trials[key].payer
        self._end_trial(key)
        if compiled.error is not None:
            self._refuse(key, compiled.error, "grammars_busy" if compiled.busy else "grammar_refused")
            return
        self._harmless[key] = None
        if len(self._harmless) > REMEMBERED:
            self._harmless.popitem(last=False)
        for tenant, follower in self._followers.items():
            if key in follower.opening:
                follower.queue(key)
                if tenant == payer:
                    follower.at_any_cost.add(key)

    def _end_trial(self, key: str) -> None:
        """Take a trial out, and charge its tenant for it."""
        self._end_process(self._trials.pop(key))

    def _end_process(self, trial: _Trial) -> None:
        """End a trial's process, if it has one, and charge its tenant for it."""
        if trial.process is not None:
            self._charge(trial.payer, max(LEAST_CHARGE, trial.process.cost()))
            trial.process.kill()
            trial.process = None

    def _lose_trial(self, key: str, trial: _Trial, reason: str) -> None:
        """Try a grammar again whose process has ended once, or did not start; blame it otherwise."""
        started = trial.process is not None and trial.process.pid is not None
        blameless = self._is_blameless(reason)
        self._end_process(trial)
        if started:
            trial.unstarted_since = None
        trial.deaths += not blameless
        if trial.deaths >= DEATHS or reason.startswith(TOOK_MORE):
            del self._trials[key]
            self._blame(key, reason)
        elif blameless and not started and trial.waited() >= link.START_SECONDS:
            del self._trials[key]
            self._refuse(key, f"the process that compiles it {reason}", "grammars_busy")
        else:
            self._trials.move_to_end(key)

    def _blame(self, key: str, reason: str, only: str | None = None) -> None:
        """Refuse a grammar for which processes have ended, for some time: to one tenant if its own did."""
        message = f"the process that compiles it {reason}"
        if only is None:
            self._harmless.pop(key, None)
        self._harmful[only, key] = time.monotonic() + HARMFUL_SECONDS, message
        if len(self._harmful) > REMEMBERED:
            self._harmful.popitem(last=False)
        self._refuse(key, message, "grammar_refused", only=only)

    def _refuse(
        self, key: str, message: str, code: Code, retry_after: float | None = None, only: str | None = None
    ) -> None:
        """Report a grammar as refused to all who wait for it, or to one tenant."""
        for tenant, follower in self._followers.items():
            if key in follower.opening and only in (None, tenant):
                follower.opening.discard(key)
                self._opened.append(Opened(tenant, key, message, code, retry_after))

    def _refuse_all(self, message: str, *, busy: bool) -> None:
        for key in list(self._trials):
            self._end_trial(key)
        for key in {key for follower in self._followers.values() for key in follower.opening}:
            self._refuse(key, message, "grammars_busy" if busy else "grammar_refused")

    def _lose_template(self) -> None:
        """End the template, which forks no more, and all processes; others are started when needed."""
        if self._template is not None:
            logger.error(
                "the process that starts those for grammars does not answer; another takes its place"
            )
            self._template.end()
            self._template = None
            for trial in self._trials.values():
                self._end_process(trial)
            for follower in self._followers.values():
                if follower.process is not None:
                    follower.lose("ended with the one that started it", blameless=True)

    # ---- masks ------------------------------------------------------------------------------

    def awaits(self, sequence: SequenceState) -> bool:
        """Return True if a sequence has to sit out steps, until its grammar or its mask has come."""
        return sequence.grammar is not None and self._followers[sequence.tenant].awaits(sequence)

    def request(self, segments: Iterable[Segment]) -> bool:
        """Request the masks that a step needs. Return True if it needs any."""
        by_tenant: dict[str, list[Segment]] = {}
        for segment in segments:
            if segment.sequence.grammar is not None and segment.samples:
                by_tenant.setdefault(segment.sequence.tenant, []).append(segment)
        for tenant, some in by_tenant.items():
            follower = self._followers[tenant]
            if not follower.is_busy:
                follower.request(
                    (one.sequence, one.draft) for one in some if one.sequence.grammar in follower.compiled
                )
        return bool(by_tenant)

    def masks(
        self, segments: Iterable[Segment], computed: Callable[[], None]
    ) -> dict[SequenceState, np.ndarray | GrammarError | None]:
        """Return the masks of the sequences that `request` was given, valid until the next `request`.

        A mask is [1 + draft, words] int32, or None if it has not come: the sequence is to sit out.

        computed: waits for the forward pass, so that no time is counted in which an accelerator computes.
        """
        constrained = [
            segment for segment in segments if segment.sequence.grammar is not None and segment.samples
        ]
        pending = {
            segment.sequence.tenant: self._followers[segment.sequence.tenant] for segment in constrained
        }
        pending = self._still_pending(pending)
        if pending:
            computed()
            self._wait(self._still_pending(pending))
        return {
            segment.sequence: self._followers[segment.sequence.tenant].masks(segment)
            for segment in constrained
        }

    def _wait(self, pending: dict[str, Follower]) -> None:
        """Wait for masks of tenants for which steps may wait."""
        began = time.monotonic()
        waiting = {tenant: follower for tenant, follower in pending.items() if follower.has_grace()}
        while waiting and (left := began + GRACE_SECONDS - time.monotonic()) > 0:
            self._poll(waiting.values(), left)
            answered = waiting
            waiting = self._still_pending(waiting)
            for tenant in answered.keys() - waiting.keys():
                answered[tenant].charge_grace(time.monotonic() - began)
        for follower in waiting.values():
            follower.charge_grace(time.monotonic() - began)

    def _still_pending(self, followers: dict[str, Follower]) -> dict[str, Follower]:
        """Return those whose masks are in flight after what has come is taken in."""
        for tenant, follower in followers.items():
            if follower.in_flight:
                self._receive_from(tenant, follower, in_time=True)
        return {tenant: follower for tenant, follower in followers.items() if follower.in_flight}

    def _poll(self, processes: Iterable[Process | Follower], seconds: float) -> None:
        """Wait until one of them has sent something, or takes what is to be sent."""
        poll = select.poll()
        for one in processes:
            process = one.process if isinstance(one, Follower) else one
            if process is not None:
                poll.register(process.fileno(), select.POLLIN | (select.POLLOUT if process.unsent else 0))
        poll.poll(seconds * 1000)

    def note_drawn(self, sequences: Iterable[SequenceState], *, foresee: bool) -> None:
        """Record the new tokens of sequences that continue.

        foresee: the tokens that they must continue with are requested. It comes into `SequenceState.forced`
        with a later call, or
            not at all: nobody waits for it.
        """
        by_tenant: dict[str, list[SequenceState]] = {}
        for sequence in sequences:
            if sequence.grammar is not None:
                by_tenant.setdefault(sequence.tenant, []).append(sequence)
        for tenant, some in by_tenant.items():
            self._followers[tenant].note_drawn(some, foresee)

    def forget(self, sequence: SequenceState) -> None:
        """Note that a sequence has ended."""
        if sequence.grammar is not None:
            self._followers[sequence.tenant].forget(sequence)
            self.close(sequence.tenant, sequence.grammar, 1)

    def end(self) -> None:
        """End all processes. Where grammars are still followed, the next call begins others."""
        for process in self._running_trials():
            process.kill()
        for trial in self._trials.values():
            trial.process = None
        for follower in self._followers.values():
            follower.lose("was ended", blameless=True)
        if self._template is not None:
            self._template.end()
            self._template = None


def _limit_message() -> str:
    return (
        f"grammars of this tenant have taken {COMPILE_BUDGET:g} s of a processor in the last "
        f"{BUDGET_SECONDS:g} s, which is the limit; those that are still compiled work"
    )
