"""The first schema: every table of the registry, and the triggers that keep the audit log append-only.

Names of keys, constraints and indexes follow the naming convention of `tables.py`, which `env.py` hands over.
"""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# SQLite counts rows up by itself only for a key declared INTEGER.
_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_REFUSAL = "the audit log is append-only"
# REPLACE deletes the row in its way without a DELETE trigger: hence the one on INSERT.
_SQLITE = [
    f"CREATE TRIGGER audit_append_only_{name} BEFORE {name} ON audit {when} "
    f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
    for name, when in (
        ("UPDATE", ""),
        ("DELETE", ""),
        ("INSERT", "WHEN EXISTS (SELECT 1 FROM audit WHERE number = NEW.number)"),
    )
]
_POSTGRESQL = [
    "CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$",
    "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
    "FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()",
]


def upgrade() -> None:
    _create_registry()
    _create_adapters()
    _create_versions()
    _create_keys_and_quotas()
    _create_usage()
    _create_audit()
    _create_request_log()
    _create_jobs()
    _create_files_of_jobs()
    _create_batches()
    _create_live()
    _create_rollouts()
    _create_gates()


def _parent(column: str) -> sa.ForeignKey:
    """Return a reference to the row that this one is deleted with."""
    return sa.ForeignKey(column, ondelete="CASCADE")


