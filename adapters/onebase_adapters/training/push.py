"""Push a finished adapter to the Hub."""

from __future__ import annotations

import re
from pathlib import Path

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


def is_repo_name(name: str) -> bool:
    """Whether the Hub may have a repository of this name."""
    return _REPO.fullmatch(name) is not None and ".." not in name


class PushError(Exception):
    """The adapter was not pushed; the message says why and what to do."""


def push(adapter: Path, repo: str, *, private: bool = True) -> str:
    """Upload an adapter's folder as one commit; the repository is made if there is none. Returns its URL.

    The token is the one of `hf auth login`, or HF_TOKEN.

    Raises PushError.
    """
    if not is_repo_name(repo):
        raise PushError(f"{repo!r} is no repository's name: write ORG/REPO")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        made = api.upload_folder(
            repo_id=repo, folder_path=adapter, allow_patterns=list(FILES), commit_message="Add the adapter"
        )
    except LocalTokenNotFoundError as error:
        raise PushError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PushError(
                f"the Hub refuses to write {repo} (HTTP {status}): use a token that may"
            ) from error
        raise PushError(f"the Hub did not take {repo}: {error}") from error
    except (HFValidationError, OSError, ValueError) as error:
        raise PushError(f"{repo} cannot be pushed: {error}") from error
    return str(made.repo_url if hasattr(made, "repo_url") else made)
