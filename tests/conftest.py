"""Shared by the tests: tiny models of every family in directories as a user would have them, and a private cache."""

import gc
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests themselves run side by side
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import dschat  # noqa: F401  # before torch, see dschat/__init__.py

import pytest

ROOT = Path(__file__).parents[1]

gc.disable()  # until all is imported, as `dschat.errors.run_before_imports` has it

SENTENCES = [
    "the cat sat on the mat",
    "a dog ran in the park",
    "birds sing at dawn",
    "what is the colour of the sky",
    "tell me a short story please",
    "the answer is blue",
    "I do not know that",
    "once upon a time there was a king",
]


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> str:
    """Forty preference records with answers of different lengths; some dialogues have two turns."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(40):
            question, good, bad = (SENTENCES[(i * k + k) % len(SENTENCES)] for k in (1, 3, 5))
            prompt = f"\n\nHuman: {question} {i}?\n\nAssistant:"
            if i % 4 == 0:
                prompt = f"\n\nHuman: hello {i}\n\nAssistant: yes?{prompt}"
            chosen = f"{good} {i} " + "and so on " * (i % 3)
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": f"{bad} {i}"}) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def tokenizer():
    from dschat.data.tokenizer import train_tokenizer

    texts = [f"\n\nHuman: {s} {i}?" for i, s in enumerate(SENTENCES)] + [f"\n\nAssistant: {s}" for s in SENTENCES]
    return train_tokenizer(texts, 400)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory, tokenizer):
    """family -> directory of a tiny random causal model, made once when first asked for."""
    from tests.families import FAMILIES, save_tiny_model

    root = tmp_path_factory.mktemp("models")
    made: dict[str, str] = {}

    def directory(family: str) -> str:
        assert family in FAMILIES
        if family not in made:
            made[family] = str(root / family)
            save_tiny_model(family, tokenizer, made[family])
        return made[family]

    return directory


@pytest.fixture(scope="session")
def chat_server(model_dirs, tmp_path_factory):
    """`chat.py --web` in a process of its own, once for all who talk to it."""
    from tests.chat_server import run_server

    with run_server(model_dirs("llama"), tmp_path_factory.mktemp("chat")) as server:
        yield server