def _create_registry() -> None:
    counter = op.create_table(
        "change_counter",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
    )
    op.bulk_insert(counter, [{"id": 1, "value": 0}])
    identity = op.create_table(
        "identity",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("value", sa.String(), nullable=False),
    )
    op.bulk_insert(identity, [{"id": 1, "value": f"registry-{secrets.token_hex(8)}"}])
    op.create_table(
        "bases",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False),
    )
    op.create_table(
        "servers",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("server", sa.String(), nullable=False, index=True),
        sa.Column("base_id", sa.String(), nullable=False),
        sa.Column("runs", sa.Boolean(), nullable=False),
        sa.Column("room", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
    )


def _create_adapters() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("base_id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("active", sa.String()),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("changed", sa.BigInteger(), nullable=False),
        sa.Column("shared", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.UniqueConstraint("base_id", "tenant", "name"),
    )
    op.create_table(
        "history",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("adapter_id", _ID, _parent("adapters.id"), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("version", sa.String()),
        sa.Column("previous", sa.String()),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Index(None, "adapter_id", "id"),
    )


def _create_versions() -> None:
    op.create_table(
        "versions",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("adapter_id", _ID, _parent("adapters.id"), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False, index=True),
        sa.Column("config_sha256", sa.String(), nullable=False, index=True),
        sa.Column("config_size", sa.BigInteger(), nullable=False),
        sa.Column("weights_sha256", sa.String(), nullable=False, index=True),
        sa.Column("weights_size", sa.BigInteger(), nullable=False),
        sa.Column("prepared_sha256", sa.String(), index=True),
        sa.Column("prepared_size", sa.BigInteger()),
        sa.Column("report", sa.JSON()),
        sa.Column("modules", sa.JSON()),
        sa.Column("source", sa.JSON(), nullable=False),
        sa.Column("error_code", sa.String()),
        sa.Column("error_message", sa.Text()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("makers", sa.JSON(), nullable=False),
        sa.Column("finished_at", sa.Double()),
        sa.Column("activates", sa.Boolean(), nullable=False),
        sa.UniqueConstraint("adapter_id", "digest"),
    )
    op.create_table(
        "previous_versions",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("adapter_id", _ID, _parent("adapters.id"), nullable=False, index=True),
        sa.Column("version_id", _ID, _parent("versions.id"), nullable=False, index=True),
    )
    op.create_table(
        "proofs",
        sa.Column("number", _ID, primary_key=True),
        sa.Column("version_id", _ID, _parent("versions.id"), nullable=False),
        sa.Column("kernels", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False),
        sa.Column("until", sa.Double()),
        sa.Column("prepared_sha256", sa.String(), index=True),
        sa.Column("prepared_size", sa.BigInteger()),
        sa.Column("report", sa.JSON()),
        sa.UniqueConstraint("version_id", "kernels"),
    )


def _create_keys_and_quotas() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double()),
        sa.Column("revoked_at", sa.Double()),
        sa.Column("last_used_at", sa.Double()),
        sa.Column("changed", sa.BigInteger(), nullable=False, index=True),
        sa.Column("quotas", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("priority", sa.Integer(), nullable=False, server_default="0"),
    )
    op.create_table(
        "tenants",
        sa.Column("tenant", sa.String(), primary_key=True),
        sa.Column("quotas", sa.JSON(), nullable=False),
        sa.Column("changed", sa.BigInteger(), nullable=False, index=True),
    )
    op.create_table(
        "quota_use",
        sa.Column("process", sa.String(), primary_key=True),
        sa.Column("kind", sa.String(), primary_key=True),
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("at", sa.Double(), nullable=False, index=True),
        sa.Column("use", sa.JSON(), nullable=False),
    )


def _create_usage() -> None:
    op.create_table(
        "usage",
        sa.Column("tenant", sa.String(), primary_key=True),
        sa.Column("day", sa.String(), primary_key=True, index=True),
        sa.Column("base", sa.String(), primary_key=True),
        sa.Column("adapter", sa.String(), primary_key=True),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("training_seconds", sa.Double(), nullable=False),
        sa.Column("training_tokens", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "usage_writers",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("batch", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
    )


def _create_request_log() -> None:
    op.create_table(
        "request_log_keys",
        sa.Column("tenant", sa.String(), primary_key=True),
        sa.Column("key", sa.LargeBinary(), nullable=False),
    )
    op.create_table(
        "request_log_erasures",
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("tenant", sa.String(), nullable=False, index=True),
        sa.Column("user", sa.String()),
        sa.Column("at", sa.Double(), nullable=False),
    )


def _create_audit() -> None:
    op.create_table(
        "audit",
        sa.Column("number", _ID, primary_key=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("version", sa.String()),
        sa.Column("base_id", sa.String()),
        sa.Column("server", sa.String(), nullable=False),
        sa.Column("request", sa.String(), nullable=False),
        sa.Column("details", sa.JSON()),
        sa.Column("chain", sa.String(), nullable=False),
        sa.Index(None, "target", "number"),
        sa.Index(None, "tenant", "number"),
    )
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    for statement in _SQLITE if on_sqlite else _POSTGRESQL:
        op.execute(statement)


def _create_jobs() -> None:
    op.create_table(
        "training_jobs",
        sa.Column("number", _ID, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("base_id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("training_file", sa.String(), nullable=False, index=True),
        sa.Column("validation_file", sa.String(), index=True),
        sa.Column("activate", sa.String(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double()),
        sa.Column("finished_at", sa.Double()),
        sa.Column("plan", sa.JSON()),
        sa.Column("progress", sa.JSON()),
        sa.Column("report", sa.JSON()),
        sa.Column("error_code", sa.String()),
        sa.Column("error_message", sa.Text()),
        sa.Column("error_param", sa.String()),
        sa.Column("saved_step", sa.Integer(), nullable=False),
        sa.Column("deaths", sa.Integer(), nullable=False),
        sa.Column("death_step", sa.Integer(), nullable=False),
        sa.Column("version", sa.String()),
        sa.Column("activated", sa.Boolean()),
        sa.Column("result_file", sa.String()),
        sa.Column("key", sa.String()),
        sa.Column("parent", sa.JSON()),
        sa.Column("hold", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("stop", sa.JSON()),
        sa.Column("kept_step", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("kept_adapter", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Index(None, "server", "state"),
    )


def _create_files_of_jobs() -> None:
    op.create_table(
        "training_files",
        sa.Column("number", _ID, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False, index=True),
    )
    op.create_table(
        "job_files",
        sa.Column("job", _ID, _parent("training_jobs.number"), primary_key=True),
        sa.Column("path", sa.String(), primary_key=True),
        sa.Column("sha256", sa.String(), nullable=False, index=True),
    )
    op.create_table(
        "training_events",
        sa.Column("number", _ID, primary_key=True),
        sa.Column("job", _ID, _parent("training_jobs.number"), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON()),
        sa.Index(None, "job", "number"),
    )
    op.create_table(
        "training_checkpoints",
        sa.Column("number", _ID, primary_key=True),
        sa.Column("job", _ID, _parent("training_jobs.number"), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("train_loss", sa.Double()),
        sa.Column("valid_loss", sa.Double()),
        sa.UniqueConstraint("job", "step"),
    )


def _create_batches() -> None:
    op.create_table(
        "batches",
        sa.Column("number", _ID, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("base_id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("endpoint", sa.String(), nullable=False),
        sa.Column("input_file", sa.String(), nullable=False, index=True),
        sa.Column("window", sa.String(), nullable=False),
        sa.Column("labels", sa.JSON()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("times", sa.JSON(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("completed", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("usage", sa.JSON(), nullable=False),
        sa.Column("errors", sa.JSON()),
        sa.Column("output_file", sa.String()),
        sa.Column("error_file", sa.String()),
        sa.Index(None, "server", "state"),
        sa.Index(None, "tenant", "number"),
    )


def _create_live() -> None:
    op.create_table(
        "live_sessions",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("tenant", sa.String(), nullable=False, index=True),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False, index=True),
        sa.Column("finished_at", sa.Double()),
        sa.Column("details", sa.JSON(), nullable=False),
    )
    op.create_table(
        "live_samplers",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("session", sa.String(), nullable=False, index=True),
        sa.Column("base_id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False, index=True),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("path", sa.String()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("clients", sa.Integer(), nullable=False),
    )
    op.create_table(
        "live_samples",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("sampler", sa.String(), nullable=False, index=True),
        sa.Column("base_id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("server", sa.String(), nullable=False, index=True),
        sa.Column("request", sa.LargeBinary()),
        sa.Column("result", sa.LargeBinary()),
        sa.Column("error", sa.JSON()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), index=True),
    )


def _create_rollouts() -> None:
    op.create_table(
        "rollouts",
        sa.Column("number", _ID, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("adapter_id", _ID, sa.ForeignKey("adapters.id", ondelete="CASCADE"), nullable=False),
        sa.Column("candidate", sa.String(), nullable=False),
        sa.Column("baseline", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("percent", sa.Double(), nullable=False),
        sa.Column("shadow", sa.Double(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.Column("ended_by", sa.String()),
        sa.Column("reason", sa.Text()),
        sa.Column("figures", sa.JSON()),
        sa.Index(None, "adapter_id", "state"),
    )
    op.create_table(
        "rollout_figures",
        sa.Column("rollout", _ID, _of_rollout(), primary_key=True, autoincrement=False),
        sa.Column("side", sa.String(), primary_key=True),
        sa.Column("figure", sa.String(), primary_key=True),
        sa.Column("value", sa.Double(), nullable=False),
    )
    op.create_table(
        "rollout_answers",
        sa.Column("tenant", sa.String(), primary_key=True),
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("rollout", _ID, _of_rollout(), nullable=False, index=True),
        sa.Column("side", sa.String(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False, index=True),
        sa.Column("score", sa.Double()),
        sa.Column("cluster", sa.Integer()),
    )


def _of_rollout() -> sa.ForeignKey:
    """Return a reference to the rollout that a row is deleted with."""
    return sa.ForeignKey("rollouts.number", ondelete="CASCADE")


def _create_gates() -> None:
    op.create_table(
        "gates",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.UniqueConstraint("tenant", "name"),
    )
    op.create_table(
        "approvals",
        sa.Column("version_id", _ID, _parent("versions.id"), primary_key=True, autoincrement=False),
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("evaluation", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
    )
    op.create_table(
        "evaluations",
        sa.Column("number", _ID, primary_key=True),
        sa.Column("version_id", _ID, _parent("versions.id"), nullable=False, index=True),
        sa.Column("against", sa.String()),
        sa.Column("metric", sa.String(), nullable=False),
        sa.Column("slices", sa.JSON(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("job", sa.String()),
        sa.Column("data", sa.String()),
        sa.Column("at", sa.Double(), nullable=False),
    )
