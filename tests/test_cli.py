"""The command, run as a user runs it: its streams, its JSON and its exit codes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from argparse import _SubParsersAction
from pathlib import Path

import numpy as np
import pytest
from systems import LISTENING, POSIX

from llama_np import classify, load, load_tokenizer, threads
from llama_np.bulk import read_lines
from llama_np.cli import build_parser, main
from llama_np.terminal import Progress, visible

COMMAND = [sys.executable, "-m", "llama_np"]


def run(*arguments: str, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own and expect an exit code."""
    done = subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done


def in_process(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    output = capsys.readouterr()
    return code, output.out, output.err


def test_standard_output_carries_only_the_text() -> None:
    done = run("generate", "Once upon a time", "-n", "12")
    answer = json.loads(run("generate", "Once upon a time", "-n", "12", "--json").stdout)
    assert done.stdout == answer["text"] + "\n"
    assert "tokens" in done.stderr


def test_json_output_is_one_complete_object(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = in_process(capsys, "generate", "The king", "-n", "5", "--json", "--logprobs", "2")
    answer = json.loads(out)
    tokenizer = load_tokenizer("fairytales")
    assert answer["prompt_token_ids"] == tokenizer.encode("The king")
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == 5
    assert answer["finish_reason"] == "length"
    whole = tokenizer.decode(answer["prompt_token_ids"] + answer["token_ids"])
    assert whole == "The king" + answer["text"]
    assert [len(step["top_logprobs"]) for step in answer["logprobs"]] == [2] * 5
    assert {"prompt_tokens_per_second", "decode_tokens_per_second"} <= answer["timings"].keys()


def test_only_line_feeds_divide_a_file_of_lines_and_the_mark_of_windows_is_no_text(
    tmp_path: Path,
) -> None:
    file = tmp_path / "lines"
    file.write_bytes("\ufeffone\r\n\r\ntwo\u2028still two\n\n".encode())
    assert read_lines(str(file)) == ["one", "two\u2028still two"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"one\ntw\xffo\n", "line 2: not UTF-8"), (b"\n", "holds no line")]
)
def test_a_file_without_lines_of_text_is_refused_by_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "lines"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"lines'.*{message}"):
        read_lines(str(file))


def test_every_command_and_option_says_what_it_does() -> None:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, _SubParsersAction))
    for name, parser in commands.choices.items():
        assert parser.description, name
        for action in parser._actions:
            assert action.help, (name, action.option_strings or action.dest)


@pytest.mark.parametrize("command", [["classify", "A king"], ["generate", "A king", "-n", "1"]])
def test_the_number_of_threads_is_heeded(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(threads, "limit_threads", asked.append)
    assert main([*command, "--threads", "1"]) == 0
    assert asked == [1]


def test_no_stream_prints_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    _, streamed, _ = in_process(capsys, "generate", "A bear", "-n", "8")
    _, whole, _ = in_process(capsys, "generate", "A bear", "-n", "8", "--no-stream")
    assert streamed == whole


@pytest.mark.parametrize("arguments", [["generate", "-", "-n", "4"], ["generate", "-n", "4"]])
def test_the_prompt_can_come_from_standard_input(arguments: list[str]) -> None:
    piped = run(*arguments, stdin="A bear\n")
    assert piped.stdout == run("generate", "A bear", "-n", "4").stdout


def test_all_lines_of_a_file_are_decoded_as_one_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("The king\n\nOnce upon a time there\nA\n", encoding="utf-8")
    options = ["-n", "6", "--temp", "0.7", "--seed", "11", "--dtype", "float64"]
    _, out, _ = in_process(capsys, "generate", "--prompts", str(file), *options)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["The king", "Once upon a time there", "A"]
    for row in rows:
        options[5] = str(row["seed"])
        _, alone, _ = in_process(capsys, "generate", row["prompt"], "--json", *options)
        assert json.loads(alone)["token_ids"] == row["token_ids"]


def test_a_seed_makes_sampling_repeatable_and_is_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hot = ["generate", "A", "-n", "8", "--temp", "1.5"]
    _, drawn, err = in_process(capsys, *hot)
    seed = err.split("seed ")[1].split(" ")[0]
    _, again, _ = in_process(capsys, *hot, "--seed", seed)
    assert drawn == again


def test_tokenize_shows_ids_and_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = in_process(capsys, "tokenize", "A king <s>", "--json")
    answer = json.loads(out)
    assert answer["ids"][0] == 1 not in answer["ids"][1:]
    assert answer["ids"] == load_tokenizer("fairytales").encode("A king <s>")
    assert len(answer["tokens"]) == len(answer["ids"])
    _, table, _ = in_process(capsys, "tokenize", "A king")
    assert [line.split()[0] for line in table.splitlines()] == [
        str(i) for i in load_tokenizer("fairytales").encode("A king")
    ]


def test_classify_answers_with_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
    text = "There was once a King who had three sons."
    _, out, _ = in_process(capsys, "classify", text, "--json")
    answer = json.loads(out)
    config, weights = load("fairytales")
    (scores,) = classify(np.array([load_tokenizer().encode(text)]), weights, config)
    chances = np.exp(scores) / np.exp(scores).sum()
    assert answer["probabilities"] == pytest.approx(
        {config.id2label[i]: p for i, p in enumerate(chances)},
        rel=1e-5,  # float32
    )
    assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)


