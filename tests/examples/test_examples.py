"""The commands and outputs in docs/examples.md, and the client with a test server."""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from keye_kernels.small import SMALL

ROOT = Path(__file__).parents[2]
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
TRANSCRIPT = "\n".join(CONSOLE.findall((ROOT / "docs" / "examples.md").read_text(encoding="utf-8")))
# (command, expected output) for each "$ python examples/..." line and the lines after it
DOCUMENTED = re.findall(r"^\$ python (.*)\n((?:[^$\n].*\n)+)", TRANSCRIPT, re.MULTILINE)


def run_example(*arguments: str) -> str:
    """Runs a script as a user does, from the repository root, and returns its standard output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("command", "expected"), DOCUMENTED, ids=[command for command, _ in DOCUMENTED])
def test_example_prints_the_documented_output(command, expected):
    if "transformers" in command:
        pytest.importorskip("transformers")
    assert run_example(*shlex.split(command)) == expected


def test_every_example_is_documented():
    scripts = {file.name for file in (ROOT / "examples").glob("*.py")}
    printed = {Path(shlex.split(command)[0]).name for command, _ in DOCUMENTED}
    assert printed == scripts - {"serve_client.py", "gradio_app.py", "hub_layers.py"}
    for page in ("docs/examples.md", "examples/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [name for name in sorted(scripts) if name not in text] == [], page


@pytest.fixture
def openai_server():
    """An OpenAI-compatible server that records request bodies and answers with the type of the media part."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_json({"object": "list", "data": [{"id": "small", "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append((self.path, body))
            message = {"role": "assistant", "content": f"answer to {body['messages'][0]['content'][0]['type']}"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.send_json({"id": "1", "object": "chat.completion", "model": body["model"], "choices": [choice]})

        def send_json(self, value):
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
        server.shutdown()


def test_serve_client_sends_image_and_video_as_data_urls(openai_server):
    pytest.importorskip("openai", reason="needs the openai package: pip install openai")
    url, bodies = openai_server
    assert run_example("examples/serve_client.py", "--base-url", url) == "answer to image_url\nanswer to video_url\n"

    assert [path for path, _ in bodies] == ["/v1/chat/completions"] * 2
    assert [body["model"] for _, body in bodies] == ["small", "small"]
    expected = (
        ("image_url", "image/png", "image.png", "how many objects are there?"),
        ("video_url", "video/mp4", "clip.mp4", "which way does it move?"),
    )
    for (_, body), (kind, media_type, file, question) in zip(bodies, expected, strict=True):
        (turn,) = body["messages"]
        media, text = turn["content"]
        assert turn["role"] == "user" and text == {"type": "text", "text": question}
        assert media["type"] == kind
        head, encoded = media[kind]["url"].split(",")
        assert head == f"data:{media_type};base64"
        assert base64.b64decode(encoded) == (SMALL.parent / file).read_bytes()
