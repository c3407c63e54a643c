"""Adapters, their versions and the proofs of versions."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, field

from onebase_protocol.common import Sparse, Stored, shown_as

LONGEST_DEFAULT: Final = 64 << 10
"""Largest number of characters of a text in an adapter's defaults."""

READY: Final = "ready"
FAILED: Final = "failed"

MergeMethod = Literal["linear", "cat", "ties", "dare_linear", "dare_ties"]
"""PEFT's names of the methods to merge adapters."""
MergeSign = Literal["total", "frequency"]
ModuleKind = Annotated[
    str, shown_as(type="string", enum=["lora", "dora", "alora", "saved", "tokens", "head"])
]


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """A name that requests can ask for. It points at one of its versions, the active one, or at none."""

    object: Literal["adapter"] = "adapter"
    id: str = ""
    name: str
    version: str | None
    """The digest of the active version; None while none is."""
    active: bool
    state: str | None
    """The state of the active version, else of the newest one: see AdapterVersion."""
    kinds: tuple[str, ...]
    """Parts of the active version: `lora`, `dora`, `alora`, `saved`, `tokens`. Like `rank`, `alpha`,
    `targets`, `parameters` and `bytes` it is empty or None while no version is active."""
    targets: tuple[str, ...]
    """The layers that the active version changes, such as `q_proj`."""
    rank: int | None
    alpha: float | None
    parameters: int | None
    bytes: int | None
    base: str
    """The name of the base that it belongs to."""
    tenant: str
    """Tenant that owns it."""
    shared: bool = False
    """Whether all tenants may use it and look at it; only its owner changes it."""
    pinned: bool
    """Whether it stays in memory even if others are used more recently."""
    tier: str | None
    """Place of the active version: `slot` (on the accelerator), `host` (in memory) or `disk`."""
    versions: int
    """Number of its versions."""
    created_at: float
    """Unix time in seconds, as `updated_at`."""
    updated_at: float


class VersionFailure(msgspec.Struct, frozen=True):
    """Reason why a version failed."""

    code: str
    """The exact kind, stable enough to compare with."""
    message: str


class ParentAnswer(msgspec.Struct, frozen=True):
    """A version that another one continues from."""

    name: str
    version: str
    """Digest of the version."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class MergeParent(msgspec.Struct, frozen=True):
    """A version that another one was merged of."""

    name: str
    version: str
    """Digest of the version."""
    weight: float


class AdapterSource(Sparse, frozen=True):
    """Source of a version's files."""

    kind: str
    """`upload`, `hub`, `folder`, `training`, `live`, `checkpoint` or `merge`."""
    repo: str | None = None
    revision: str | None = None
    """Revision that was asked for, such as `main`."""
    commit: str | None = None
    """The commit that `revision` was at that moment."""
    subfolder: str | None = None
    job: str | None = None
    """The job, or the run of live training, that trained it."""
    step: int | None = None
    """The job's step of which it is the checkpoint."""
    parent_version: ParentAnswer | None = field(default=None, name="parent")
    method: str | None = None
    """Method by which it was merged of others; None unless it was."""
    density: float | None = None
    sign: str | None = None
    seed: int | None = None
    parents: tuple[MergeParent, ...] = ()
    """Versions of which it was merged."""

    @property
    def parent(self) -> str | None:
        """`name@version` with the whole digest, if the job continued from a version of an adapter."""
        return None if self.parent_version is None else str(self.parent_version)


class SignatureReport(Sparse, frozen=True):
    """Result of verifying a version's signature when its files came."""

    status: str
    """`verified`; `refused`, where the policy only warns."""
    signer: str | None = None
    """Name of the signer in the server's policy."""
    identity: str | None = None
    """Name in the signer's certificate."""
    issuer: str | None = None
    """OpenID Connect issuer that vouched for the identity, of a keyless signature."""
    code: str | None = None
    """Code of the error, if it was refused; `message` says why."""
    message: str | None = None
    statement: dict[str, Any] | None = None
    """Facts that this server has signed about a version that it trained: `base`, `data`, `recipe`, `seed`,
    `proof`, `activation_decision`, `job`, `parent`. Only the version's own tenant reads it."""


class VersionProgress(msgspec.Struct, frozen=True):
    """Progress of a version towards being ready."""

    stage: str
    """`pulling`, `validating` or `proving`."""
    fraction: float | None = None
    """0 to 1, None if not known. Validating and proving are one piece of work, and share one fraction."""


