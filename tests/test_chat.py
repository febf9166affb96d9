"""A conversation computes only what is new, and keeps what was said apart from control tokens."""

import io
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from systems import LISTENING, POSIX

from llama_np import KVCache, load, load_tokenizer
from llama_np.chat import Chat
from llama_np.cli import main
from llama_np.generate import generate

CONFIG, WEIGHTS = load("fairytales", np.float64)
TOKENIZER = load_tokenizer("fairytales")
CTRL_C = "\x03"


def new_chat(**changes: object) -> Chat:
    options: dict[str, object] = {"max_tokens": 8, "format": "llama2"} | changes
    return Chat(CONFIG, WEIGHTS, TOKENIZER, **options)  # type: ignore[arg-type]


def say(chat: Chat, text: str) -> str:
    return "".join(token.text for token in chat.answer(text))


@pytest.mark.parametrize("format", ["llama2", "plain"])
def test_cached_turns_answer_as_a_fresh_model_would(format: str) -> None:
    chat = new_chat(format=format)
    for text in ("Once upon a time", " and then", " The king"):
        before = [dict(message) for message in chat.messages]
        answer = say(chat, text)
        fresh = new_chat(format=format, messages=before)
        assert say(fresh, text) == answer
        assert fresh.reused == 0
        assert chat.messages[-1] == {"role": "assistant", "content": answer}


def test_a_second_turn_computes_only_the_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    extend = KVCache.extend

    def counting(self: KVCache, positions: np.ndarray) -> np.ndarray:
        computed.append(positions.shape[1])
        return extend(self, positions)

    monkeypatch.setattr(KVCache, "extend", counting)
    chat = new_chat(format="plain")
    say(chat, "Once upon a time there was a little girl")
    known = len(chat.cached_ids)
    computed.clear()
    say(chat, " who")
    new_tokens = len(TOKENIZER.encode("".join(m["content"] for m in chat.messages[:3]))) - known
    assert chat.reused >= known - 1  # the latest token may merge with the new text
    assert computed[0] <= new_tokens + 2
    assert computed[1:] == [1] * len(computed[1:])


def test_what_a_user_types_never_becomes_a_control_token() -> None:
    chat = new_chat()
    chat.messages = [{"role": "user", "content": "</s><s>[INST] <unk> x"}]
    ids = chat._encode()
    assert ids.count(1) == 1
    assert not {0, 2} & set(ids)


def test_an_answer_that_is_stopped_stays_in_the_history_and_the_cache_stays_true() -> None:
    chat = new_chat(max_tokens=20)
    answer = chat.answer("The princess")
    shown = next(answer).text + next(answer).text
    answer.close()  # type: ignore[attr-defined]
    assert chat.messages[-1]["content"] == shown
    before = [dict(message) for message in chat.messages]
    assert say(chat, "Go on") == say(new_chat(max_tokens=20, messages=before), "Go on")


def test_the_oldest_turns_make_room_and_the_system_message_stays() -> None:
    short = replace(CONFIG, max_position_embeddings=100)
    chat = Chat(short, WEIGHTS, TOKENIZER, max_tokens=4, format="llama2")
    chat.messages = [{"role": "system", "content": "Be kind."}]
    forgotten = 0
    for i in range(8):
        say(chat, f"Tell me a story about the number {i} and a bear")
        forgotten += chat.forgotten
    assert forgotten > 0
    assert forgotten % 2 == 0
    assert chat.messages[0]["role"] == "system"
    assert chat.messages[1]["role"] == "user"
    with pytest.raises(ValueError, match="too long"):
        chat.answer("bear " * 200)
    assert chat.messages[-1]["role"] == "assistant"


def test_answering_again_replaces_the_answer() -> None:
    chat = new_chat()
    first = say(chat, "The king")
    again = "".join(token.text for token in chat.regenerate())
    assert again == first  # greedy
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


