"""A real `chat.py --web` with two tiny models and a reward model, for the tests that talk to it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dschat.data.tokenizer import load_tokenizer
from dschat.models.load import load_causal_lm, load_scorer, save_model
from tests.conftest import ROOT

import torch
from transformers import BloomConfig, BloomForCausalLM

SCRIPT = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
MAX_NEW_TOKENS = 24


@dataclass
class Server:
    url: str
    votes: Path
    models: list[str]  # names: one that says anything, one that says SCRIPT
    policy: str  # the directory of the first

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.votes.read_text().splitlines()] if self.votes.exists() else []


def save_script_model(tokenizer, directory: str) -> None:
    """It says SCRIPT for ever: its last layer norm puts out that token's embedding. (BLOOM: no slots for it.)"""
    tokenizer.add_tokens([SCRIPT])
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2))
    torch.nn.init.zeros_(model.transformer.ln_f.weight)
    said = model.transformer.word_embeddings.weight[len(tokenizer) - 1]
    model.transformer.ln_f.bias.data = 1e4 * said.detach()
    save_model(model, tokenizer, directory)


@contextmanager
def run_server(policy: str, root: Path) -> Iterator[Server]:
    """``policy``: a model's directory. ``root``: an empty one."""
    tokenizer = load_tokenizer(policy)
    save_model(load_causal_lm(policy, tokenizer, dtype=torch.float32), tokenizer, str(root / "policy"))
    save_model(load_scorer(policy, tokenizer, dtype=torch.float32), tokenizer, str(root / "reward"))
    save_script_model(load_tokenizer(policy), str(root / "script"))
    paths = [str(root / "policy"), str(root / "script")]
    flags = ["--web", "--port", "0", "--votes", str(root / "votes.jsonl"), "--max_new_tokens", str(MAX_NEW_TOKENS)]
    flags += ["--temperature", "1", "--reward", str(root / "reward")]
    command = [sys.executable, str(ROOT / "chat.py"), "--path", *paths, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("API:"):
                break
        assert said and said[-1].startswith("API:"), "".join(said)
        url = said[-1].split()[1].removesuffix("/v1")
        yield Server(url, root / "votes.jsonl", ["policy", "script"], paths[0])
        assert process.poll() is None, "the server died: " + process.stdout.read()
    finally:
        process.terminate()
        process.wait(20)
