"""Captions by an OpenAI-compatible server, here a small one of the standard library."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from helpers.clips import picture, read_number, write_clip

Image = pytest.importorskip("PIL.Image")

from vxl_train.cli import main
from vxl_train.vico.server_captioner import ServerCaptioner


class Server(HTTPServer):
    """Says the number that the first picture shows. `statuses` come before the answers."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses, self.requests, self.reply = [], [], None
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        reply = self.server.reply
        if reply is None:
            url = body["messages"][0]["content"][0]["image_url"]["url"]
            shown = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
            text = f" number {read_number(np.asarray(shown))} "
            reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def pictures():
    return [Image.fromarray(picture(n)) for n in (37, 38)]


def test_a_caption(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    captioner = ServerCaptioner(f"{server.url}/#eye", prompt="What is it?", max_new_tokens=7)
    assert captioner.caption(pictures()) == "number 37"
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("eye", 7, 0)
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["image_url", "image_url", "text"]


def test_a_server_that_is_full_is_asked_again(server):
    server.statuses = [429, 503]
    captioner = ServerCaptioner(f"{server.url}#eye")
    assert captioner.caption(pictures()) == "number 37"
    assert len(server.requests) == 3


@pytest.mark.parametrize("reply", [b"words", b"{}", b"[]", b'{"choices": []}'])
def test_an_answer_of_another_form(server, reply):
    server.reply = reply
    with pytest.raises(OSError, match="captioner"):
        ServerCaptioner(f"{server.url}#eye").caption(pictures())


def test_a_refusal_and_a_server_that_is_away(server):
    server.statuses, captioner = [400], ServerCaptioner(f"{server.url}#eye")
    with pytest.raises(OSError, match="status 400"):
        captioner.caption(pictures())
    away = ServerCaptioner("http://127.0.0.1:9/v1#eye")
    away.patience = 0.1
    with pytest.raises(OSError, match="refused"):
        away.caption(pictures())


@pytest.mark.parametrize("name", ["http://host/v1", "#model", "host/v1#model", "http://h/v1#"])
def test_another_form_of_name(name):
    with pytest.raises(ValueError, match="captioner"):
        ServerCaptioner(name)


def test_identity_follows_what_captions_depend_on():
    one = ServerCaptioner("http://h/v1#m")
    others = [
        ServerCaptioner("http://h/v1#n"),
        ServerCaptioner("http://i/v1#m"),
        ServerCaptioner("http://h/v1#m", prompt="Else?"),
        ServerCaptioner("http://h/v1#m", max_new_tokens=3),
    ]
    assert ServerCaptioner("http://h/v1/#m").identity == one.identity
    assert len({x.identity for x in (one, *others)}) == 5


def test_the_command(server, tmp_path, capsys):
    write_clip(tmp_path / "a.mp4", count=120, fps=2, gop=8)
    given = ["--videos", tmp_path / "a.mp4", "--captioner", f"{server.url}#eye", "--pictures", 1]
    assert main(["vico", *map(str, given), "--output", str(tmp_path / "out.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["captioned"] == 4
    sample = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert sample["vico"]["captioner"] == "eye"
