"""`train --push_to_hub`, against a stand-in that speaks the hub's protocol on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub.constants as constants
import pytest
from huggingface_hub import ModelCard

from aslora_meft.cli import main
from aslora_meft.errors import UsageError
from aslora_meft.training.hub import prepare_push


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: name -> path -> bytes."""

    def do_GET(self):
        name = "me" if self.headers.get("authorization") == "Bearer right" else None
        self.answer(200 if name else 401, {"name": name, "type": "user", "orgs": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("authorization") != "Bearer right":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.server.private[name] = asked.get("private") or asked.get("visibility") == "private"
            self.answer(200, {"url": f"{self.server.address}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            base = ModelCard(json.loads(body)["content"]).data.base_model
            errors = [{"message": f'"base_model" {base} is not a valid id'}] if str(base).startswith("/") else []
            self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.answer(200, {"files": [{**f, "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.repositories[name][entry["value"]["path"]] = content
            address = f"{self.server.address}/{name}/commit/{'0' * 40}"
            self.answer(200, {"commitUrl": address, "commitOid": "0" * 40, "pullRequestUrl": None, "success": True})
        else:
            self.answer(404, {"error": f"no {self.path}"})

    def answer(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.private = {}, {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def words(model_dir, text_file, out, *more):
    fixed = ["train", "--model", model_dir, "--data", text_file, "--output_dir", out, "--r", 2, "--max_steps", 2]
    fixed += ["--max_length", 16, "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
    return [str(word) for word in (*fixed, "--save_steps", 1, "--push_to_hub", "true", *more)]


def test_a_run_pushes_the_adapter_and_its_card(hub, model_dir, text_file, tmp_path, capsys):
    out = tmp_path / "my-adapter"
    assert main(words(model_dir, text_file, out, "--hub_token", "right", "--hub_private_repo", "true")) == 0
    assert f"Pushed to: {hub.address}/me/my-adapter" in capsys.readouterr().out
    (name,) = hub.repositories
    assert name == "me/my-adapter"
    assert hub.private[name] is True
    pushed = hub.repositories[name]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= set(pushed)
    assert (out / "checkpoint-2").is_dir()
    assert not any(path.startswith(("checkpoint", "training_args")) for path in pushed)
    assert all((out / path).read_bytes() == content for path, content in pushed.items())
    assert b"## Results on held-out data" in pushed["README.md"]


def test_a_refusal_comes_before_the_run(hub, model_dir, text_file, tmp_path, capsys):
    assert main(words(model_dir, text_file, tmp_path / "out", "--hub_token", "wrong")) == 2
    assert "push_to_hub: the repository 'out' cannot be made: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_flag_nothing_is_asked(hub):
    assert prepare_push(SimpleNamespace(push_to_hub=False, hub_model_id=None)) is None
    with pytest.raises(UsageError, match="hub_model_id='a/b' is only used by --push_to_hub"):
        prepare_push(SimpleNamespace(push_to_hub=False, hub_model_id="a/b"))
    assert not hub.repositories


def test_offline_is_one_sentence(model_dir, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(words(model_dir, text_file, tmp_path / "out")) == 2
    assert "push_to_hub: the repository 'out' cannot be made" in capsys.readouterr().err
