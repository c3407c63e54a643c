"""Servers that `onebase conform` asks: how each takes an adapter, and how a request names one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpx2

from .._http import Pool
from .conform_adapters import CONFIG_FILE, GGUF_FILE, WEIGHTS_FILE

TIMEOUT_SECONDS: Final = 600.0
_NO_NUMBER: Final = 10_000
"""A number that no adapter of llama.cpp has."""
_SYSTEM_PORT: Final = 8081
"""Port of a Dynamo worker's own routes in Dynamo's examples (DYN_SYSTEM_PORT)."""
LISTED_SECONDS: Final = 30.0
"""Longest time, in seconds, until Dynamo's frontend lists what its worker has loaded."""
_LOOK_SECONDS: Final = 0.2


class ServerRefusedError(Exception):
    """The server refused a request; the message is its own."""


class NotOfferedError(Exception):
    """The server has no way to do it."""


class UnreachableError(Exception):
    """No answer came; the message says why."""


class DeniedError(Exception):
    """The server answers no request of this key, or none for now: nothing can be found out."""


class BrokenError(Exception):
    """The answer is an error of the server's own, or cannot be read."""


class LoraServer:
    """An OpenAI-compatible server of LoRA adapters. Adapters are folders on this machine, by their names.

    url: its address, with or without `/v1`. model: the name of its base in requests; None: the first model
    that it lists. admin: the address at which adapters are loaded, where it is another one.

    All methods raise ServerRefusedError, NotOfferedError, UnreachableError, DeniedError and BrokenError.
    """

    kind = ""

    def __init__(self, url: str, key: str | None, model: str | None = None, admin: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = Pool(self.url, None)
        self._http.timeout = httpx2.Timeout(TIMEOUT_SECONDS)
        if key is not None:
            self._http.headers["Authorization"] = f"Bearer {key}"
        self._model = model

    def close(self) -> None:
        self._http.close()

    @property
    def base(self) -> str:
        """The name of the base in requests."""
        if self._model is None:
            models = self.call("GET", "/v1/models")
            with self._translated():
                listed = models.get("data") or []
                if not listed:
                    raise UnreachableError(f"{self.url}/v1/models lists no model: name the base with --model")
                self._model = str(listed[0]["id"])
        return self._model

    def listed(self) -> set[str]:
        """Return the names of all models that it lists."""
        models = self.call("GET", "/v1/models")
        with self._translated():
            return {str(one["id"]) for one in models["data"]}

    # ---- adapters ------------------------------------------------------------------------------

    def load(self, name: str, folder: Path) -> None:
        """Serve an adapter under a new name."""
        raise NotOfferedError(f"{self.kind} loads no adapters while it runs")

    def stage(self, name: str, folder: Path) -> Callable[[], None]:
        """Prepare other weights for a name that is served; the function that is returned switches to them."""
        raise NotOfferedError(f"{self.kind} replaces no adapters while it runs")

    def unload(self, name: str) -> None:
        """Stop serving an adapter."""
        raise NotOfferedError(f"{self.kind} unloads no adapters while it runs")

    def named(self, name: str | None) -> Mapping[str, Any]:
        """Return the fields of a request that name an adapter; None is the base."""
        return {"model": self.base if name is None else name}

    # ---- texts ---------------------------------------------------------------------------------

    def ask(self, name: str | None, prompt: str, tokens: int) -> str:
        """Return the greedy continuation of a prompt."""
        answer = self.call("POST", "/v1/completions", json=self._request(name, prompt, tokens))
        with self._translated():
            return str(answer["choices"][0]["text"])

    def stream(self, name: str | None, prompt: str, tokens: int) -> Iterator[str]:
        """Yield the pieces of a greedy continuation."""
        request = {**self._request(name, prompt, tokens), "stream": True}
        with (
            self._translated(),
            self._http.stream("POST", "/v1/completions", json=request) as response,
        ):
            if not response.is_success:
                response.read()
                raise _failure(response)
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data in ("", "[DONE]"):
                    continue
                event = json.loads(data)
                if event.get("error"):
                    raise ServerRefusedError(str(event["error"]))
                yield from (str(one.get("text") or "") for one in event.get("choices", ()))

    def _request(self, name: str | None, prompt: str, tokens: int) -> dict[str, Any]:
        return {**self.named(name), "prompt": prompt, "max_tokens": tokens, "temperature": 0, "seed": 0}

    # ---- HTTP ----------------------------------------------------------------------------------

    def call(self, method: str, path: str, **content: Any) -> Any:
        """Return what a route answers, as JSON or as text."""
        with self._translated():
            response = self._http.request(method, path, **content)
        if not response.is_success:
            raise _failure(response)
        try:
            return response.json()
        except ValueError:
            return response.text

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx2.HTTPError as error:
            raise UnreachableError(f"{self.url} does not answer: {error or type(error).__name__}") from error
        except httpx2.InvalidURL as error:
            raise UnreachableError(f"{self.url} is no address: {error}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BrokenError(f"an answer that cannot be read: {error!r:.200}") from error


def _failure(response: httpx2.Response) -> Exception:
    """Return the exception for an answer that is no success."""
    said = _said(response)
    if response.status_code in (401, 403, 429):
        return DeniedError(said)
    return BrokenError(said) if response.status_code >= 500 else ServerRefusedError(said)


def _said(response: httpx2.Response) -> str:
    """Return the message of a refusal."""
    try:
        body = response.json()
        error = body.get("error", body)
        message = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
        message = message or response.text
    except (ValueError, AttributeError):
        message = response.text
    return f"HTTP {response.status_code}: {' '.join(str(message).split())[:300]}"


class OneBaseServer(LoraServer):
    """OneBase: adapters are uploaded, and activated by digest."""

    kind = "onebase"

    def load(self, name: str, folder: Path) -> None:
        self.stage(name, folder)()

    def stage(self, name: str, folder: Path) -> Callable[[], None]:
        files = [
            ("files", (file, (folder / file).read_bytes(), "application/octet-stream"))
            for file in (CONFIG_FILE, WEIGHTS_FILE)
        ]
        answer = self.call("POST", "/v1/adapters?wait=true", data={"name": name}, files=files)
        with self._translated():
            version = str(answer["version"])
        return lambda: self._activate(name, version)

    def _activate(self, name: str, version: str) -> None:
        self.call("POST", f"/v1/adapters/{name}/activate", json={"version": version})

    def unload(self, name: str) -> None:
        self.call("DELETE", f"/v1/adapters/{name}?force=true")


class VllmServer(LoraServer):
    """vLLM: adapters are folders on its machine. It takes them if it was started with
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."""

    kind = "vllm"

    def load(self, name: str, folder: Path) -> None:
        self._load(name, folder)

    def stage(self, name: str, folder: Path) -> Callable[[], None]:
        return lambda: self._load(name, folder, load_inplace=True)

    def _load(self, name: str, folder: Path, **more: Any) -> None:
        body = {"lora_name": name, "lora_path": str(folder), **more}
        try:
            self.call("POST", "/v1/load_lora_adapter", json=body)
        except ServerRefusedError as error:
            if str(error).startswith("HTTP 404: Not Found"):
                raise NotOfferedError(
                    "vLLM takes adapters only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
                ) from error
            raise

    def unload(self, name: str) -> None:
        self.call("POST", "/v1/unload_lora_adapter", json={"lora_name": name})


class SglangServer(LoraServer):
    """SGLang: adapters are folders on its machine; one is replaced by unloading and loading it."""

    kind = "sglang"

    def load(self, name: str, folder: Path) -> None:
        answer = self.call("POST", "/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerRefusedError(str(answer.get("error_message")))

    def stage(self, name: str, folder: Path) -> Callable[[], None]:
        def switch() -> None:
            self.unload(name)
            self.load(name, folder)

        return switch

    def unload(self, name: str) -> None:
        self.call("POST", "/unload_lora_adapter", json={"lora_name": name})

    def named(self, name: str | None) -> Mapping[str, Any]:
        return {"model": self.base if name is None else f"{self.base}:{name}"}


class LoraxServer(LoraServer):
    """LoRAX: a request names the adapter's folder on its machine. Started with `--adapter-source local`."""

    kind = "lorax"

    def __init__(self, url: str, key: str | None, model: str | None = None, admin: str | None = None) -> None:
        super().__init__(url, key, model or "")
        self._folders: dict[str, Path] = {}

    def load(self, name: str, folder: Path) -> None:
        self._folders[name] = folder

    def unload(self, name: str) -> None:
        self._folders.pop(name, None)

    def named(self, name: str | None) -> Mapping[str, Any]:
        return {"model": self.base if name is None else str(self._folders.get(name, name))}


class LlamaServer(LoraServer):
    """llama.cpp: adapters are GGUF files that it was started with; a request gives each a scale."""

    kind = "llama.cpp"

    def __init__(self, url: str, key: str | None, model: str | None = None, admin: str | None = None) -> None:
        super().__init__(url, key, model)
        self._numbers: dict[str, int] = {}
        self._files: dict[int, Path] = {}
        self._lock = threading.Lock()

    def load(self, name: str, folder: Path) -> None:
        numbers = {path.parent.name: number for number, path in self._listed().items()}
        if folder.name not in numbers:
            raise NotOfferedError(f"it was not started with --lora {folder / GGUF_FILE}")
        self._numbers[name] = numbers[folder.name]

    def _listed(self) -> Mapping[int, Path]:
        """Return the files of the adapters that it was started with, by their numbers."""
        with self._lock:
            if not self._files:
                listed = self.call("GET", "/lora-adapters")
                with self._translated():
                    self._files = {int(one["id"]): Path(one["path"]) for one in listed}
            return self._files

    def unload(self, name: str) -> None:
        """Do nothing: an adapter that no request names has no effect."""

    def named(self, name: str | None) -> Mapping[str, Any]:
        if (
            name is None
        ):  # an empty list has it apply what it applies by default: all that it was started with
            return {"lora": [{"id": number, "scale": 0.0} for number in self._listed()]}
        return {"lora": [{"id": self._numbers.get(name, _NO_NUMBER), "scale": 1.0}]}


class DynamoServer(LoraServer):
    """Dynamo: a worker reads folders of its machine by a route of its own, at another port than the frontend.
    Started with DYN_LORA_ENABLED=true."""

    kind = "dynamo"

    def __init__(self, url: str, key: str | None, model: str | None = None, admin: str | None = None) -> None:
        super().__init__(url, key, model)
        at = urlsplit(self.url)
        place = at._replace(netloc=f"{at.netloc.removesuffix(f':{at.port}')}:{_SYSTEM_PORT}", path="")
        self._worker = LoraServer(admin or place.geturl(), None)

    def close(self) -> None:
        self._worker.close()
        super().close()

    def load(self, name: str, folder: Path) -> None:
        if "already loaded" in self._load(name, folder):
            raise ServerRefusedError(f"{name} is already loaded")
        self._wait_until_listed(name, True)

    def stage(self, name: str, folder: Path) -> Callable[[], None]:
        def switch() -> None:
            if "already loaded" in self._load(name, folder):  # without DYN_LORA_HOTSWAP_ENABLED
                self.unload(name)
                self._wait_until_listed(name, False)
                self.load(name, folder)

        return switch

    def _wait_until_listed(self, name: str, listed: bool) -> None:
        """Wait until the frontend lists an adapter, or lists it no more."""
        until = time.monotonic() + LISTED_SECONDS
        while (name in self.listed()) is not listed:
            if time.monotonic() > until:
                what = "does not list" if listed else "still lists"
                done = "loaded" if listed else "unloaded"
                raise UnreachableError(
                    f"{self.url} {what} {name}, which {self._worker.url} has {done}: give the address of its "
                    "own worker as --admin"
                )
            time.sleep(_LOOK_SECONDS)

    def unload(self, name: str) -> None:
        self._answer("DELETE", f"/v1/loras/{quote(name)}")

    def _load(self, name: str, folder: Path) -> str:
        body = {"lora_name": name, "source": {"uri": folder.as_uri()}}
        return self._answer("POST", "/v1/loras", json=body)

    def _answer(self, method: str, path: str, **content: Any) -> str:
        """Return what the worker says of what it did."""
        try:
            answer = self._worker.call(method, path, **content)
        except ServerRefusedError as error:
            if str(error).startswith("HTTP 404: Route not found"):
                raise NotOfferedError(
                    "Dynamo's worker takes adapters only with DYN_LORA_ENABLED=true in its environment"
                ) from error
            raise
        said = answer if isinstance(answer, dict) else {}
        if said.get("status") == "error":
            raise ServerRefusedError(str(said.get("message")))
        return str(said.get("message") or "")


class OpenAIServer(LoraServer):
    """Any other server with OpenAI's API: it was started with the adapters, and lists each by its folder's
    name."""

    kind = "openai"

    def __init__(self, url: str, key: str | None, model: str | None = None, admin: str | None = None) -> None:
        super().__init__(url, key, model)
        self._names: dict[str, str] = {}

    def load(self, name: str, folder: Path) -> None:
        if folder.name not in self.listed():
            raise NotOfferedError(f"it lists no adapter {folder.name!r}: start it with {folder}")
        self._names[name] = folder.name

    def unload(self, name: str) -> None:
        """Do nothing: an adapter that no request names has no effect."""

    def named(self, name: str | None) -> Mapping[str, Any]:
        return {"model": self.base if name is None else self._names.get(name, name)}


SERVERS: Final[Mapping[str, type[LoraServer]]] = {
    one.kind: one
    for one in (
        OneBaseServer, VllmServer, SglangServer, LoraxServer, LlamaServer, DynamoServer, OpenAIServer
    )
}  # fmt: skip


def recognized(url: str, key: str | None) -> str:
    """Return the kind of server at an address.

    Raises:
        UnreachableError: nothing answers there, or nothing that is known.
        DeniedError, BrokenError.
    """
    server = LoraServer(url, key)
    try:
        models = server.call("GET", "/v1/models")
        owner = str(models["data"][0].get("owned_by", "")) if models.get("data") else ""
    except ServerRefusedError as error:
        raise UnreachableError(f"{server.url}/v1/models: {error}") from error
    except (AttributeError, LookupError, TypeError) as error:
        raise UnreachableError(f"{server.url} is no OpenAI-compatible server: {error!r}") from error
    finally:
        server.close()
    kinds = {
        "onebase": "onebase", "vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp", "nvidia": "dynamo"
    }  # fmt: skip
    found = kinds.get(owner)
    if found is None:
        known = ", ".join(SERVERS)
        raise UnreachableError(
            f"{server.url} does not say what server it is (owned_by {owner!r}): name it with --server, "
            f"one of {known}"
        )
    return found
