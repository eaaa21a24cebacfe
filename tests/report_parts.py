"""A run on the disk as the stages leave it, made of numbers, for the tests of the report."""

import json
from pathlib import Path
from random import Random

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & <b>bold</b>"


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluation(step: int, progress: float) -> dict:
    return {
        "step": step,
        "stage": "ppo",
        "time": float(step),
        "eval/score_mean": -0.2 + progress,
        "eval/judge_mean": 0.7 + 0.8 * progress,
        "eval/kl_per_seq": 3 * progress,
        "eval/response_length": 13 - 3 * progress,
        "eval/finished_fraction": 1.0,
        "eval/distinct_2": 0.2,
        "eval/repetition": 0.01,
        "eval/score_std": 0.8,
    }


def write_run(root: Path, *, num_steps: int = 20, num_prompts: int = 12, gain: float = 1.0) -> Path:
    """SFT, reward model and PPO below ``root``; the first answer of PPO is `EVIL`."""
    rng = Random(0)
    config = {"data_path": ["toy"], "model_name_or_path": "toy", "seed": 1}
    sft, ppo = root / "actor-models/toy", root / "step3-models/toy"
    losses = [{"step": s, "stage": "sft", "time": s, "loss": 2 / (1 + s)} for s in range(1, num_steps + 1)]
    write_lines(sft / "metrics.jsonl", [*losses, {"step": num_steps, "stage": "sft", "eval/perplexity": 1.5}])
    lines = [evaluation(0, 0.0)]
    for step in range(1, num_steps + 1):
        line = {"step": step, "stage": "ppo", "time": step, "objective/score_mean": step / num_steps + rng.random()}
        line |= {
            "objective/kl_per_seq": step / num_steps,
            "objective/entropy_per_token": 0.4,
            "policy/approx_kl": 0.01,
        }
        lines.append(line | {"policy/clip_fraction": 0.05, "critic/explained_variance": 0.5, "lr": 1e-5})
        if step % (num_steps // 4) == 0:
            lines.append(evaluation(step, gain * step / num_steps))
    write_lines(ppo / "metrics.jsonl", lines)
    rows = []
    for step, kind, add in ((0, "policy", 0.0), (0, "best_of_4", 0.6), (num_steps, "policy", gain)):
        for i in range(num_prompts):
            response = EVIL if step and i == 0 else f"answer {i} of {kind} at {step}, " + "word " * 60
            row = {"step": step, "kind": kind, "prompt": f"question {i} <i>?", "response": response}
            row |= {"score": round(add + rng.gauss(0, 0.5), 3), "judge": round(add + rng.gauss(0, 0.5), 3), "kl": add}
            rows.append(row | {"length": 10 + i % 5, "finished": i % 7 != 0})
    write_lines(ppo / "samples.jsonl", rows)
    tokens = ["</script>", "two", " three"]
    kept = {"kind": "policy", "step": num_steps, "prompt": "question 1 <i>?", "tokens": tokens}
    kept["response"] = rows[-num_prompts + 1]["response"]
    write_lines(ppo / "tokens.jsonl", [kept | {"kl": [0.5, -0.25, 0.0], "value": [1.0, 0.5, 0.1]}])
    for folder, seconds in ((sft, 88.0), (ppo, 7300.0)):
        record = {"role": "policy", "config": config, "seed": 1, "versions": {"torch": "2"}, "data": {"train": 3600}}
        (folder / "run.json").write_text(json.dumps(record | {"seconds": seconds, "metrics": {}, "peak_rss_gb": 1.0}))
    return root