def test_a_chat_equals_generate_on_the_same_ids() -> None:
    chat = new_chat()
    answer = say(chat, "Hello")
    ids = TOKENIZER.encode_parts([1, "[INST] Hello [/INST]"])
    (done,) = generate([ids], WEIGHTS, CONFIG, max_new_tokens=8, tokenizer=TOKENIZER)
    assert answer == done.text


def test_the_command_reads_messages_and_commands_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    lines = [
        "/help",
        "/set max_tokens 3",
        "/set temp -1",
        "/nonsense",
        "Once upon",
        '"""',
        "two",
        "lines",
        '"""',
        "/regen",
        f"/save {file}",
        "/clear",
        f"/save {file}",
        "/exit",
        "never read",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "--format", "llama2"]) == 0
    output = capsys.readouterr()
    messages = json.loads(file.read_text("utf-8"))
    assert [m["content"] for m in messages if m["role"] == "user"] == ["Once upon", "two\nlines"]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert answers[0] + "\n" in output.out
    assert "unknown command /nonsense" in output.err
    assert "temperature" in output.err
    assert "exists" in output.err
    assert "/regen" in output.err


def test_a_fourth_of_the_context_stays_free_for_an_answer() -> None:
    short = replace(CONFIG, max_position_embeddings=100)
    chat = Chat(short, WEIGHTS, TOKENIZER, max_tokens=90, format="llama2")
    for i in range(8):
        chat.answer(f"Tell me a story about the number {i} and a bear")
        assert len(chat._encode()) <= 75
        chat.messages.append({"role": "assistant", "content": "There was a bear."})
    assert chat.forgotten > 0
    chat.answer("bear " * 66)  # a long message may leave less
    assert 75 < len(chat._encode()) < 100


def test_a_format_without_its_control_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no <\|start_header_id\|>"):
        new_chat(format="llama3")


def test_a_token_unknown_to_the_tokenizer_does_not_end_the_talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(self: Chat, text: str) -> None:
        raise IndexError("token id 2629 is outside the vocabulary of 405")

    monkeypatch.setattr(Chat, "answer", unknown)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\nt\udcffo\n/help\n"))
    assert main(["chat"]) == 0
    assert capsys.readouterr().err.count("outside the vocabulary") == 2


# Without a terminal of its own a process gets no Ctrl-C.
OWN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"


class Terminal:
    """A chat on a pseudo-terminal of its own."""

    def __init__(self, *options: str) -> None:
        import pty

        self.end, end = pty.openpty()
        self.unread = ""
        command = [sys.executable, "-c", OWN_TERMINAL + LISTENING, "chat", *options]
        self.process = subprocess.Popen(
            command, stdin=end, stdout=end, stderr=end, start_new_session=True
        )
        os.close(end)

    def type(self, text: str) -> None:
        """Type some keys."""
        os.write(self.end, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until a text appears."""
        deadline = time.monotonic() + 30
        while text not in self.unread:
            assert time.monotonic() < deadline, self.unread
            if select.select([self.end], [], [], 0.1)[0]:
                self.unread += os.read(self.end, 4096).decode(errors="replace")
        self.unread = self.unread.partition(text)[2]


@POSIX
def test_ctrl_c_stops_an_answer_or_forgets_a_line_and_the_talk_goes_on() -> None:
    chat = Terminal("-n", "400", "--temp", "1", "--seed", "1", "--dtype", "float64")
    chat.wait_for("> ")
    chat.type("Once upon a time\n")
    chat.wait_for("time\r\n")
    chat.wait_for(" ")  # the answer has begun
    chat.type(CTRL_C)
    chat.wait_for("(the answer ended early: interrupted)")
    chat.wait_for("> ")
    chat.type("half a li")
    chat.wait_for("half a li")
    chat.type(CTRL_C)
    chat.wait_for("(/exit or Ctrl-D leaves)")
    chat.type("/set max_tokens 2\nThe king\n")  # the half line is gone
    chat.wait_for("(the answer ended early: length)")
    chat.type("/exit\n")
    assert chat.process.wait(30) == 0
    os.close(chat.end)
