"""One round of the loop on the embedded task: answers through the API, votes through the API, and the ways from the
votes to a better policy.

    python e2e_rlhf.py
    python benchmarks/voting_loop.py            the table of docs/closing-the-loop.md; fifteen minutes of two cores

The task's judge plays the people: it is asked which of two answers of the SFT model is better, and nothing else.
Policies are compared on the 300 held-out questions, one answer each, drawn with the same random numbers at temperature
1. "No votes" is e2e_rlhf.py's own policy, from the reward model as it was. What is there already is not run again.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from random import Random

from dschat.data.toy import judge, questions
from dschat.report.progress import table

import httpx2
from openai import OpenAI
from programs import ROOT
from toy_runs import run

DPO = "step2_dpo_finetuning/main.py"
REWARD = "step2_reward_model_finetuning/main.py"
PPO = "step3_rlhf_finetuning/training_scripts/toy/cpu/run_toy.sh"
SIZES = "--per_device_train_batch_size 16 --max_seq_len 128 --data_split 0,1,0 "  # all votes for this step
DPO_FLAGS = SIZES + "--learning_rate 4e-4 --num_train_epochs 6 --num_warmup_steps 5"
NEW_REWARD_FLAGS = SIZES + "--learning_rate 1e-3 --num_train_epochs 12 --num_warmup_steps 10 --eval_fraction 0.3"
OLD_REWARD_FLAGS = SIZES + "--learning_rate 3e-4 --num_train_epochs 2 --num_warmup_steps 10"
PPO_FLAGS = "--best_of_n 0 --eval_interval 45"
ASKED_AT_ONCE = 8


def collect_votes(policy: str, path: Path, num_votes: int, seed: int) -> dict[str, int]:
    """Have the judge vote on two answers of the policy to training questions, until so many votes are stored."""
    command = [sys.executable, str(ROOT / "chat.py"), "--path", policy, "--serve", "--port", "0", "--votes", str(path)]
    server = subprocess.Popen([*command, "--temperature", "1", "--seed", str(seed)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = next(line.split()[1] for line in server.stdout if line.startswith("API:"))
        client = OpenAI(base_url=url, api_key="none")
        (model,) = (found.id for found in client.models.list())
        asked = [question for _, question in questions("train")]
        Random(seed).shuffle(asked)

        def vote(question: str) -> str:
            messages = [{"role": "user", "content": question}]
            choices = client.chat.completions.create(model=model, messages=messages, n=2).choices
            first, second = (choice.message.content for choice in choices)
            if first == second or not (first and second):
                return "the same answer twice"
            a, b = judge(question, first).score, judge(question, second).score
            said = "tie" if a == b else "first" if a > b else "second"
            answers = {"first": {"model": model, "content": first}, "second": {"model": model, "content": second}}
            given = {"messages": messages, "vote": said, "sampling": {"temperature": 1.0}, **answers}
            httpx2.post(f"{url}/votes", json=given).raise_for_status()
            return "tie" if said == "tie" else "better"

        counts = {"better": 0, "tie": 0, "the same answer twice": 0}
        waiting = cycle(asked)
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            while (missing := num_votes - counts["better"] - counts["tie"]) > 0:
                for kind in pool.map(vote, [next(waiting) for _ in range(min(missing, ASKED_AT_ONCE))]):
                    counts[kind] += 1
        return counts
    finally:
        server.terminate()
        server.wait()


def train(program: str, models: list[str], data: list[str], flags: str, target: Path) -> None:
    if not (target / "run.json").is_file():
        command = [sys.executable if program.endswith(".py") else "bash", str(ROOT / "training" / program), *models]
        command += ["--data_path", *data]
        run([*command, "--output_dir", str(target), *flags.split()], target.with_suffix(".log"), 2)


def compare(policies: dict[str, str], output: Path) -> list[list[str]]:
    """A table row for each policy; the first is what the others are compared with."""
    command = [sys.executable, str(ROOT / "training/step1_supervised_finetuning/prompt_eval.py")]
    command += ["--model_name_or_path", *policies.values(), "--decoding", "sample", "--data_path", "toy"]
    command += ["--num_prompts", "0", "--num_shown", "0", "--judge", "toy", "--max_new_tokens", "40"]
    run([*command, "--batch_size", "100", "--output_dir", str(output)], output.with_suffix(".log"), 2)
    rows = []
    for name, found in zip(policies, json.loads((output / "summary.json").read_text())["answers"], strict=True):
        won = found.get("win_rate")
        share = f"{won['value']:.3f} ({won['ci95'][0]:.3f} to {won['ci95'][1]:.3f})" if won else ""
        rows.append([name, share, f"{found['judge']:.2f}", f"{found['correct']:.0%}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("output"), help="the --output-dir of e2e_rlhf.py")
    parser.add_argument("--num-votes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1, help="of the questions and the answers that are voted on")
    parser.add_argument("--output-dir", type=Path, default=Path("output/voting-loop"))
    args = parser.parse_args()
    output = args.output_dir
    output.mkdir(parents=True, exist_ok=True)
    votes, before = output / "votes.jsonl", str(args.models / "actor-models/toy")
    if not votes.exists():
        counts = collect_votes(before, votes, args.num_votes, args.seed)
        print(", ".join(f"{kind}: {count}" for kind, count in counts.items()), flush=True)
    start, old = ["--model_name_or_path", before], ["--model_name_or_path", str(args.models / "reward-models/toy")]
    train(DPO, start, [str(votes)], DPO_FLAGS, output / "dpo")
    train(REWARD, start, [str(votes)], NEW_REWARD_FLAGS, output / "reward")
    train(REWARD, old, [f"{votes}:3", "toy:0.2"], OLD_REWARD_FLAGS, output / "reward-older")
    policies = {"before": before, "DPO on the votes": str(output / "dpo")}
    for name, reward in (("of the votes alone", "reward"), ("older, and then the votes", "reward-older")):
        models = ["--actor_model_name_or_path", before, "--critic_model_name_or_path", str(output / reward)]
        target = output / reward.replace("reward", "ppo")
        train(PPO, models, ["toy"], PPO_FLAGS, target)
        policies[f"PPO, reward model {name}"] = str(target / "actor")
    policies["PPO, reward model older, no votes"] = str(args.models / "step3-models/toy/actor")
    rows = compare(policies, output / "answers")
    print(table(["policy", "better than before (95 %)", "judge", "correct"], rows))


if __name__ == "__main__":
    main()