class ModuleReport(Stored, frozen=True):
    """Change that a version makes to one module of the base."""

    name: str
    kind: ModuleKind
    """`lora`, `dora`, `alora` (activated LoRA), `saved` (the whole module is replaced), `tokens` (some rows
    are), or `head`."""
    rank: int
    """Rank of the update; 0 unless the kind is `lora`, `dora` or `alora`."""
    alpha: float
    parameters: int
    norm: float
    """Frobenius norm of the change of the module's weight: of scale * B @ A, or of the difference from the
    replaced module."""
    spectral_norm: float | None = None
    """Largest singular value of the change, for `lora`, `dora` and `alora`."""
    relative_norm: float | None = None
    """Ratio of `norm` to that of the base's weight, within some percent; None for `tokens` and an embedding's
    matrices."""


class ProofReport(Stored, frozen=True, kw_only=True):
    """Proof that the server computes what PEFT computes."""

    modules_compared: int
    """Modules that were compared with PEFT's own, on the same input."""
    modules_changed: int
    """Modules whose output differs from the base's."""
    rows: int
    """Rows of the input on which modules were compared, alone and in each mix, taken together."""
    exact: bool
    """Whether the outputs of all modules had PEFT's own bits."""
    modules_exact: int
    """Number of modules that had PEFT's own bits."""
    error_ratio: float = 0.0
    """Largest error of the other modules, which sum in another order, divided by that of PEFT's own output.
    Both errors are measured from the result in fp64."""
    kernels: str = "torch"
    """Kernels of the server: `torch`, or its own in C by their set of instructions; on a GPU with its kind,
    as `triton sm_90`."""
    largest_difference: float
    """Largest difference of any module, relative to PEFT's largest output; 0 when exact."""
    texts: int
    """Prompts that were continued by both, greedily."""
    tokens_compared: int
    texts_changed: int
    """Texts that differ from the base's own."""
    base_unchanged: bool
    """Whether the base's weights are what they were before."""
    seconds: float
    shown: str = ""
    """Statement, in words, of what was shown."""


class AddedToken(msgspec.Struct, frozen=True):
    """A token that an adapter's tokenizer has added to the base's, as the tokenizers library describes it."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class TokenizerAdditions(msgspec.Struct, frozen=True, kw_only=True):
    """Additions of an adapter's tokenizer to its base's."""

    tokens: tuple[AddedToken, ...]
    """Added tokens, whose ids follow the base's and one another."""
    end_tokens: tuple[int, ...] = ()
    """Ids of the tokens that end a text."""
    chat_template: str | None = None


