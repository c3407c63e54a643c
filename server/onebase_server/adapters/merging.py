"""Merging of versions: checked by their reports, merged by the verifier, then proved like an upload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from onebase_adapters.names import label
from onebase_adapters.registry import VersionRecord
from onebase_adapters.store.blobs import AdapterFiles
from onebase_edge.errors import InvalidRequestError, UnavailableError, VersionFailedError
from onebase_protocol.adapters import MergeMethod, MergeSign
from onebase_server.adapters.service import AdapterService, VersionOptions
from onebase_server.processes.verifier_client import RejectedError, VerifierClient, VerifierGoneError
from onebase_server.storage.calls import storage_errors

PRUNING: tuple[MergeMethod, ...] = ("ties", "dare_linear", "dare_ties")
"""Methods that keep a part of each matrix, and so need `density`."""
RANDOM: tuple[MergeMethod, ...] = ("dare_linear", "dare_ties")
SIGNED: tuple[MergeMethod, ...] = ("ties", "dare_ties")
MOST_MERGES = 4
"""Largest number of merges of one tenant that run or wait. They are short requests, and others' proofs wait
for them."""
_FP32 = 4
_RETRY_AFTER = 5.0


@dataclass(frozen=True)
class MergeSettings:
    """Settings of a merge; see `proof.merging.MergeRecipe`. A setting that the method does not use is
    None."""

    method: MergeMethod
    density: float | None
    sign: MergeSign | None
    seed: int | None


class Merging:
    """Merges versions into new ones. Called from one event loop.

    Args:
        max_rank: of the engine's slots.
        max_bytes: of a version's two files.
    """

    def __init__(
        self, adapters: AdapterService, verifier: VerifierClient, *, max_rank: int, max_bytes: int
    ) -> None:
        self._adapters = adapters
        self._verifier = verifier
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._merges: Counter[str] = Counter()

    def parents(self, tenant: str, terms: Sequence[tuple[str, float]]) -> list[tuple[VersionRecord, float]]:
        """Return the versions that a request names (`name` or `name@version`), each with its weight.

        Raises AdapterNotFoundError, StateConflictError (not ready), ForbiddenError (another tenant's,
        shared), and InvalidRequestError for a version that is named twice."""
        names = self._adapters.catalog.of(tenant)
        found: list[tuple[VersionRecord, float]] = []
        for number, (reference, weight) in enumerate(terms):
            version = names.find(reference, param=f"adapters[{number}].name")
            names.check_own(version.name, "merge it into others")
            if any(version.digest == other.digest for other, _ in found):
                raise InvalidRequestError(
                    f"adapters[{number}].name: {label(version.name, version.digest)} is there already. Name "
                    "it once, with the sum of its weights.",
                    param=f"adapters[{number}].name",
                )
            found.append((version, weight))
        return found

    def check_parents(self, parents: Sequence[tuple[VersionRecord, float]], method: MergeMethod) -> int:
        """Return about how many bytes the result will take. Raises InvalidRequestError for what cannot be
        merged."""
        reports = [(version, version.report or {}) for version, _ in parents]
        for number, (version, report) in enumerate(reports):
            if set(report.get("kinds", ())) != {"lora"}:
                kinds = " and ".join(report.get("kinds", ())) or "unknown"
                raise InvalidRequestError(
                    f"adapters[{number}].name: {label(version.name, version.digest)} is of kind {kinds}, and "
                    "PEFT merges plain LoRA alone. Leave it out.",
                    param=f"adapters[{number}].name",
                    code="adapter_not_composable",
                )
        ranks = [int(report["rank"]) for _, report in reports]
        # The result is in fp32, whatever the files are in.
        sizes = [max(v.files.weights.size, _FP32 * int(report["parameters"])) for v, report in reports]
        if method == "cat":
            self._check_sum(ranks)
        elif len(set(ranks)) > 1:
            each = ", ".join(
                f"{label(version.name, version.digest)} has {rank}"
                for (version, _), rank in zip(reports, ranks, strict=True)
            )
            raise InvalidRequestError(
                f"method: {method} needs the same rank in all adapters ({each}). Use cat, which takes any.",
                param="method",
            )
        needed = sum(sizes) if method == "cat" else max(sizes)
        if needed > self._max_bytes:
            raise InvalidRequestError(
                f"adapters: the result takes about {needed} bytes, over --max-upload ({self._max_bytes}). "
                "Merge fewer, or raise it.",
                param="adapters",
            )
        return needed

    def _check_sum(self, ranks: Sequence[int]) -> None:
        if (total := sum(ranks)) > self._max_rank:
            raise InvalidRequestError(
                f"method: cat makes rank {' + '.join(map(str, ranks))} = {total}, and this server takes "
                f"{self._max_rank}. Merge fewer, use another method, or start it with --max-rank {total}.",
                param="method",
            )

    async def merge(
        self,
        tenant: str,
        name: str,
        parents: Sequence[tuple[VersionRecord, float]],
        recipe: MergeSettings,
        options: VersionOptions,
        *,
        actor: str = "",
    ) -> VersionRecord:
        """Merge the parents and register the result, which is then proved like an upload.

        Raises VersionFailedError, UnavailableError, DiskFullError.
        """
        await self._adapters.check_parents(tenant, name, [version for version, _ in parents], actor=actor)
        if self._merges[tenant] >= MOST_MERGES:
            raise UnavailableError(
                f"{MOST_MERGES} merges of tenant {tenant!r} run or wait already. Send it when one is done.",
                code="merges_busy",
                retry_after=_RETRY_AFTER,
            )
        self._merges[tenant] += 1
        try:
            with storage_errors(name):
                files = await self._files(tenant, parents, recipe)
        finally:
            self._merges[tenant] -= 1
            if not self._merges[tenant]:
                del self._merges[tenant]
        given = {"density": recipe.density, "sign": recipe.sign, "seed": recipe.seed}
        source = {
            "kind": "merge",
            "method": recipe.method,
            **{key: value for key, value in given.items() if value is not None},
            "parents": [
                {"name": version.name, "version": version.digest, "weight": weight}
                for version, weight in parents
            ],
        }
        return await self._adapters.add(tenant, name, files, source, options, actor=actor)

    async def _files(
        self, tenant: str, parents: Sequence[tuple[VersionRecord, float]], recipe: MergeSettings
    ) -> AdapterFiles:
        """Merge the parents in the verifier. Raises VersionFailedError, UnavailableError, StoreError."""
        called = [(label(version.name, version.digest), version.files, weight) for version, weight in parents]
        try:
            return await self._verifier.merge(
                called,
                tenant=tenant,
                method=recipe.method,
                density=recipe.density,
                sign=recipe.sign or "total",
                seed=recipe.seed or 0,
            )
        except RejectedError as error:
            raise VersionFailedError(error.message, code=error.code) from error
        except VerifierGoneError as error:
            raise UnavailableError(
                f"Adapters cannot be merged now: {error}.",
                code="verifier_unavailable",
                retry_after=_RETRY_AFTER,
            ) from error
