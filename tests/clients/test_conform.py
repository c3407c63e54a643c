"""`onebase conform` says "right" of a server that applies the right adapter, and "wrong" of others."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.clients.real_server import Server as RealServer
from tests.http_server import StandInServer

from onebase.cli import conform as conform_command
from onebase.cli import conform_servers, main
from onebase.cli.conform import Specimens
from onebase.cli.conform_adapters import Adapters, Base, Crafted

HIDDEN, WORDS, HEADS = 128, 3000, 4


@pytest.fixture(autouse=True)
def _no_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's texts are of a real base, which none of these is."""
    monkeypatch.setattr(conform_command, "entry_points", lambda group: ())


READ_ON = threading.Event()
"""Set as soon as the command has seen what of a stream came before a swap, and reads the rest."""


@pytest.fixture(autouse=True)
def _set_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    text = conform_command._Stream.text

    def reading(stream: Any) -> str:
        READ_ON.set()
        return text(stream)

    monkeypatch.setattr(conform_command._Stream, "text", reading)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of one layer, in the files that the command reads."""
    folder = tmp_path_factory.mktemp("base")
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = {"Ġ" + "".join(rng.choice(letters, 6)): token for token in range(WORDS)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    config = {"model_type": "llama", "hidden_size": HIDDEN, "num_attention_heads": HEADS}
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens": (WORDS + 10, HIDDEN),
        f"{layer}.mlp.down_proj": (HIDDEN, 256),
        f"{layer}.self_attn.o_proj": (HIDDEN, HIDDEN),
        f"{layer}.self_attn.q_proj": (HIDDEN, HIDDEN),
        f"{layer}.self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    }
    tensors = {f"{name}.weight": rng.normal(0, 0.02, shape) for name, shape in shapes.items()}
    tensors["model.norm.weight"] = rng.uniform(0.5, 1.5, HIDDEN)
    save_file({name: one.astype(np.float32) for name, one in tensors.items()}, folder / "model.safetensors")
    return folder


BASE_TEXT = "once upon a time"
PEFT_TEXTS = {
    "": "once upon a time there was a king",
    "ordinary": "once in a while somebody comes by",
    "ordinary-2": "only a few of them are here today",
}
"""What PEFT makes of every prompt, by adapter; the stand-in's base is quantized, and soon says others."""