def test_inspect_counts_parameters_and_names_the_source_of_every_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out, _ = in_process(capsys, "inspect", "--json")
    summary = json.loads(out)
    _, weights = load("fairytales", "bfloat16")
    arrays = {id(a): a for layer in weights.values() for a in _arrays(layer)}
    assert summary["parameters"] == sum(a.size for a in arrays.values())
    assert summary["config_sources"]["hidden_size"] == "config.json"
    assert summary["config_sources"]["mlp_bias"] == "default of transformers"
    _, table, _ = in_process(capsys, "inspect")
    assert f"{summary['parameters']:,}" in table


def _arrays(value: object) -> list[np.ndarray]:
    return list(value.values()) if isinstance(value, dict) else [value]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--model", "no/such/folder"], "'no/such/folder'"),
        (["generate", "--prompts", "no-such-file"], "no-such-file"),
        (["inspect", "no/such/folder"], "'no/such/folder'"),
        (["explore", "x", "-o", "no/such/folder/x"], "folder'"),
        (["convert", "fairytales", "no/such/folder/x"], "folder'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(arguments: list[str], message: str) -> None:
    done = run(*arguments, code=1)
    assert done.stdout == ""
    assert done.stderr.startswith("llama-np: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


WRONG_USAGE = {
    "": "COMMAND",
    "sing": "sing",
    "generate --no-such-option": "--no-such-option",
    "generate x --temp -1": "--temp/--temperature: '-1': expected a finite number >= 0",
    "generate x --temp nan": "--temp/--temperature: 'nan'",
    "generate x --top-p 0": "--top-p: '0': expected a finite number above 0, at most 1",
    "generate x --min-p 2": "--min-p: '2': expected a finite number from 0 to 1",
    "generate x --repeat-penalty x": "--repeat-penalty: 'x'",
    "generate x -n -1": "-n/--max-tokens: '-1': expected a whole number >= 0",
    "generate x --json --logprobs -2": "--logprobs: '-2'",
    "generate x --logprobs 2": "--logprobs needs --json",
    "generate x --prompts y": "not both",
    "generate x -o y": "--output and --scheduler need --prompts",
    "bench --batch a": "--batch: 'a': expected a whole number >= 1",
    "inspect x -m y": "not both",
    "record --ids 1,a -o z": "--ids: '1,a': expected whole numbers >= 0 with commas",
    "record --ids 1,2,3 --chunks 0,3 -o z": "--chunks: '0,3': expected whole numbers >= 1",
    "generate x --stop=": "--stop: expected a text, found an empty one",
    "convert x y --shards 3": "--shards has no effect with --to hf",
    "convert x y --version 2": "--version has no effect with --to hf",
    "convert x y --to llama2c --dtype float16": "--dtype has no effect with --to llama2c",
    "convert x y --to meta --max-shard-size 2": "--max-shard-size has no effect with --to meta",
    "convert x y --max-shard-size nan": "--max-shard-size: 'nan': expected a finite number above 0",
}


@pytest.mark.parametrize("arguments", WRONG_USAGE)
def test_wrong_usage_is_exit_code_2_and_names_the_option(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(arguments.split())
    except SystemExit as done:
        code = done.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and WRONG_USAGE[arguments] in err


@POSIX
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tokenize hi >&-", "standard output is closed"),
        ("generate -n 3 <&-", "standard input is closed"),
        ("chat <&-", "standard input is closed"),
        ("score - <&-", "standard input is closed"),
        (r"generate < <(printf 'a\xffb')", "standard input: not UTF-8 text"),
        (r"tokenize $'a\xff'", r"'a\udcff': not UTF-8 text"),
    ],
)
def test_closed_streams_and_other_bytes_than_text_are_named(line: str, message: str) -> None:
    command = f'"{sys.executable}" -m llama_np {line}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr and done.stderr.count("\n") == 1


@POSIX
def test_a_talk_goes_on_after_a_message_of_other_bytes_than_text() -> None:
    command = [sys.executable, "-m", "llama_np", "chat", "-n", "3"]
    done = subprocess.run(command, input=b"a\xffb\nOnce\n", capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout
    assert b"error: the message is not UTF-8 text" in done.stderr


@POSIX
def test_closed_standard_error_is_nobodys_problem() -> None:
    command = f'"{sys.executable}" -m llama_np generate Once -n 3 2>&-'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout


@POSIX
def test_an_interrupt_is_exit_code_130_after_what_was_shown() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING, "generate", "A", "-n", "400", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    shown = process.stdout.read(4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert len(shown) == 4
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_prompt_that_fills_the_context_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = in_process(capsys, "generate", "so " * 600)
    assert (code, out) == (1, "")
    assert "the prompt has 602 tokens, the context 512: nothing is generated" in err


def test_a_long_text_is_classified_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = in_process(capsys, "classify", "so " * 600)
    assert code == 0 and "the text has 602 tokens, the model was trained on 512" in err


def test_an_existing_file_is_refused_with_the_option_that_replaces_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine", encoding="utf-8")
    code, _, err = in_process(capsys, "explore", "x", "-o", str(page))
    assert code == 1 and err.endswith("page.html' (--overwrite replaces it)\n")
    assert page.read_text("utf-8") == "mine"


def test_work_that_would_be_lost_is_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").write_text("mine", encoding="utf-8")
    for name, message in (("old", "file exists"), ("no/folder", "no such folder")):
        file = str(tmp_path / name)
        code, out, err = in_process(capsys, "generate", "x", "-m", "no-model", "--save-cache", file)
        assert (code, out) == (1, "") and message in err
    code, _, err = in_process(capsys, "bench", "--context", "600")
    assert code == 1 and "the model's context has 512 tokens" in err


def test_a_prompt_can_be_computed_ahead_without_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "prompt.cache")
    assert in_process(capsys, "generate", "Once upon", "-n", "0", "--save-cache", file)[0] == 0
    _, out, err = in_process(capsys, "generate", "Once upon", "-n", "4", "--load-cache", file)
    assert "3 of 4 prompt tokens were computed before" in err
    assert out == in_process(capsys, "generate", "Once upon", "-n", "4")[1]


def test_progress_is_shown_on_terminals_where_no_result_appears(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, beside, shown in (
        (Terminal(), True, ""),
        (Terminal(), False, "\rlines 2/3"),
        (io.StringIO(), True, "\rlines 2/3"),
    ):
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err := Terminal())
        progress = Progress("lines", 3, beside)
        progress.advance(2)
        progress.advance(0)
        assert err.getvalue() == shown


@POSIX
def test_a_reader_that_leaves_early_is_no_error() -> None:
    shell = f"{sys.executable} -m llama_np generate A -n 50 | head -c 1"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr


def test_help_and_version_are_quick() -> None:
    started = time.perf_counter()
    assert "generate" in run("--help").stdout
    assert time.perf_counter() - started < 5  # 0.2 s on a quiet machine; a hang or a model load
    assert run("--version").stdout.strip() == "0.1.0"


def test_a_terminal_never_gets_control_characters() -> None:
    assert visible("a\x1b[31m\x07\u202eb\nc\td") == "a\\x1b[31m\\x07\\u202eb\nc\td"
    assert visible("स्ते 👩\u200d🚀 é") == "स्ते 👩\u200d🚀 é"


@POSIX
def test_on_a_terminal_the_prompt_is_echoed_and_the_text_follows() -> None:
    import pty

    parent, child = pty.openpty()
    arguments = [*COMMAND, "generate", "Once upon", "-n", "4"]
    with subprocess.Popen(arguments, stdout=child, stderr=child, stdin=child) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                part = os.read(parent, 1000)
            except OSError:  # Linux reports the closed terminal this way
                break
            if not part:
                break
            shown += part
        assert process.wait() == 0
    os.close(parent)
    assert shown.startswith(b"Once upon")
