"""Models of the Hugging Face Hub: found in a cache, downloaded from a server made here, and refused with one message."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import mpirun
from huggingface_hub import constants

from mpilm.checkpoint.hub import fetch_model
from mpilm.checkpoint.pretrained import find_base_model, find_tokenizer_folder, locate_model, read_pretrained_config
from mpilm.config.schema import Config, ModelConfig, resolve_config
from mpilm.errors import FileError
from mpilm.model.hf.config import hf_config

SHAPE = resolve_config(Config(model=ModelConfig(n_layers=3, n_heads=2, d_model=24))).model
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": json.dumps(hf_config(SHAPE, 99, 7)), "model.safetensors": "weights", "tokenizer.json": "{}",
    "pytorch_model.bin": "a pickle", "README.md": "text", "onnx/config.json": "{}", "run.py": "code",
}  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def cached(cache):
    """A model in the cache, as the library of the Hub lays it out."""
    model = cache / "models--Qwen--Qwen3-0.6B"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (snapshot / name).write_text(FILES[name])
    return snapshot


@pytest.fixture
def server():
    """Start a server that answers as the Hub does; yield its address and the paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/api/models/o/m/"):
                tree = [{"type": "file", "path": name, "size": len(text), "oid": "0" * 40} for name, text in FILES.items()]
                info = {"id": "o/m", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
                return self.answer(json.dumps(tree if "/tree/" in self.path else info))
            return self.answer(FILES.get(self.path.partition(f"/resolve/{COMMIT}/")[2]))

        do_HEAD = do_GET  # noqa: N815

        def answer(self, text):
            self.send_response(404 if text is None else 200)
            for name, value in (("Content-Length", len(text or "")), ("ETag", f'"{hash(text)}"'), ("X-Repo-Commit", COMMIT)):
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write((text or "").encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{hub.server_port}", asked
        hub.shutdown()


def test_name_of_a_cached_model_stands_for_its_folder(cached):
    assert locate_model("Qwen/Qwen3-0.6B") == cached
    assert read_pretrained_config("Qwen/Qwen3-0.6B").n_layers == 3
    assert find_tokenizer_folder("Qwen/Qwen3-0.6B") == str(cached)


def test_folder_comes_before_a_model_of_the_same_name(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Qwen/Qwen3-0.6B").mkdir(parents=True)
    assert locate_model("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B")


def test_base_of_an_adapter_may_be_a_cached_model(cached, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}')
    assert find_base_model(tmp_path) == cached


def test_model_that_is_not_in_the_cache_is_refused_with_the_command_that_gets_it(cache):
    with pytest.raises(
        FileError, match=r"^--model.init-from o/m is not a folder, nor a model in .*: python -m mpilm.fetch o/m$"
    ):
        read_pretrained_config("o/m")
    with pytest.raises(FileError, match=r"^--model.init-from /o/m is not a folder$"):
        read_pretrained_config("/o/m")


def test_fetch_downloads_what_mpilm_reads_and_no_more(server, tmp_path):
    address, asked = server
    variables = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path), "NO_PROXY": "*"}
    done = mpirun(0, "-m", "mpilm.fetch", "o/m", **variables)
    assert done.returncode == 0, done.stderr
    snapshot = tmp_path / "models--o--m" / "snapshots" / COMMIT
    assert sorted(path.name for path in snapshot.rglob("*")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (snapshot / "config.json").read_text() == FILES["config.json"]
    assert f"o/m is in {snapshot}; write --model.init-from o/m" in done.stdout
    assert not [path for path in asked if path.endswith((".bin", ".py", ".md"))]


def test_fetch_without_a_network_is_one_message(tmp_path):
    variables = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path), "NO_PROXY": "*"}
    done = mpirun(0, "-m", "mpilm.fetch", "o/m", **variables)
    assert done.returncode == FileError.code
    assert done.stderr.count("mpilm: error: o/m cannot be downloaded: ") == 1
    assert "Traceback" not in done.stderr


def test_fetch_of_what_cannot_be_a_name_is_refused():
    with pytest.raises(FileError, match=r"^\.\./x cannot be downloaded: "):
        fetch_model("../x")