class Server:
    """A stand-in of vLLM, or of another server by its owner, which knows what each adapter says. faults: what
    it does wrong."""

    def __init__(self, specimens: Specimens, *faults: str, owner: str = "vllm") -> None:
        self.owner = owner
        self._known = {one.name: one for one in specimens.all()}
        self.faults = faults
        self._served: dict[str, Crafted] = {}
        self._marked: dict[str, Crafted] = {}
        self._lock = threading.Lock()
        self.swapped = threading.Event()
        self.url = ""

    def statuses(self, path: str, body: dict[str, Any]) -> Iterator[int]:
        """Yield the status of an error, if the server has one for this request."""
        if path == "/v1/completions":
            for fault in self.faults:
                who, _, status = fault.partition(" fails with ")
                if who == "a long text" and body["max_tokens"] < 900:
                    continue
                if status and (who == "everything" or (body["model"] == "base") == (who == "the base")):
                    yield int(status)

    def load(self, name: str, path: str, inplace: bool) -> tuple[int, str]:
        adapter = self._known[Path(path).name]
        if adapter.name in ("dora", "lm-head", "missing-layer") and "takes all" not in self.faults:
            return 400, f"{adapter.name} is not supported"
        if "reload is forgotten" not in self.faults or not inplace:
            self._served[name] = adapter
        if inplace:
            self.swapped.set()
        return 200, "Success"

    def start_with(self, *adapters: Crafted) -> None:
        """Serve adapters under the names of their folders, as a server that was started with them."""
        self._served |= {one.name: one for one in adapters}

    def models(self) -> list[dict[str, str]]:
        return [{"id": name, "owned_by": self.owner} for name in ("base", *self._served)]

    def load_of_worker(self, name: str, uri: str) -> dict[str, str]:
        """Load as a Dynamo worker does, which says what went wrong in a body."""
        if name in self._served:
            return {"status": "success", "message": f"LoRA adapter {name!r} already loaded"}
        status, said = self.load(name, uri.removeprefix("file://"), False)
        return {"status": "success" if status == 200 else "error", "message": said}

    def unload(self, name: str) -> None:
        self._served.pop(name, None)
        self.swapped.set()

    def text(self, name: str, prompt: str, count: int) -> str | None:
        """Return the continuation; None if there is no such model."""
        if name == "base" or ("unknown names are the base" in self.faults and name not in self._served):
            if "the base is not itself" in self.faults and self._served:
                return "other words"
            return BASE_TEXT
        if name not in self._served:
            return None
        adapter = self._served[name]
        if "adapters are ignored" in self.faults:
            return BASE_TEXT
        if "the last one is applied" in self.faults:
            adapter = list(self._served.values())[-1]
        if "patterns are ignored" in self.faults and adapter.name == "patterns":
            return " ".join(list(adapter.never)[:1] * count)
        if "cached values are shared" in self.faults and len(prompt) > 200:
            first = self._marked.setdefault(prompt, adapter)
            if first is not adapter and adapter.never:
                return " ".join(list(adapter.never)[:1] * count)
        return self.words(adapter, prompt, count)

    def words(self, adapter: Crafted, prompt: str, count: int) -> str:
        both = adapter.says.first, adapter.says.second
        if adapter.name.startswith("ordinary"):
            return self.ordinary_text(adapter.name, prompt)
        return "".join(f" {both[number % 3 == 0]}" for number in range(count))

    def ordinary_text(self, name: str, prompt: str) -> str:
        """Return the text of an adapter without words of its own: PEFT's at first, as of a quantized base."""
        if "ordinary ones are swapped" in self.faults:
            name = {"ordinary": "ordinary-2", "ordinary-2": "ordinary"}[name]
        if "ordinary ones are ignored" in self.faults:
            return BASE_TEXT
        if "the first ordinary one is applied for both" in self.faults:
            name = "ordinary"
        if "ordinary ones are as PEFT's" in self.faults:
            return f" {PEFT_TEXTS[name]}"
        if "near ties go the base's way" in self.faults:
            is_tie = prompt.startswith("To install")
            return PEFT_TEXTS[""] if is_tie else f"{PEFT_TEXTS[name][:8]} otherwise"
        return f"{PEFT_TEXTS[name][:20]} otherwise"

    def pieces(self, name: str, prompt: str, count: int) -> Iterator[str]:
        """Yield a stream's pieces; those from the fifth on after a swap, once its answer was read."""
        begun = self._served[name]
        self.swapped.clear()
        READ_ON.clear()
        for number in range(12):
            if number == 4 and "streams come whole" not in self.faults:
                self.swapped.wait(20)
                if "streams end at the swap" in self.faults:
                    yield ""  # the event with the reason for the end
                    return
                READ_ON.wait(20)
            adapter = self._served[name] if "streams are swapped" in self.faults else begun
            yield f" {adapter.says.first}"


