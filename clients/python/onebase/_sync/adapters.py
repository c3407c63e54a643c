# Generated from _async/adapters.py by tools/generate_sync.py; do not edit.
"""`client.adapters`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from onebase_protocol.common import ListAnswer
from onebase_protocol.text import GeneratedAnswer

from .._core import adapters, parse, requests, rows
from .._core.config import UNSET, Unset
from .._core.requests import Call
from .._core.rows import AnswerComparison, sha256_of
from .._core.targets import atomic_target, check_free, check_space
from ..adapter_types import (
    Activation,
    Adapter,
    AdapterVersion,
    MergeMethod,
    MergeSign,
    ProgressCallback,
    Rollout,
    RolloutJudge,
    RolloutRules,
    SliceScore,
    VersionFile,
    VersionFiles,
    VersionGates,
)
from ..errors import UnprocessableError
from ..types import AdapterWeight
from .http import Http


class Adapters:
    """`client.adapters`: the server's adapters, how new versions get there, and which version answers."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def list(self) -> tuple[Adapter, ...]:
        """Return every adapter of the server."""
        return (self._http.ask(adapters.LIST, ListAnswer[Adapter])).data

    def retrieve(self, name: str) -> Adapter:
        """Return one adapter.

        Raises:
            NotFoundError: there is no adapter of this name.
        """
        return self._http.ask(adapters.retrieve(name), Adapter)

    def versions(self, name: str) -> tuple[AdapterVersion, ...]:
        """Return all versions of an adapter, the newest first.

        Raises:
            NotFoundError: there is no such adapter.
        """
        return (self._http.ask(adapters.versions(name), ListAnswer[AdapterVersion])).data

    def version(self, name: str, version: str) -> AdapterVersion:
        """Return one version, with its report.

        Args:
            version: Its digest, or at least the first 8 digits; or the id of a pull.

        Raises:
            NotFoundError: there is no such version.
        """
        return self._http.ask(adapters.version(name, version), AdapterVersion)

    def history(self, name: str) -> tuple[Activation, ...]:
        """Return the versions that answered to the name, and since when; the newest entry first.

        Raises:
            NotFoundError: there is no such adapter.
        """
        return (self._http.ask(adapters.history(name), ListAnswer[Activation])).data

    def files(self, name: str, version: str) -> VersionFiles:
        """Return the files of a version, with their sizes and SHA-256 sums, and where its base comes from.

        Args:
            version: Its digest, or at least the first 8 digits.

        Raises:
            NotFoundError: there is no such adapter or version.
            PermissionDeniedError: another tenant shares it, and only its owner may take it elsewhere.
        """
        return self._http.ask(adapters.files(name, version), VersionFiles)

    def compare_answers(
        self,
        a: str | None,
        b: str | None,
        data: str | Path,
        *,
        limit: int | None = None,
        max_tokens: int = 256,
        progress: Callable[[float], object] | None = None,
    ) -> AnswerComparison:
        """Ask two adapters for the likeliest answers to held-out prompts, each with its own defaults, as
        others see it.

        Args:
            a, b: Each a name (its active version) or `name@version`; None: the base.
            data: A JSON Lines file of rows with `messages`, or `prompt` and `completion`.
            limit: Only its first N rows.
            progress: Called with the share of the answers that have arrived.

        Raises:
            ValueError: a row has no prompt.
            OneBaseError: a request failed; see `onebase.errors`.
        """
        found, labels = [], [a or "the base", b or "the base"]
        wanted = rows.held_out_rows(data, limit)
        for number, row in enumerate(wanted):
            answers = []
            for side, adapter in enumerate((a, b)):
                sampling: Any = {"temperature": 0, "max_tokens": max_tokens}
                asked = dict(row.asked)
                if tools := asked.pop("tools", None):
                    sampling["tools"] = tools
                call = requests.generate(
                    asked.get("prompt"), asked.get("messages"), adapter, sampling, stream=False
                )
                answer = parse.generation(self._http.ask(call, GeneratedAnswer), None)
                calls = [(one.name, one.arguments) for one in answer.tool_calls]
                answers.append(rows.calls_text(calls) if calls else answer.text)
                if isinstance(answer.adapter, str):
                    labels[side] = answer.adapter
            if progress is not None:
                progress((number + 1) / len(wanted))
            texts = (row.reference, answers[0], answers[1])
            found.append(rows.ComparedAnswer(row.line, row.question, *texts, slice=row.slice))
        return rows.AnswerComparison(labels[0], labels[1], tuple(found))

    def bom(self, name: str, version: str) -> dict[str, Any]:
        """Return a version's bill of materials: a CycloneDX 1.6 document about its files, its base, the data
        and the recipe of its training, its proof, its signature and its evaluations.

        Args:
            version: Its digest, or at least the first 8 digits.

        Raises:
            NotFoundError: there is no such adapter or version.
            PermissionDeniedError: another tenant shares it.
        """
        return self._http.ask(adapters.bom(name, version), dict[str, Any])

    def gates(self, name: str, version: str) -> VersionGates:
        """Return the gates that the caller would have to pass to activate a version, and which are open.

        Args:
            version: Its digest, or at least the first 8 digits.

        Raises:
            NotFoundError: there is no such adapter or version.
            PermissionDeniedError: another tenant shares it.
        """
        return self._http.ask(adapters.gates(name, version), VersionGates)

    def approve(self, name: str, version: str, approved: bool = True) -> VersionGates:
        """Approve a version for its next activation, or withdraw that.

        Args:
            version: Its digest, or at least the first 8 digits.

        Raises:
            PermissionDeniedError: this key made the version, or the gates name other keys.
            NotFoundError: there is no such adapter or version.
        """
        return self._http.ask(adapters.approve(name, version, approved), VersionGates)

    def send_evaluation(
        self,
        name: str,
        version: str,
        against: str | None,
        metric: str,
        slices: Sequence[SliceScore],
        *,
        data: str | None = None,
    ) -> VersionGates:
        """Send how the scores of a version differ from those of another one on the same rows.

        Args:
            version: Its digest, or at least the first 8 digits.
            against: That of the version that it was compared with, mostly the active one; None: the base.
            metric: The name of what was measured, for people.
            slices: For each slice, the sum of the differences and that of their squares.
            data: SHA-256 (hex) of the file with the rows; a gate may ask for a certain one.

        Raises:
            PermissionDeniedError: this key made the version, the gates name other keys, or it has sent an
                evaluation of more rows.
            NotFoundError: there is no such adapter or version.
        """
        call = adapters.evaluation(name, version, against, metric, slices, data)
        return self._http.ask(call, VersionGates)

    def evaluate(
        self,
        name: str,
        version: str,
        data: str | Path,
        *,
        against: str | None = None,
        limit: int | None = None,
        max_tokens: int = 256,
        progress: Callable[[float], object] | None = None,
    ) -> VersionGates:
        """Ask a version and another one for the likeliest answers to held-out prompts, and send how often
        each was the row's own reply, by the rows' field `slice`.

        Args:
            against: Digest of the other version; None: the one that is active, or the base if none is.
            data, limit, max_tokens, progress: As for `compare_answers`; each row needs a reply.

        Raises:
            ValueError: a row has no prompt, or no reply.
            PermissionDeniedError: this key made the version.
            OneBaseError: a request failed; see `onebase.errors`.
        """
        if against is None:
            against = (self.retrieve(name)).version
        file = sha256_of(data) if limit is None else None
        found = self.compare_answers(
            f"{name}@{version}",
            None if against is None else f"{name}@{against}",
            data,
            limit=limit,
            max_tokens=max_tokens,
            progress=progress,
        )
        return self.send_evaluation(name, version, against, "exact_match", found.exact_by_slice(), data=file)

    def download(
        self,
        name: str,
        path: str | Path,
        *,
        version: str | None = None,
        force: bool = False,
        progress: ProgressCallback | None = None,
    ) -> VersionFiles:
        """Write a version to a folder for `PeftModel.from_pretrained`, as it was sent or trained.

        The folder appears whole or not at all, and only if its content is what the version's digest says.

        Args:
            path: The folder, which must not be there yet.
            version: Its digest, or at least the first 8 digits; None: the active one.
            force: Replace an adapter that is at `path`.
            progress: Called with the bytes that have arrived.

        Raises:
            ValueError: something is at `path`, or no version is active.
            NotFoundError: there is no such adapter or version.
            PermissionDeniedError: another tenant shares it, and only its owner may take it elsewhere.
            OSError: the folder cannot be written, or there is no room for it.
        """
        target = Path(path).expanduser().absolute()
        check_free(target, force=force)
        wanted = version or (self.retrieve(name)).version
        if wanted is None:
            raise ValueError(f"no version of {name} is active: say which one with version=")
        listing = adapters.check_listing(self.files(name, wanted))
        check_space(target.parent, listing.bytes, "the adapter")
        with (
            atomic_target(target, force=force) as work,
            adapters.Download(listing, work, progress) as download,
        ):
            for file in listing.files:
                download.next(file)
                self._receive(name, listing.version, file, download)
                download.finish(file)
            download.add_signature()
        return listing

    def _receive(self, name: str, version: str, file: VersionFile, download: adapters.Download) -> None:
        response = self._http.open_stream(adapters.file(name, version, file.name))
        try:
            with closing(response.chunks()) as chunks:
                for chunk in chunks:
                    download.write(chunk)
        finally:
            response.close()

    def upload(
        self,
        path: str | Path,
        *,
        name: str,
        activate: bool = True,
        wait: bool = True,
        allow_noop: bool = False,
        any_base: bool = False,
        progress: ProgressCallback | None = None,
        defaults: Mapping[str, object] | None = None,
    ) -> AdapterVersion:
        """Send a folder that PEFT saved; the server proves it. The files are streamed from disk.

        The same content under the same name is the same version: sending it twice does no harm.

        Args:
            path: The folder with `adapter_config.json` and `adapter_model.safetensors`, or with mlx-lm's
                `adapters.safetensors`, which the server converts.
            name: What requests ask for. A name that exists gets one more version.
            activate: Activate the version as soon as it is ready, for all requests that begin after that.
            wait: Return when the version is ready, and active if `activate` is set. Otherwise return as soon
                as the files are sent; see the method `wait`.
            allow_noop: Accept an adapter that changes nothing.
            any_base: Accept an adapter whose configuration names another base.
            progress: Called with the bytes that are sent, and then with each stage.
            defaults: Fields of requests for this version by default, such as `{"system": "Be brief.",
                "temperature": 0}`: see `AdapterDefaults`. They replace those in the folder's `onebase.json`
                one by one; None removes one.

        Raises:
            ValueError: the folder holds no adapter, or JSON cannot carry a default; nothing was sent.
            AdapterRejectedError: the server did not accept it.
            ConflictError: it was trained on another base (see `any_base`).
            PayloadTooLargeError, StorageFullError: there is no room for it.
        """
        call = adapters.upload(
            adapters.adapter_folder(path),
            name,
            activate=activate,
            allow_noop=allow_noop,
            any_base=any_base,
            progress=progress,
            defaults=defaults,
        )
        return self._begin(call, activate, wait, progress)

    def pull(
        self,
        repo: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        name: str | None = None,
        activate: bool = True,
        wait: bool = True,
        allow_noop: bool = False,
        any_base: bool = False,
        progress: ProgressCallback | None = None,
    ) -> AdapterVersion:
        """Let the server fetch an adapter from the Hugging Face Hub and prove it.

        Args:
            repo: `org/repo`.
            revision: A branch, a tag or a commit; by default the main branch. The version records the
                commit.
            subfolder: Where in the repository the adapter is, if not at its top.
            name: What requests ask for; by default the repository's name without its owner.
            activate, wait, allow_noop, any_base, progress: As for `upload`.

        Raises:
            ValueError: `repo` is not `org/repo`; nothing was sent.
            AdapterRejectedError: it could not be fetched (codes `hub_...`), or was not accepted.
        """
        call = adapters.pull(
            repo,
            revision,
            subfolder,
            name,
            activate=activate,
            allow_noop=allow_noop,
            any_base=any_base,
        )
        return self._begin(call, activate, wait, progress)

    def merge(
        self,
        parents: Mapping[str, float] | Sequence[AdapterWeight],
        *,
        name: str,
        method: MergeMethod = "linear",
        density: float | None = None,
        sign: MergeSign | None = None,
        seed: int | None = None,
        activate: bool = True,
        wait: bool = True,
        allow_noop: bool = False,
        progress: ProgressCallback | None = None,
    ) -> AdapterVersion:
        """Let the server make one version of several, by PEFT's `add_weighted_adapter`, and prove it.

        Examples:
            >>> client.adapters.merge({"support": 0.7, "legal@3f2a9c41": 0.3}, name="both")  # doctest: +SKIP

        Args:
            parents: The weight of each adapter, by `name` or `name@version`; all plain LoRA. At most 16.
            name: What requests ask for. A name that exists gets one more version.
            method: `cat` is the exact weighted sum, and adds the ranks up. The others need equal ranks, which
                the result has too; `linear` is a rough approximation of the sum.
            density: For `ties`, `dare_linear` and `dare_ties`: the part of each matrix to keep, up to 1.
            sign: For `ties` and `dare_ties`: whether the sign of most is found by their `total` (the default)
                or by their `frequency`.
            seed: For `dare_linear` and `dare_ties`: of what they drop. The same seed gives the same version.
            activate, wait, allow_noop, progress: As for `upload`.

        Raises:
            ValueError: fewer than two adapters; nothing was sent.
            BadRequestError: they cannot be merged so; `param` names the field.
            NotFoundError: there is no such adapter or version.
            PermissionDeniedError: another tenant shares one of them.
            AdapterRejectedError: the result was not accepted.
        """
        call = adapters.merge(
            parents,
            name,
            method=method,
            density=density,
            sign=sign,
            seed=seed,
            activate=activate,
            allow_noop=allow_noop,
        )
        return self._begin(call, activate, wait, progress)

    def wait(self, version: AdapterVersion, *, progress: ProgressCallback | None = None) -> AdapterVersion:
        """Wait until a version is ready, and give it as it is then, with its report.

        Args:
            progress: Called with each stage, and with each step forward in it.

        Raises:
            AdapterRejectedError: the version failed.
        """
        waiting = adapters.Waiting(version, progress)
        while not waiting.over:
            waiting.note_answer(self._http.ask(waiting.question(), AdapterVersion))
            time.sleep(waiting.rest())
        return waiting.version

    def activate(self, name: str, version: str, *, expected: str | Unset | None = UNSET) -> Adapter:
        """Make a version the active one. Requests that have begun end on the version before.

        Args:
            version: Its digest, or at least the first 8 digits.
            expected: Only if this digest is active now, or, with None, only if no version is. By default in
                any case.

        Raises:
            ConflictError: another version than `expected` is active (`.current`), or `version` is not ready.
            NotFoundError: there is no such adapter or version.
        """
        return self._http.ask(adapters.activate(name, version, expected), Adapter)

    def rollback(self, name: str, *, expected: str | Unset | None = UNSET) -> Adapter:
        """Activate the version that was active before the present one.

        Args:
            expected: As for `activate`: the digest to go back from.

        Raises:
            ConflictError: there is no version to go back to, or another version than `expected` is active.
            NotFoundError: there is no such adapter.
        """
        return self._http.ask(adapters.rollback(name, expected), Adapter)

    def deactivate(self, name: str) -> Adapter:
        """Leave the name without an active version. `name@version` still reaches its versions.

        Raises:
            NotFoundError: there is no such adapter.
        """
        return self._http.ask(adapters.deactivate(name), Adapter)

    def pin(self, name: str, pinned: bool = True) -> Adapter:
        """Keep an adapter in memory even if others are used more recently; False ends that. For operators.

        Raises:
            NotFoundError: there is no such adapter.
            PermissionDeniedError: the API key lacks the scope `admin`.
        """
        return self._http.ask(adapters.pin(name, pinned), Adapter)

    def share(self, name: str, shared: bool = True) -> Adapter:
        """Let all tenants use an adapter and look at it; False ends that. For operators.

        Raises:
            NotFoundError: there is no such adapter.
            PermissionDeniedError: the API key lacks the scope `admin`.
        """
        return self._http.ask(adapters.share(name, shared), Adapter)

    def start_rollout(
        self,
        name: str,
        version: str,
        *,
        percent: float = 0.0,
        shadow: float = 0.0,
        by: Literal["caller", "request"] = "caller",
        promote: bool = False,
        rules: RolloutRules | Mapping[str, object] | None = None,
        judge: RolloutJudge | Mapping[str, object] | None = None,
        refusal_phrases: Sequence[str] | None = None,
    ) -> Rollout:
        """Let a version answer a share of an adapter's requests beside the active one, and compare the two.

        Args:
            version: The candidate: its digest, or at least the first 8 digits.
            percent: Percent of the requests that it answers.
            shadow: Percent of the active version's requests of which it gets a copy that nobody sees.
            by: `caller`: each user (`user=` in requests), session or API key is answered by one version;
                `request`: each request is divided anew.
            promote: Whether it is activated by itself once the rules allow it. It is always rolled back by
                itself when it is worse by a margin.
            rules: Rules that differ from the defaults, as in `{"requests": 500, "errors": 0.01}`.
            judge: Adapter that judges a part of the answers, as in `{"adapter": "polite"}`.
            refusal_phrases: Phrases by which an answer counts as a refusal, instead of the server's.

        Raises:
            ConflictError: a rollout runs already, the version is not ready, or no version is active.
            NotFoundError: there is no such adapter or version.
            BadRequestError: a field cannot be so; `param` names it.
        """
        call = adapters.start_rollout(
            name,
            version,
            percent=percent,
            shadow=shadow,
            by=by,
            promote=promote,
            rules=rules,
            judge=judge,
            refusal_phrases=refusal_phrases,
        )
        return self._http.ask(call, Rollout)

    def rollout(self, name: str) -> Rollout:
        """Return the rollout that runs, or else the latest, with the figures of both versions.

        Raises:
            NotFoundError: there is no such adapter, or it never had a rollout.
        """
        return self._http.ask(adapters.rollout(name), Rollout)

    def rollouts(self, name: str) -> tuple[Rollout, ...]:
        """Return the latest rollouts of an adapter, newest first.

        Raises:
            NotFoundError: there is no such adapter.
        """
        return (self._http.ask(adapters.rollouts(name), ListAnswer[Rollout])).data

    def change_rollout(
        self, name: str, *, percent: float | None = None, shadow: float | None = None
    ) -> Rollout:
        """Change the shares of the rollout that runs. A larger `percent` moves nobody back to the active
        version.

        Raises:
            ConflictError: no rollout runs.
            ValueError: neither is given.
        """
        return self._http.ask(adapters.change_rollout(name, percent, shadow), Rollout)

    def promote_rollout(self, name: str) -> Rollout:
        """Activate the candidate of the rollout that runs, which ends it.

        Raises:
            ConflictError: no rollout runs.
        """
        return self._http.ask(adapters.end_rollout(name, "promote"), Rollout)

    def rollback_rollout(self, name: str) -> Rollout:
        """End the rollout that runs: new requests get the active version at once, streams end as they began.

        Raises:
            ConflictError: no rollout runs.
        """
        return self._http.ask(adapters.end_rollout(name, "rollback"), Rollout)

    def delete(self, name: str, version: str | None = None, *, force: bool = False) -> None:
        """Delete one version, or the adapter with all of them. It cannot be undone.

        Args:
            version: Its digest, or at least the first 8 digits; None: all.
            force: Even if it is the active one, or requests run on it; they end with an error.

        Raises:
            ConflictError: requests run on it, or it is the active version.
            NotFoundError: there is no such adapter or version.
        """
        self._http.send(adapters.delete(name, version, force=force))

    def _begin(
        self, call: Call, activate: bool, wait: bool, progress: ProgressCallback | None
    ) -> AdapterVersion:
        try:
            version = self._http.ask(call, AdapterVersion)
        except UnprocessableError as error:
            raise adapters.refused(error) from error
        if not wait:
            return version
        version = self.wait(version, progress=progress)
        return self._activated(version) if activate and not version.active else version

    def _activated(self, version: AdapterVersion) -> AdapterVersion:
        """Activate a ready version that the server is still activating, or could not; then raise why."""
        if not adapters.was_active(version, self.history(version.name)):
            self.activate(version.name, version.version)
        return self.version(version.name, version.version)
