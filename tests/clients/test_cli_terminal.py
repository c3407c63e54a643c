"""The command at a real terminal (a pty), as a person uses it."""

from __future__ import annotations

import codecs
import os
import queue
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.clients.registry_double import Registry, digest
from tests.clients.training_double import CURVE, Trainer, event, step, succeeded

pty = pytest.importorskip("pty", reason="there are no ptys on this platform")


class Person:
    """Someone at a terminal: sees everything that the command shows, and types."""

    def __init__(self, *arguments: str, terminal: str = "dumb") -> None:
        self._terminal, end = pty.openpty()
        command = [sys.executable, "-m", "onebase.cli", *arguments]
        environment = os.environ | {"TERM": terminal, "COLUMNS": "200"}
        self.process = subprocess.Popen(
            command,
            stdin=end,
            stdout=end,
            stderr=end,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(end)
        self.seen = ""
        # A terminal gives 4,096 bytes at a time: the last may be the first of a letter's.
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def sees(self, pattern: str, *, pressing: str = "") -> str:
        """Read on until `pattern` appears; gives everything new up to its end.

        pressing: typed again while nothing comes. A Ctrl-C between the prompt and the wait for a key is only
        noticed with the next one, by Python's readline.
        """
        patience = 60
        while (found := re.search(pattern, self.seen)) is None:
            if not select.select([self._terminal], [], [], 2.0)[0]:
                patience -= 1
                assert patience, f"{pattern!r} did not come after: {self.seen!r}"
                self.types(pressing)
                continue
            try:
                new = os.read(self._terminal, 65536)
            except OSError:  # how Linux reports the end of a pty
                new = b""
            if not new:
                raise AssertionError(f"{pattern!r} never came after: {self.seen!r}")
            self.seen += self._decoder.decode(new)
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def types(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def leaves(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


def _take_terminal() -> None:
    """Make the pty the process's own terminal, so that Ctrl-C typed there becomes SIGINT."""
    import fcntl
    import termios

    # Tests that run in a shell's background inherit Ctrl-C as ignored; a login does not.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def person() -> Iterator[Callable[..., Person]]:
    people: list[Person] = []

    def arrive(*arguments: str, terminal: str = "dumb") -> Person:
        people.append(Person(*arguments, terminal=terminal))
        return people[-1]

    yield arrive
    for one in people:
        one.leaves()


@pytest.fixture
def hung_up() -> queue.Queue[bool]:
    """Whether the client dropped the connection, per answer that never ends."""
    return queue.Queue()


@pytest.fixture
def url(serve: Callable[..., Any], wire: Any, hung_up: queue.Queue[bool]) -> str:
    """A server whose answer to "endless" never ends by itself."""

    registry = Registry()
    registry.activate("pirate", registry.add("pirate", "x"))

    def script(request: Any) -> None:
        if request.path == "/v1/adapters":
            request.reply(200, {"data": [registry.adapter("pirate")]})
        elif request.path == "/v1/models":
            request.reply(200, {"data": [{"id": "tiny"}, {"id": "pirate"}]})
        elif request.body["messages"][-1]["content"] == "endless":
            request.begin_stream()
            request.send(wire.sse(wire.piece("on and \x1b[31mon"), done=False))
            hung_up.put(request.wait_for_hang_up())
        elif request.body["messages"][-1]["content"] == "broken":
            request.begin_stream()
            request.send(wire.sse(wire.piece("on and"), done=False))
            request.hang_up()
        else:
            turns = [turn["content"] for turn in request.body["messages"]]
            request.begin_stream()
            request.send(wire.sse(*wire.answer(" | ".join(turns))))
            request.end_stream()

    return str(serve(script).url)


def test_ctrl_c_stops_the_answer_and_not_the_conversation(
    person: Callable[..., Person], url: str, hung_up: queue.Queue[bool]
) -> None:
    one = person("chat", "--url", url)
    assert f"Talking to tiny at {url}. Adapters: pirate." in one.sees("base> ")
    one.types("endless\n")
    assert "\x1b[31m" not in one.sees(r"on and \S*on")
    one.types("\x03")
    one.sees(r"\(stopped\)")
    assert hung_up.get(timeout=120)
    one.sees("base> ")
    one.types("/adapter pirate\n")
    one.sees("answering from now on: pirate")
    one.sees("pirate> ")
    one.types("again\n")
    one.sees(r"endless \| on and .*on \| again")
    one.sees(r"4\.0 tokens/s.*\)")
    one.types("/quit\n")
    assert one.process.wait(timeout=120) == 0


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_ctrl_d_does(
    person: Callable[..., Person], url: str
) -> None:
    one = person("chat", "--url", url)
    one.sees("base> ")
    one.types("\x03")
    one.sees(r"Ctrl-D or /quit leaves", pressing="\x03")
    one.sees("base> ")
    one.types("\x04")
    assert one.process.wait(timeout=120) == 0


def test_a_message_of_several_lines_is_written_with_backslashes_and_ctrl_c_drops_it(
    person: Callable[..., Person], url: str
) -> None:
    one = person("chat", "--url", url)
    one.sees("base> ")
    one.types("never sent\\\n")
    one.sees(r"\.\.\. ")
    one.types("\x03")
    one.sees(r"Ctrl-D or /quit leaves", pressing="\x03")
    one.sees("base> ")
    one.types("first line\\\n")
    one.sees(r"\.\.\. ")
    one.types("second line\n")
    one.sees("second line\r\nfirst line\r\nsecond line")
    one.types("/quit\n")
    assert one.process.wait(timeout=120) == 0


def test_a_failed_command_leaves_the_conversation_open(person: Callable[..., Person], url: str) -> None:
    one = person("chat", "--url", url)
    one.sees("base> ")
    one.types("/adapter pirat\n")
    one.sees("did you mean pirate")
    one.sees("base> ")
    one.types("hello\n")
    one.sees("hello\r\n.*hello")
    one.types("broken\n")
    one.sees(r"on and\r\n.*the connection to .* broke")
    one.types("again\n")
    one.sees(r"hello \| hello \| again")
    one.types("/quit\n")
    assert one.process.wait(timeout=120) == 0


def test_ctrl_c_ends_generate_with_its_own_status(
    person: Callable[..., Person], url: str, hung_up: queue.Queue[bool]
) -> None:
    one = person("generate", "--url", url, "endless")
    one.sees("on and")
    one.types("\x03")
    assert hung_up.get(timeout=120)
    assert one.process.wait(timeout=120) == 130


def test_models_is_a_table_at_a_terminal(person: Callable[..., Person], url: str) -> None:
    one = person("models", "--url", url)
    assert "\t" not in one.sees(f"pirate +adapter +{digest('x')[:12]} +8")


def test_push_shows_bars_and_then_what_it_brought(
    person: Callable[..., Person], serve: Callable[..., Any], folder: Path
) -> None:
    server = serve(Registry().script)
    one = person("adapters", "push", str(folder), "--activate", "--url", server.url, terminal="xterm")
    one.sees("sending.*━━.*12.6 kB")
    one.sees("proving.*━━")
    one.sees(r"acme-support@[0-9a-f]{12}.*ready, active")
    one.sees("onebase generate --adapter acme-support")
    assert one.process.wait(timeout=120) == 0


def test_ctrl_c_while_the_server_proves_says_that_it_goes_on(
    person: Callable[..., Person], serve: Callable[..., Any], folder: Path
) -> None:
    endless = [("proving", step / 1000) for step in range(1000)]
    one = person("adapters", "push", str(folder), "--url", serve(Registry(steps=endless).script).url)
    one.sees("uploading")
    one.sees("proving")
    one.types("\x03")
    one.sees("The server continues: `onebase adapters list` shows the state.")
    assert one.process.wait(timeout=120) == 130


def test_a_terminal_that_cannot_move_its_cursor_gets_a_line_for_each_stage(
    person: Callable[..., Person], serve: Callable[..., Any], folder: Path
) -> None:
    one = person("adapters", "push", str(folder), "--url", serve(Registry().script).url)
    one.sees("uploading 12.5 kB\r\nvalidating\r\nproving\r\n")
    assert one.process.wait(timeout=120) == 0


@pytest.mark.parametrize("action", [["list"], ["show", "acme"], ["diff", "acme", "acme"]])
def test_what_is_looked_at_is_laid_out_for_the_terminal(
    person: Callable[..., Person], serve: Callable[..., Any], action: list[str]
) -> None:
    registry = Registry()
    registry.activate("acme", registry.add("acme", "1"))
    one = person("adapters", *action, "--url", serve(registry.script).url)
    assert "\t" not in one.sees(digest("1")[:12])
    assert one.process.wait(timeout=120) == 0


def test_watch_draws_a_bar_and_then_what_came_of_it(
    person: Callable[..., Person], serve: Callable[..., Any]
) -> None:
    trainer = Trainer()
    job = trainer.add(1, "running", event(1), progress={"phase": "training"})
    trainer.live = [(step(2, 1, seconds_left=9.0), {}), (event(3, "a notice"), {}), (None, succeeded())]
    trainer.add_file("file-curve", CURVE.encode())
    one = person("jobs", "watch", job, "--url", serve(trainer.script).url, terminal="xterm")
    one.sees("acme  training .*?━")
    one.sees("a notice")
    one.sees(r"held-out loss +2\.5000")
    one.sees("onebase generate --adapter acme")
    assert one.process.wait(timeout=120) == 0


def test_ctrl_c_while_watching_says_that_the_job_goes_on(
    person: Callable[..., Person], serve: Callable[..., Any]
) -> None:
    trainer = Trainer()
    job = trainer.add(1, "running", event(1), progress={"phase": "training"})
    trainer.live = [(step(2, 1), {})]
    one = person("jobs", "watch", job, "--url", serve(trainer.script).url)
    one.sees("step 1/4")
    one.types("\x03")
    one.sees("The job continues. To watch it again: onebase jobs watch ftjob-00000000")
    one.sees("To end it: onebase jobs cancel")
    assert one.process.wait(timeout=120) == 130
    assert trainer.jobs[job]["status"] == "running"
