"""The config of a base, without the base: for what is to be known before anything is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onebase_engine.base.default_base import (
    DEFAULT_BASE,
    DEFAULT_REPO,
    HUB_TIMEOUT_S,
    BaseFetchError,
    BaseSpecError,
    default_cache,
    fetch_default_base,
    parse_repo,
)
from onebase_engine.base.hub_access import first_line, hub_silence
from onebase_engine.base.load import UnsupportedBaseError, check_servable

CONFIG = "config.json"


def find_config(spec: str, cache: Path | None = None) -> Any:
    """transformers' config of a base: of a folder, of a config.json, or of a repository's (only that file).

    Args:
        spec: as `resolve_base` takes it, or the path of a config.json.
        cache: the folder that keeps bases; `default_cache()` if None.

    Raises:
        BaseSpecError: it is none of these, or no config of a base that can be trained.
        BaseFetchError: the download failed.
    """
    from transformers import AutoConfig

    path = _config_file(spec, cache)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        check_servable(config)
    except (OSError, ValueError, KeyError, UnsupportedBaseError) as error:
        raise BaseSpecError(f"{path} is not the config of a base that can be trained: {error}") from error
    return config


def find_tokenizer(spec: str, cache: Path | None = None) -> Any:
    """The base's tokenizer; of a repository only its files are downloaded. Raises as `find_config`."""
    from transformers import AutoTokenizer

    path = _config_file(spec, cache).parent
    # Of the default base, unless it is kept here, only the config has come from the Hub.
    local = path == _kept(cache) if spec == DEFAULT_BASE else Path(spec).expanduser().exists()
    repo = DEFAULT_REPO if spec == DEFAULT_BASE else spec
    source, revision = (str(path), None) if local else parse_repo(repo)
    silence = None if local else hub_silence(source)
    try:
        return AutoTokenizer.from_pretrained(
            source,
            revision=revision or "main",
            trust_remote_code=False,
            local_files_only=local or silence is not None,
        )
    except Exception as error:  # the client's and the tokenizers' exceptions share no base class
        reason = (
            f"is not in the Hub's cache, and {silence}"
            if silence
            else f"cannot be loaded ({first_line(error)})"
        )
        raise BaseFetchError(f"the tokenizer of {spec!r} {reason}") from error


def _config_file(spec: str, cache: Path | None) -> Path:
    given = Path(spec).expanduser()
    if given.is_file():
        return given
    if given.is_dir() and spec != DEFAULT_BASE:
        if not (given / CONFIG).is_file():
            raise BaseSpecError(f"{given} has no {CONFIG}")
        return given / CONFIG
    if spec != DEFAULT_BASE:
        return _download(*parse_repo(spec))
    kept = _kept(cache) / CONFIG
    if kept.is_file():
        return kept
    try:
        return _download(DEFAULT_REPO, None)
    except BaseFetchError:
        return fetch_default_base(cache=cache) / CONFIG


def _kept(cache: Path | None) -> Path:
    return (cache or default_cache()) / "bases" / DEFAULT_BASE


def _download(repo: str, revision: str | None) -> Path:
    import huggingface_hub

    silence = hub_silence(repo)
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repo,
                CONFIG,
                revision=revision,
                etag_timeout=HUB_TIMEOUT_S,
                local_files_only=silence is not None,
            )
        )
    except Exception as error:  # the client's exceptions share no base class
        if silence:
            raise BaseFetchError(
                f"the config of {repo!r} is not on this machine, and {silence}. Check the network, or "
                "give the path of a config.json"
            ) from error
        raise BaseFetchError(
            f"the config of {repo!r} could not be downloaded ({first_line(error)}). Check the name and, "
            "for a gated repository, your Hub login; or give the path of a config.json"
        ) from error
