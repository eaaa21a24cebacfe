"""The last answers to some held-out prompts token by token, for the report's browser of answers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dschat.engine.distributed import gather_objects
from dschat.report.metrics import write_whole
from dschat.rlhf.collect import Collector, ask_models, judge, roll_out
from dschat.rlhf.evaluate import EVAL_SEED, HeldOut
from dschat.rlhf.experience import add_advantages
from dschat.rlhf.rollout import tokens_of
from dschat.rlhf.samples import decode_responses, prompt_text
from dschat.rlhf.specs import GAE, Shaping

NUM_PROMPTS = 60
TOKENS_FILE = "tokens.jsonl"


def write_token_details(
    collector: Collector, held_out: HeldOut, shaping: Shaping, kl_coef: float, step: int, output_dir: str
) -> None:
    """``tokens.jsonl``: for the first prompts the answers of the evaluation at ``step`` (they are drawn again with its
    random numbers), with each token's text, KL (nats; policy against reference) and, with a critic, its value and its
    advantage before whitening. A collective."""
    runtime, tokenizer = collector.runtime, collector.tokenizer
    collector = dataclasses.replace(collector, num_samples=1, kl_kind="kl")
    mine = held_out.rows[: -(-NUM_PROMPTS // runtime.world_size)]
    rollout = roll_out(collector, mine, EVAL_SEED)
    _, scores = judge(collector, rollout, mine)
    everyone = ask_models(collector, rollout, scores, rollout.response_mask)
    names = {"kl": "kl"}
    if shaping.estimator == GAE:
        everyone = add_advantages(everyone, dataclasses.replace(shaping, whiten_advantages=False), kl_coef)
        names |= {"value": "values", "advantage": "advantages"}
    prompts = gather_objects([prompt_text(row["messages"]) for row in mine], runtime)
    if not runtime.is_main:
        return
    columns = {name: getattr(everyone, attribute).tolist() for name, attribute in names.items()}
    lines = []
    rows = tokens_of(everyone.response_ids, everyone.response_mask)
    texts = decode_responses(tokenizer, rows)
    for i, ids in enumerate(rows[: held_out.num_prompts]):
        line: dict[str, Any] = {"kind": "policy", "step": step, "prompt": prompts[i]}
        line |= {"response": texts[i], "tokens": [tokenizer.decode([token]) for token in ids]}
        line |= {name: [round(x, 4) for x in column[i][: len(ids)]] for name, column in columns.items()}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_whole(Path(output_dir) / TOKENS_FILE, "".join(lines))
