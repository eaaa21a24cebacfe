"""The data of the DPO program as rows, and an engine that only keeps gradients."""

import json
from pathlib import Path

from dschat.data.prepare import DataSpec, load_rows
from dschat.engine.distributed import init_runtime
from dschat.rlhf.answer_rows import AnswerRows

import torch

MAX_LEN = 64


def lines(directory: Path | str) -> list[dict]:
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def answer_rows(data: str, cache_dir: str, tokenizer, is_paired: bool, batch_size: int = 8) -> AnswerRows:
    spec = DataSpec((data,), (), "0,1,0", 0.2, 7, str(cache_dir), False, 1, 0)
    rows = load_rows(spec, "preference" if is_paired else "feedback", tokenizer, MAX_LEN).train
    shape = {"pad_token_id": tokenizer.pad_token_id, "max_len": MAX_LEN, "seed": 7, "batch_size": batch_size}
    return AnswerRows(rows, is_paired, **shape, runtime=init_runtime(0))


class PlainEngine:
    """What `train_step` needs of a DeepSpeed engine; `step` keeps the gradients where they are."""

    world_size = 1

    def __init__(self, model):
        self.model = model

    def __call__(self, **inputs):
        return self.model(**inputs)

    def train(self):
        self.model.train()

    def eval(self):
        self.model.eval()

    def backward(self, loss, scale_wrt_gas):
        assert scale_wrt_gas is False
        loss.backward()

    def step(self):
        pass

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return found
