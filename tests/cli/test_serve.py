"""examples/serve.py: a saved model folder answers over HTTP what generate() gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from transformers import pipeline

from reformer_lm import ReformerLMForCausalLM
from reformer_lm.text import load_tokenizer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
PROMPT = "清晨的车站"


def ask(port: int, body: dict[str, object]) -> str:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()


def test_a_served_model_writes_what_the_pipeline_writes(saved_model_dir: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "examples/serve.py", str(saved_model_dir), "--port", str(port), "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    body = {"model": str(saved_model_dir), "prompt": PROMPT, "max_tokens": 8, "temperature": 0.0}
    try:
        for _ in range(120):
            assert server.poll() is None, "the server has ended"
            try:
                answer = json.loads(ask(port, body))
                break
            except (ConnectionError, urllib.error.URLError):
                time.sleep(1)
        streamed = ask(port, {**body, "stream": True})
    finally:
        server.terminate()
        server.wait()
    model, tokenizer = ReformerLMForCausalLM.from_pretrained(saved_model_dir), load_tokenizer(saved_model_dir)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (expected,) = writer(PROMPT, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert answer["choices"][0]["text"] == expected["generated_text"]
    pieces = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    written = "".join(choice["text"] or "" for piece in pieces for choice in piece["choices"])
    assert len(pieces) > 1 and written == expected["generated_text"]