class AdapterDefaults(Sparse, frozen=True, kw_only=True):
    """Fields that requests for an adapter have where they do not say otherwise. They came with its files, as
    `onebase.json`, and belong to the version."""

    description: Annotated[str, Meta(max_length=2000)] | None = None
    """Purpose of the adapter, for people."""
    system: Annotated[str, Meta(min_length=1, max_length=LONGEST_DEFAULT)] | None = None
    """System message of conversations that have none."""
    instruction: Annotated[str, Meta(min_length=1, max_length=LONGEST_DEFAULT)] | None = None
    """One more message of the user, at the end of a conversation."""
    invocation: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    """Text with which the assistant's turn begins, in place of what the chat template writes there."""
    prompt_prefix: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    """Text before prompts that are no conversation."""
    chat_template: Annotated[str, Meta(min_length=1, max_length=LONGEST_DEFAULT)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=10_000_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Tokens of an answer, or as many as fit if those are fewer."""
    stop: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(max_length=16)] = ()
    guided_json: dict[str, Any] | None = None
    """JSON schema of the answer. At most one of the `guided_` fields is given."""
    guided_regex: Annotated[str, Meta(min_length=1, max_length=LONGEST_DEFAULT)] | None = None
    guided_choice: tuple[Annotated[str, Meta(min_length=1, max_length=4096)], ...] = ()
    guided_grammar: Annotated[str, Meta(min_length=1, max_length=LONGEST_DEFAULT)] | None = None
    notes: Annotated[tuple[Annotated[str, Meta(max_length=400)], ...], Meta(max_length=16)] = ()
    """Parts of a vendor's file that are not used."""


class VersionReport(Stored, frozen=True, kw_only=True):
    """Findings of the server about a version before it served it. The registry stores it as JSON."""

    kinds: tuple[str, ...]
    rank: int
    """Largest rank of any module; `alpha` is the largest alpha."""
    alpha: float
    rslora: bool
    """Whether alpha is divided by the root of the rank instead of the rank."""
    targets: tuple[str, ...]
    parameters: int
    bytes: int
    """Size in host memory or in a slot, in bytes."""
    base_name: str | None
    """The base that the adapter's own configuration names."""
    dropped: tuple[str, ...]
    """Tensors in the file that were the base's own, bit for bit, and were left out."""
    modules: tuple[ModuleReport, ...]
    proof: ProofReport
    task: str = "CAUSAL_LM"
    """Task of the version, in PEFT's words: CAUSAL_LM is text; or SEQ_CLS, TOKEN_CLS, FEATURE_EXTRACTION."""
    labels: int = 0
    """Classes that a classifier tells apart."""
    label_names: tuple[str, ...] = ()
    """Names of all classes, in their order; empty if its files name none."""
    vocabulary: int = 0
    """Number of tokens of its own vocabulary; 0 if it is the base's."""
    tokenizer: TokenizerAdditions | None = None
    """Additions of its tokenizer to the base's; None if there are none."""
    invocation_tokens: tuple[int, ...] = ()
    """Tokens from whose last occurrence in a prompt on an activated LoRA acts; empty for other adapters."""
    defaults: AdapterDefaults | None = None
    """Fields of requests that came with its files; None if there are none."""
    warnings: tuple[str, ...] = ()
    """Warnings to look at before the version is activated. The server blocks nothing because of them."""
    weight_score: float | None = None
    """Score of how unusual its weights are, 0 or more: how much of each module's energy lies in one
    direction. A gate may limit it; see its error rates first."""
    base_layers: int = 0
    """Number of the base's layers."""
    base_linears: tuple[str, ...] = ()
    """Names of the base's linear modules within a layer, experts as one."""


class AdapterVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One immutable set of files under a name."""

    object: Literal["adapter.version"] = "adapter.version"
    id: str
    """`name@version`, shortened, for `adapter=` in a request."""
    name: str
    version: str
    """The SHA-256 of its content; while it is still being pulled, the id of the pull."""
    state: str
    """`pulling`, `validating`, `proving`, and in the end `ready` or `failed`."""
    active: bool
    """Whether requests for the name alone get this version."""
    error: VersionFailure | None
    base: str
    source: AdapterSource
    created_at: float
    """Unix time in seconds."""
    created_by: str
    tenant: str
    progress: VersionProgress | None
    """Progress of the version; None in the end."""
    report: VersionReport | None
    """Findings about the version; None until it is ready."""
    signature: SignatureReport | None = None
    """Result of verifying its signature; None if the server's policy asked for none."""

    @property
    def is_pull(self) -> bool:
        """Return True if its content is not known yet, so that `version` is the id of a pull and no
        digest."""
        return self.version.startswith("pull-")

    @property
    def finished(self) -> bool:
        """Return True if its state is final."""
        return self.state in (READY, FAILED)


GateName = Literal["signature", "proof", "evaluation", "weights", "approval"]
ProofGate = Literal["none", "proved", "exact"]
Pattern = Annotated[str, Meta(min_length=1, max_length=200)]
KeyIds = Annotated[tuple[Pattern, ...], Meta(max_length=64)]


class EvaluationGate(msgspec.Struct, frozen=True, kw_only=True):
    """Evaluation that must show that a version is not worse than the active one, in each slice."""

    margin: Annotated[float, Meta(ge=0, le=1)] = 0.05
    """Largest amount by which the mean score of a slice may be lower. Scores are from 0 to 1."""
    confidence: Annotated[float, Meta(ge=0.5, le=0.9999)] = 0.95
    """Confidence of all slices together."""
    rows: Annotated[int, Meta(ge=1, le=1_000_000)] = 80
    """Smallest number of rows of a slice that is judged alone. All rows together are judged always. By the
    defaults, 80 rows without any difference pass beside up to 20 slices."""
    evaluators: KeyIds = ()
    """Ids of the keys whose evaluations count, and `jobs` for those of the server's own jobs; () for the jobs
    and every key that did not make the version. All that count must pass."""
    metric: Annotated[str, Meta(max_length=100)] = ""
    """Metric by which an evaluation counts; "" for any."""
    slices: KeyIds = ()
    """Slices that must be judged, each with at least `rows` rows."""
    total: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    """Smallest number of rows of an evaluation."""
    data: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""
    """SHA-256 (hex) of the file with the held-out rows; "" for any."""


class GateRule(msgspec.Struct, frozen=True, kw_only=True):
    """Conditions of an activation. All rules apply whose patterns match the tenant and the adapter's name."""

    object: Literal["gate"] = "gate"
    id: str = ""
    tenant: Pattern = "*"
    name: Pattern = "*"
    signature: KeyIds = ()
    """Patterns of the signers of which one has signed the version, `*` for any of the server's policy. The
    server's own signature is not among those: name `server` for it. () for no condition."""
    proof: ProofGate = "none"
    """`proved`: nothing of the proof was waived. `exact`: all modules had PEFT's own bits as well."""
    evaluation: EvaluationGate | None = None
    weights: Annotated[float, Meta(ge=0, le=1000)] | None = None
    """Largest `weight_score` of the version's report."""
    approvals: Annotated[int, Meta(ge=0, le=8)] = 0
    """Number of people who must have approved the version, other than those who made it and the one who
    activates it."""
    approvers: KeyIds = ()
    """Ids of the keys that may approve; () for every key of the tenant with the scope `adapters`."""
    created_at: float = 0.0
    """Unix time in seconds."""
    created_by: str = ""


class GateState(msgspec.Struct, frozen=True, kw_only=True):
    """One gate of a version."""

    gate: GateName
    passed: bool
    rule: str
    """Id of the rule."""
    reason: str
    """Finding and, if the gate is closed, the way to open it."""


class VersionApproval(msgspec.Struct, frozen=True, kw_only=True):
    """Approval of a version. It holds for one activation, of this content, with this evaluation."""

    key: str
    """Id of the key that approved."""
    counts: bool
    """Whether it still counts: its key is valid, and no evaluation that counts has come since."""
    at: float
    """Unix time in seconds."""


class SliceScore(msgspec.Struct, frozen=True, kw_only=True):
    """Differences of the scores (0 to 1) of two versions on the rows of one slice: the version's, less those
    of what it was compared with."""

    slice: Annotated[str, Meta(max_length=200)]
    rows: Annotated[int, Meta(ge=1, le=10_000_000)]
    sum: float
    """Sum of the differences."""
    squares: float
    """Sum of their squares."""


class VersionEvaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Evaluation of a version beside the version that it would replace, on the same rows."""

    against: str | None
    """Digest of the version that it was compared with; None for the base."""
    metric: str
    slices: tuple[SliceScore, ...]
    key: str
    """Id of the key that sent it; "" for a job of this server."""
    job: str | None = None
    data: str | None = None
    """SHA-256 (hex) of the file with the held-out rows, if it is known."""
    at: float
    """Unix time in seconds."""


class VersionGates(msgspec.Struct, frozen=True, kw_only=True):
    """Gates that an activation of a version has to pass, and what they look at."""

    object: Literal["adapter.gates"] = "adapter.gates"
    version: str
    """Digest of the version."""
    passed: bool
    """Whether the caller could activate it now."""
    gates: tuple[GateState, ...]
    refusal: str = ""
    """Reason for which the caller cannot approve the version; "" if it can."""
    approvals: tuple[VersionApproval, ...]
    evaluations: tuple[VersionEvaluation, ...]
    """The newest first."""


RolloutState = Literal["running", "promoted", "rolled_back", "stopped"]
Verdict = Literal["no_data", "undecided", "worse", "not_worse", "better"]


class RolloutRules(msgspec.Struct, frozen=True, kw_only=True):
    """Rules by which a rollout ends by itself. Each margin says how much worse than the active version the
    candidate may be; None: that is measured, but decides nothing."""

    requests: Annotated[int, Meta(ge=1, le=10_000_000)] = 300
    """Answers of the candidate before it can be promoted."""
    confidence: Annotated[float, Meta(ge=0.5, le=0.9999)] = 0.95
    """Confidence of all of a rollout's decisions together, however often the server looks."""
    errors: Annotated[float, Meta(ge=0, le=1)] | None = 0.03
    """Margin of the share of requests that fail, as a difference: 0.03 is three of a hundred."""
    first_token: Annotated[float, Meta(ge=0, le=100)] | None = 0.3
    """Margin of the time to the first token, as a ratio: 0.3 is 30% slower."""
    per_token: Annotated[float, Meta(ge=0, le=100)] | None = 0.3
    """Margin of the time per token after the first, as a ratio."""
    tokens: Annotated[float, Meta(ge=0, le=100)] | None = None
    """Margin of the tokens of an answer, as a ratio: longer counts as worse."""
    refusals: Annotated[float, Meta(ge=0, le=1)] | None = 0.1
    """Margin of the share of answers that refuse, as a difference."""
    feedback: Annotated[float, Meta(ge=0, le=1)] | None = 0.1
    """Margin of the mean score that users send back, as a difference; lower is worse."""
    judge: Annotated[float, Meta(ge=0, le=1)] | None = 0.1
    """Margin of the share of answers that the judge approves of, as a difference; lower is worse."""


class RolloutJudge(msgspec.Struct, frozen=True, kw_only=True):
    """Adapter that judges a part of both versions' answers, in the background."""

    adapter: Annotated[str, Meta(min_length=1, max_length=200)]
    """Name of an adapter, such as an activated LoRA, that answers a conversation with one of few words."""
    approves: Annotated[str, Meta(min_length=1, max_length=200)] = "yes"
    """Beginning of its answer, in any case, by which it approves."""
    percent: Annotated[float, Meta(gt=0, le=100)] = 10.0
    """Percent of the answers that it judges."""


class SideFigure(msgspec.Struct, frozen=True):
    """Mean of one metric on one side of a rollout, with its confidence interval once there are enough
    values."""

    n: int
    mean: float | None
    low: float | None = None
    high: float | None = None


class RolloutComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Comparison of the candidate with the active version by one metric."""

    metric: str
    """`errors`, `first_token` and `per_token` (seconds, geometric means), `tokens`, `refusals`, `feedback` or
    `judge`."""
    side: Literal["candidate", "shadow"]
    active: SideFigure
    candidate: SideFigure
    worse_by: float | None
    """Amount by which the candidate is worse, as a difference or a ratio less 1; negative if it is better."""
    low: float | None
    """Confidence interval of `worse_by`, once there are enough values: 10 on each side, 30 of times and
    tokens."""
    high: float | None
    margin: float | None
    verdict: Verdict


class RolloutSideCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one side of a rollout."""

    side: Literal["active", "candidate", "shadow"]
    version: str
    requests: int
    """Requests that were answered, or failed."""
    errors: int
    refusals: int
    aborted: int
    """Requests that their callers left, and copies whose time was over. They are no part of the others."""
    skipped: int = 0
    """Copies and judgements that were not made: too many ran, or the judge could not be asked."""
    prompt_tokens: int
    completion_tokens: int


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """Rollout of a version, the candidate, beside the active version of an adapter."""

    object: Literal["adapter.rollout"] = "adapter.rollout"
    id: str
    name: str
    tenant: str
    version: str
    """Digest of the candidate."""
    active: str
    """Digest of the version that was active when the rollout began, and is until it is promoted."""
    state: RolloutState
    percent: float
    """Percent of the requests that the candidate answers."""
    shadow: float
    """Percent of the active version's requests of which the candidate gets a copy that nobody sees."""
    by: Literal["caller", "request"]
    """`caller`: all requests of one user, session or key are answered by the same version."""
    promote: bool
    """Whether the candidate is promoted by itself once the rules allow it."""
    rules: RolloutRules
    judge: RolloutJudge | None
    sides: tuple[RolloutSideCounts, ...]
    comparisons: tuple[RolloutComparison, ...]
    waits_for: tuple[str, ...] = ()
    """Conditions of a promotion that are not met yet."""
    reason: str | None
    """Reason of its end."""
    created_at: float
    """Unix time in seconds."""
    created_by: str
    ended_at: float | None
    ended_by: str | None


class FeedbackAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Receipt for a score of an answer."""

    object: Literal["feedback"] = "feedback"
    id: str
    """Id of the answer."""
    score: float
    rollout: str
    counted: bool
    """Whether it counts: the rollout runs."""


class Activation(msgspec.Struct, frozen=True):
    """One entry in the history of a name: who changed its active version, and when."""

    action: str
    """`activate`, `rollback` or `deactivate`."""
    version: str | None
    """The digest that was active from then on. None after `deactivate`."""
    previous: str | None
    """The digest that was active before."""
    actor: str
    at: float
    """Unix time in seconds."""


class VersionFile(msgspec.Struct, frozen=True):
    """One of the two files of a version."""

    name: str
    bytes: int
    sha256: str


class BaseReference(msgspec.Struct, frozen=True):
    """Source of a version's base."""

    name: str
    repo: str | None
    """Repository on the Hugging Face Hub; None if the server has the base from a folder of its own."""
    revision: str | None
    """Commit in that repository."""
    quantization: str = "none"
    """Quantization of the server's copy: `nf4`, `int8` or `none`."""
    blocksize: int = 64
    """Weights in a block of NF4."""
    double_quant: bool = True
    """Whether the scales of NF4 are quantized too."""


class VersionFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Files of a version."""

    object: Literal["list"] = "list"
    version: str
    """Digest of the version."""
    base: BaseReference
    files: tuple[VersionFile, ...] = field(name="data")
    signature: str | None = None
    """Content of `model.sig`, if the version came with one that was looked at."""

    @property
    def bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(file.bytes for file in self.files)
