"""A stand-in for OpenAI's API that answers chat completions as it does, on a real port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

KEY = "sk-proj-test"
KNOWN = {"model", "messages", "temperature", "max_completion_tokens", "tools"}


@dataclass
class OpenAIDouble:
    """What was asked, and how it answers."""

    model: str
    url: str = ""
    answers: dict[str, Any] = field(default_factory=dict)
    """Text, or tool calls, by the last user's message."""
    refusals: list[tuple[int, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    """Status, error and headers of the next requests."""
    asked: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        question = body["messages"][-1]["content"]
        said = self.answers.get(question, f"an answer to {question}")
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None, "annotations": []}
        finish = "stop"
        if isinstance(said, list):
            message, finish = message | {"content": None, "tool_calls": said}, "tool_calls"
        elif said.endswith("…"):
            finish = "length"
        count = len(str(said).split())
        details = {"cached_tokens": 0, "audio_tokens": 0}
        return {
            "id": f"chatcmpl-{len(self.asked)}", "object": "chat.completion", "created": int(time.time()),
            "model": self.model, "service_tier": "default", "system_fingerprint": "fp_1",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
            "usage": {
                "prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count,
                "prompt_tokens_details": details,
                "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
            },
        }  # fmt: skip


def _error(
    status: int, code: str | None, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    kind = "invalid_request_error" if status < 429 else "requests"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)


def application(double: OpenAIDouble) -> FastAPI:
    """The routes of OpenAI that are asked."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Any:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return _error(401, "invalid_api_key", "Incorrect API key provided: sk-p****test.")
        body = await request.json()
        double.asked.append(body)
        if double.refusals:
            status, error, headers = double.refusals.pop(0)
            return JSONResponse({"error": error}, status, headers)
        if unknown := set(body) - KNOWN:
            return _error(400, "unknown_parameter", f"Unknown parameter: '{min(unknown)}'.")
        if body["model"] != double.model:
            text = f"The model `{body['model']}` does not exist or you do not have access to it."
            return _error(404, "model_not_found", text)
        for message in body["messages"]:
            if set(message) - {"role", "content", "name", "tool_calls", "tool_call_id"}:
                return _error(400, None, "Additional properties are not allowed")
        return double.answer(body)

    return app


@contextmanager
def served(double: OpenAIDouble) -> Iterator[OpenAIDouble]:
    """Serve the stand-in on a free port."""
    server = uvicorn.Server(uvicorn.Config(application(double), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    double.url = f"http://127.0.0.1:{port}/v1"
    yield double
    server.should_exit = True
    thread.join()