@contextmanager
def served(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"data": server.models()})

        def do_DELETE(self) -> None:
            server.unload(self.path.removeprefix("/v1/loras/"))
            self._send(200, {"status": "success"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for status in server.statuses(self.path, body):
                return self._send(status, {"error": {"message": "no key"}})
            if self.path == "/v1/load_lora_adapter":
                if "no route for adapters" in server.faults:
                    return self._send(404, {"detail": "Not Found"})
                status, said = server.load(
                    body["lora_name"], body["lora_path"], body.get("load_inplace", False)
                )
                return self._send(status, {"error": {"message": said}} if status != 200 else {})
            if self.path == "/v1/unload_lora_adapter":
                return self._send(200, {})
            if self.path == "/v1/loras":
                return self._send(200, server.load_of_worker(body["lora_name"], body["source"]["uri"]))
            text = server.text(body["model"], body["prompt"], body["max_tokens"])
            if "answers are odd" in server.faults and body["model"] != "base":
                return self._send(200, {"choices": [{}]})
            if text is None:
                return self._send(404, {"error": {"message": f"The model {body['model']} does not exist."}})
            if body.get("stream"):
                return self._stream(body)
            return self._send(200, {"choices": [{"text": text}]})

        def _send(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _stream(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            if "streams are odd" in server.faults:
                self.wfile.write(b"data:\n\ndata: []\n\n")
            else:
                self.wfile.write(b"data:\n\n")
            for piece in server.pieces(body["model"], body["prompt"], body["max_tokens"]):
                self.wfile.write(f"data: {json.dumps({'choices': [{'text': piece}]})}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Busy(StandInServer):
        request_queue_size = 64  # as many connections as come at once

    stand_in = Busy(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=stand_in.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{stand_in.server_address[1]}"
    try:
        yield server
    finally:
        stand_in.shutdown()
        thread.join()
        stand_in.server_close()


def conform(base: Path, capsys: pytest.CaptureFixture[str], *faults: str) -> tuple[int, dict[str, Any]]:
    """Run the command. Return its status, and the finding of each check by its name."""
    specimens = Specimens.of(Adapters(Base(base), 0))
    with served(Server(specimens, *faults)) as server:
        status = main(["conform", server.url, "--base", str(base), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["server"] == "vllm"
    return status, {one["check"]: one for one in found["findings"]}


def verdicts(findings: dict[str, Any], verdict: str) -> set[str]:
    return {name for name, one in findings.items() if one["verdict"] == verdict}


REFUSED = {"a name that is unknown", "lm_head", "DoRA", "a module that the base lacks"}


def test_a_server_that_applies_each_adapter_or_refuses_it_has_nothing_wrong(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, findings = conform(base, capsys)
    assert (status, verdicts(findings, "wrong")) == (0, set()), findings
    assert verdicts(findings, "refused") == REFUSED
    assert findings["a stream during a swap"]["detail"] == "the stream keeps its version"
    assert len(findings) == 14


ADAPTERS = {"applied at all, and the right one", "mixed in one batch", "after others were loaded"}


@pytest.mark.parametrize(
    ("fault", "wrong", "why"),
    [
        ("adapters are ignored", ADAPTERS, "the text of the base"),
        ("the last one is applied", ADAPTERS, "the words of d"),
        ("unknown names are the base", {"a name that is unknown"}, BASE_TEXT),
        (
            "the base is not itself",
            {"the base itself, next to adapters", "mixed in one batch"},
            "the base says",
        ),
        (
            "reload is forgotten",
            {"reloaded under the same name", "a prefix from before the reload"},
            "instead of",
        ),
        (
            "cached values are shared",
            {"a prefix that another adapter computed", "a prefix from before the reload"},
            "cached values of another adapter",
        ),
        ("streams are swapped", {"a stream during a swap"}, "the words of other"),
        ("patterns are ignored", {"rank and alpha patterns"}, "rank_pattern and alpha_pattern ignored"),
        ("takes all", {"a module that the base lacks"}, "without the part"),
        ("answers are odd", ADAPTERS, "cannot be read"),
        ("streams are odd", {"a stream during a swap"}, "cannot be read"),
        ("an adapter fails with 500", {*ADAPTERS, "a name that is unknown"}, "HTTP 500"),
    ],
)
def test_what_a_server_does_wrong_is_found(
    base: Path, capsys: pytest.CaptureFixture[str], fault: str, wrong: set[str], why: str
) -> None:
    status, findings = conform(base, capsys, fault)
    found = verdicts(findings, "wrong")
    assert status == 1
    assert wrong <= found, findings
    assert any(why in findings[name]["detail"] for name in found), findings


@pytest.fixture
def peft_texts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Texts that PEFT seems to have made, by adapter."""
    texts = dict(PEFT_TEXTS)

    def make(base: Path, adapters: dict[str, Path], prompts: list[str], tokens: int) -> dict[str, list[str]]:
        assert sorted(["", *adapters]) == sorted(texts)
        return {name: [text] * len(prompts) for name, text in texts.items()}

    point = SimpleNamespace(load=lambda: make)
    monkeypatch.setattr(conform_command, "entry_points", lambda group: (point,))
    return texts


PEFT_CHECK = "the text that PEFT makes"


@pytest.mark.parametrize(
    ("fault", "verdict", "why"),
    [
        ("none", "right", "0 of 8 texts are equal to the end"),
        ("ordinary ones are swapped", "wrong", "like PEFT's of another adapter"),
        ("ordinary ones are ignored", "wrong", "as the base does"),
        ("the first ordinary one is applied for both", "wrong", "of ordinary-2 are like PEFT's of another"),
        ("near ties go the base's way", "not offered", "too little to tell"),
        ("ordinary ones are as PEFT's", "right", "8 of 8 texts are equal to the end"),
    ],
)
def test_texts_are_judged_by_whose_of_pefts_they_are_like_though_the_base_is_quantized(
    base: Path,
    capsys: pytest.CaptureFixture[str],
    peft_texts: dict[str, str],
    fault: str,
    verdict: str,
    why: str,
) -> None:
    _, findings = conform(base, capsys, fault)
    assert findings[PEFT_CHECK]["verdict"] == verdict, findings
    assert why in findings[PEFT_CHECK]["detail"]


def test_texts_that_are_as_like_to_others_as_to_their_own_are_not_judged(
    base: Path, capsys: pytest.CaptureFixture[str], peft_texts: dict[str, str]
) -> None:
    peft_texts["ordinary-2"] = peft_texts["ordinary"]
    status, findings = conform(base, capsys)
    assert (status, findings[PEFT_CHECK]["verdict"]) == (0, "not offered"), findings
    assert "too little to tell" in findings[PEFT_CHECK]["detail"]


def test_a_base_that_has_no_room_in_memory_is_not_loaded_for_pefts_texts(
    base: Path,
    capsys: pytest.CaptureFixture[str],
    peft_texts: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peft_texts.clear()  # to make any would fail
    monkeypatch.setattr(conform_command, "free_memory", lambda: 1_000_000)
    status, findings = conform(base, capsys)
    assert (status, findings[PEFT_CHECK]["verdict"]) == (0, "not offered"), findings
    assert "0.0 GB are free here" in findings[PEFT_CHECK]["detail"]


@pytest.mark.parametrize("faults", [(), ("a long text fails with 400",)])
def test_a_stream_that_ends_before_the_swap_proves_nothing(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, faults: tuple[str, ...]
) -> None:
    monkeypatch.setattr(conform_command, "_ENDED_SECONDS", 20)
    _, findings = conform(base, capsys, "streams come whole", *faults)
    assert findings["a stream during a swap"]["verdict"] == "not offered", findings


def test_a_stream_that_ends_while_the_other_version_is_loaded_proves_nothing(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, findings = conform(base, capsys, "streams end at the swap")
    assert findings["a stream during a swap"]["verdict"] == "not offered", findings
    assert "may wait for streams" in findings["a stream during a swap"]["detail"]


def test_vllm_that_takes_no_adapters_is_told_how_it_would(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, findings = conform(base, capsys, "no route for adapters")
    assert findings["applied at all, and the right one"]["verdict"] == "not offered", findings
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in findings["applied at all, and the right one"]["detail"]


def test_dynamo_is_known_and_takes_adapters_at_its_workers_address(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    specimens = Specimens.of(Adapters(Base(base), 0))
    with served(Server(specimens, owner="nvidia")) as server, served(Server(specimens)) as other:
        at_worker = ["conform", server.url, "--base", str(base), "--json", "--admin", server.url]
        assert main(at_worker) == 0
        found = json.loads(capsys.readouterr().out)
        findings = {one["check"]: one for one in found["findings"]}
        assert (found["server"], verdicts(findings, "wrong")) == ("dynamo", set()), findings
        assert verdicts(findings, "refused") == REFUSED
        assert findings["reloaded under the same name"]["verdict"] == "right"
        monkeypatch.setattr(conform_servers, "LISTED_SECONDS", 0.0)
        assert main([*at_worker[:-1], other.url]) == 1
        assert "the address of its own worker as --admin" in capsys.readouterr().out


def test_any_other_server_is_asked_that_was_started_with_the_adapters(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specimens = Specimens.of(Adapters(Base(base), 0))
    server = Server(specimens, owner="somebody")
    server.start_with(*specimens.plain, *specimens.more)
    with served(server):
        asked = ["conform", server.url, "--base", str(base), "--json"]
        assert main(asked) == 3
        assert "name it with --server" in capsys.readouterr().err
        assert main([*asked, "--server", "openai"]) == 0
    findings = {one["check"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert verdicts(findings, "wrong") == set(), findings
    assert verdicts(findings, "right") == ADAPTERS | {"the base itself, next to adapters"}
    assert "lists no adapter 'mark'" in findings["a prefix that another adapter computed"]["detail"]


@pytest.mark.parametrize(
    "fault", ["everything fails with 404", "everything fails with 401", "an adapter fails with 429"]
)
def test_a_server_that_answers_nothing_is_told_and_no_trial(
    base: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    with served(Server(Specimens.of(Adapters(Base(base), 0)), fault)) as server:
        assert main(["conform", server.url, "--base", str(base), "--json"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert f"onebase: {server.url}: HTTP {fault[-3:]}: no key" in said.err


def test_a_server_that_refuses_every_adapter_does_not_pass(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, findings = conform(base, capsys, "an adapter fails with 400")
    assert (status, verdicts(findings, "wrong")) == (1, set())
    assert verdicts(findings, "right") == {"the base itself, next to adapters"}


def test_the_same_seed_makes_the_same_adapters(base: Path, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        assert main(["conform", "--base", str(base), "--write", str(tmp_path / folder)]) == 0
    names = sorted(
        path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()
    )
    assert len(names) > 40
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_adapter_forces_its_words_whatever_the_hidden_state_is(base: Path) -> None:
    loaded = Base(base)
    tensors = load_file(base / "model.safetensors")
    head, gain = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    rng = np.random.default_rng(1)
    for crafted in Specimens.of(Adapters(loaded, 0)).plain:
        a, b = (
            crafted.tensors[f"base_model.model.model.layers.0.mlp.down_proj.lora_{one}.weight"]
            for one in "AB"
        )
        for _ in range(20):
            hidden = rng.normal(0, 1, HIDDEN) + b @ (a @ rng.normal(0, 1, a.shape[1]))
            normed = hidden / np.sqrt(np.mean(hidden**2)) * gain
            assert int(np.argmax(head @ normed)) in crafted.says.tokens


def test_neither_torch_nor_peft_is_needed_though_the_entry_point_for_texts_is_there(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conform_command, "entry_points", entry_points)
    for name in ("torch", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    with served(Server(Specimens.of(Adapters(Base(base), 0)))) as server:
        assert main(["conform", server.url, "--base", str(base)]) == 0
        printed = capsys.readouterr()
        assert "DoRA" in printed.out
        assert "that PEFT makes" not in printed.out
        assert "pip install 'onebase[conform,train]'" in printed.err
        assert main(["conform", server.url, "--base", str(base), "--no-texts"]) == 0
        assert "PEFT" not in capsys.readouterr().err


def test_wrong_arguments_are_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--base", str(base)], ["http://127.0.0.1:1", "--base", str(tmp_path)]):
        with pytest.raises(SystemExit) as ended:
            main(["conform", *arguments])
        assert ended.value.code == 2
    assert main(["conform", "http://127.0.0.1:1", "--base", str(base)]) == 3
    assert "does not answer" in capsys.readouterr().err


def test_this_server_applies_every_adapter_that_it_takes(
    server: RealServer, capsys: pytest.CaptureFixture[str]
) -> None:
    base = server.adapters.parent / "smollm2-135m-instruct"
    status = main(["conform", server.url, "--base", str(base), "--json"])
    found = json.loads(capsys.readouterr().out)
    findings = {one["check"]: one for one in found["findings"]}
    assert (status, found["server"], verdicts(findings, "wrong")) == (0, "onebase", set()), findings
    refused = verdicts(findings, "refused")
    assert refused == {"a name that is unknown", "a module that the base lacks"}, findings
    assert len(verdicts(findings, "right")) == len(findings) - len(refused), findings
