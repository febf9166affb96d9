"""Names on the hub, with the real client and a server on this machine that speaks its protocol."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from systems import POSIX

from llama_np import load
from llama_np.checkpoint import locate
from llama_np.hub import PATTERNS, is_hub_name

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


def repository() -> dict[str, bytes]:
    """The bundled model, with files around it that must never be fetched."""
    files = {path.name: path.read_bytes() for path in locate("fairytales").iterdir()}
    inner = {f"inner/{name}": content for name, content in files.items()}
    return (
        files
        | inner
        | {
            "pytorch_model.bin": b"\x80\x04 a pickle",
            "consolidated.00.pth": b"PK",
            "training_args.bin": b"\x80",
            "model.onnx": b"onnx",
            "inner/deeper/config.json": b"{}",
            "original/params.json": b"{}",
            "original/consolidated.00.pth": b"PK",
        }
    )


class Hub(http.server.BaseHTTPRequestHandler):
    """GET /api/models/O/N/revision/R, and HEAD and GET of /O/N/resolve/R/FILE."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        parts = path.strip("/").split("/")
        if path.startswith("/api/models/owner/tales"):
            self.describe(parts)
        elif parts[:3] == ["owner", "tales", "resolve"]:
            self.file("/".join(parts[4:]), parts[3], body)
        else:
            self.send({}, json.dumps({"error": "Repository not found"}).encode(), body, 404)

    def describe(self, parts: list[str]) -> None:
        revision = parts[5] if len(parts) > 5 else "main"
        commit = COMMITS.get(revision, revision)
        if parts[4:5] == ["tree"]:
            listed: Any = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in self.files.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in self.files]
            listed = {"id": "owner/tales", "sha": commit, "siblings": siblings}
        self.send({"Content-Type": "application/json"}, json.dumps(listed).encode(), True)

    def file(self, name: str, revision: str, body: bool) -> None:
        content = self.files.get(name)
        if content is None:
            missing = {"X-Error-Code": "EntryNotFound"}
            self.send(missing, b"", body, 404)
            return
        tag = hashlib.sha256(content).hexdigest()
        commit = COMMITS.get(revision, revision)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self.send(headers, content, body)

    def send(self, headers: dict[str, str], content: bytes, body: bool, status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status == 404 and "X-Error-Code" not in headers:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error."""


@contextmanager
def hub_server() -> Iterator[tuple[str, list[str]]]:
    Hub.files, Hub.asked = repository(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", Hub.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_with_hub(
    url: str, cache: Path, code: str, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with the hub's own switches set; the client reads them when it is imported."""
    unwanted = ("HF_", "HUGGING", "TRANSFORMERS", "http", "HTTP", "all_proxy", "ALL_PROXY")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    environment |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        **extra,
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


LOAD = "from llama_np import load; c, w = load('owner/tales{}'); print(c.hidden_size)"


def test_a_checkpoint_comes_from_the_hub_without_its_pickles(tmp_path: Path) -> None:
    with hub_server() as (url, asked):
        result = run_with_hub(url, tmp_path, LOAD.format(""))
        assert result.stdout.strip() == str(load("fairytales")[0].hidden_size), result.stderr
        fetched = {path.rpartition("/")[2] for path in asked if "/resolve/" in path}
        assert {"config.json", "model.safetensors", "tokenizer.model"} <= fetched
        assert not any(name.endswith((".bin", ".pth", ".onnx")) for name in fetched)
        assert not any("original" in path or "inner" in path for path in asked)

    # The server is gone: the cache answers.
    for extra in ({"HF_HUB_OFFLINE": "1"}, {}):
        again = run_with_hub(url, tmp_path, LOAD.format(""), **extra)
        assert again.stdout == result.stdout, again.stderr


def test_a_tokenizer_comes_without_the_weights(tmp_path: Path) -> None:
    code = "from llama_np import load_tokenizer; print(load_tokenizer('owner/tales').encode('A'))"
    with hub_server() as (url, asked):
        result = run_with_hub(url, tmp_path, code)
        assert result.stdout.startswith("["), result.stderr
        assert not any(path.endswith(".safetensors") for path in asked)


def test_a_revision_can_be_pinned(tmp_path: Path) -> None:
    with hub_server() as (url, _):
        code = "from llama_np.checkpoint import locate; print(locate('owner/tales@v2').name)"
        result = run_with_hub(url, tmp_path, code)
        assert result.stdout.strip() == COMMITS["v2"], result.stderr


def test_every_class_looks_up_the_given_revision_and_subfolder(tmp_path: Path) -> None:
    code = f"""
from llama_np import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer
options = dict(revision="v2", subfolder="inner", cache_dir={str(tmp_path / "mine")!r}, token="t")
for cls in (LlamaConfig, LlamaTokenizer, LlamaForCausalLM, GenerationConfig):
    print(type(cls.from_pretrained("owner/tales", **options)).__name__)
"""
    with hub_server() as (url, asked):
        result = run_with_hub(url, tmp_path / "home", code)
        assert result.stdout.split()[:3] == ["LlamaConfig", "LlamaTokenizer", "LlamaForCausalLM"]
        resolved = [path for path in asked if "/resolve/" in path]
        assert all(f"/resolve/{COMMITS['v2']}/inner/" in path for path in resolved), resolved
        assert not any("deeper" in path for path in asked)
    assert (tmp_path / "mine").is_dir() and not (tmp_path / "home" / "hub").exists()


def test_the_command_line_takes_the_same_names(tmp_path: Path) -> None:
    code = "from llama_np.cli import main; raise SystemExit(main({}))"
    with hub_server() as (url, _):
        arguments = ["tokenize", "A king", "--model", "owner/tales", "--json"]
        result = run_with_hub(url, tmp_path, code.format(arguments))
        assert json.loads(result.stdout)["ids"], result.stderr
        arguments[3] = "owner/nothing"
        result = run_with_hub(url, tmp_path, code.format(arguments))
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and lines[-1].startswith("llama-np: error:"), result.stderr


def test_offline_without_a_cache_is_a_file_not_found_error(tmp_path: Path) -> None:
    code = (
        "from llama_np import load\n"
        "try: load('owner/tales')\n"
        "except FileNotFoundError as problem: print(type(problem).__name__)"
    )
    result = run_with_hub("http://127.0.0.1:9", tmp_path, code, HF_HUB_OFFLINE="1")
    assert "NotFound" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-3.2-1B", "owner/name@main", "a/b.c@refs/pr/3", "HuggingFaceTB/x_y"]
)
def test_names_of_the_hub_are_recognized(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    ["fairytales", "./a/b", "/a/b", "a/b/c", "../x", "a/..", "a/model.gguf", "a/b@", "a\\b/c"],
)
def test_paths_are_not_taken_for_names_of_the_hub(name: str) -> None:
    assert not is_hub_name(name)
    if name != "fairytales":
        with pytest.raises(FileNotFoundError):
            load(name)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"llama_np\[hub\]") as caught:
        load("owner/tales")
    assert caught.value.name == "huggingface_hub"


@POSIX
def test_a_folder_of_that_name_is_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "tales").symlink_to(locate("fairytales"))
    config, weights = load("owner/tales")
    assert weights["model.norm.weight"].dtype == np.float32
    assert config == load("fairytales")[0]


def test_no_pattern_fetches_a_pickle() -> None:
    assert not any(pattern.endswith(("bin", "pth", "pt", "pkl", "*")) for pattern in PATTERNS)
