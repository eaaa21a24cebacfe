"""One step of PPO with four random models: rollout, scoring, training; beside TRL's PPO trainer, turn by turn.

    python benchmarks/step3.py                                     4 layers x 256, 64 + 64 tokens, batch 16, bf16
    python benchmarks/step3.py --versus trl --lengths drawn --json step3.json         needs TRL: benchmarks/trl_side.py
    python benchmarks/step3.py --size 1.3b --critic_size 350m --batch 128 --prompt 256 --response 256      on a GPU

Both sides have the same four models, prompts of one length, temperature 1, epochs, minibatches, and the same data
type; the rounds that are compared have the same numbers of sequences, prompt tokens, optimizer steps and, at fixed
lengths, response tokens, or the run stops. What TRL saves by design it keeps: old log-probabilities from the sampler's
logits, weights in bf16 without a float32 copy. Lengths are fixed or drawn as in rollout.py.
"""

import argparse
import statistics

from dschat.errors import UserError, run_program
from dschat.rlhf.experience import FORWARD, SAMPLER
from dschat.rlhf.rollout_engine import SLOTS
from dschat.rlhf.specs import ROLLOUT_ENGINES

import torch
from harness import add_turn_flags, median, parser, phase_header, phase_row, ratios, report, start
from machine import Limits, measure_limits
from rollout import add_length_flags, mean_length
from shapes import SIZES, Shape, Work
from turns import Facts
from versus import add_trl_flags, require_trl, take_turns
from workloads import ppo_models

PHASES = ("rollout", "score", "train")
SAME = ("sequences", "prompt_tokens", "optimizer_steps", "weights")


def phase_work(shapes: dict[str, Shape], args: argparse.Namespace, lengths: list[int]) -> dict[str, Work]:
    """What one step needs. Scoring: reference, critic and reward once, for the sampler has the actor's side."""
    whole = [args.prompt + length for length in lengths]
    actor, critic = shapes["actor"], shapes["critic"]
    train = actor.train(whole, sum(lengths)) + critic.train(whole, sum(lengths))
    return {
        "rollout": actor.rollout([args.prompt] * len(lengths), lengths),
        "score": actor.forward(whole, sum(lengths))
        + critic.forward(whole, sum(lengths))
        + shapes["reward"].forward(whole, len(lengths)),
        "train": sum([train] * args.ppo_epochs, start=Work()),
    }


def rows_of(
    name: str, turns: list[Facts], shapes: dict[str, Shape], args: argparse.Namespace, limits: Limits
) -> list[list[str]]:
    """The phases of a side, each by its median, and the whole step; work is that of the step with median seconds."""
    middle = sorted(turns, key=lambda facts: facts["seconds"])[len(turns) // 2]
    work = phase_work(shapes, args, middle["lengths"])
    per_second = [statistics.median(f[n] / f["seconds"] for f in turns) for n in ("sequences", "response_tokens")]
    rows = [phase_row(name, p, median(turns, f"{p}_s"), work[p], limits, ["", ""]) for p in PHASES]
    rates = [f"{per_second[0]:.2f}", f"{per_second[1]:.0f}"]
    whole = sum(work.values(), start=Work())
    return [*rows, phase_row(name, "step", median(turns, "seconds"), whole, limits, rates)]


def main() -> None:
    made = parser(__doc__)
    add_turn_flags(made, repeats=8)
    add_length_flags(made)
    add_trl_flags(made)
    made.add_argument("--critic_size", choices=tuple(SIZES), help="of critic and reward model; default: --size")
    made.add_argument("--vocab_size", type=int, help="another vocabulary than the size's own")
    made.add_argument("--ppo_epochs", type=int, default=1)
    made.add_argument("--minibatches", type=int, default=1, help="optimizer steps in an epoch")
    made.add_argument("--micro_batch", type=int, help="rows of a forward and backward; default: a minibatch")
    made.add_argument("--max_tokens_per_batch", type=int, default=0, help="as in step 3; of our side")
    made.add_argument("--rollout_engine", choices=ROLLOUT_ENGINES, default=SLOTS, help="as in step 3; of our side")
    made.add_argument("--old_logprobs", choices=(FORWARD, SAMPLER), default=FORWARD, help="as in step 3; of our side")
    made.add_argument("--learning_rate", type=float, default=1e-6)
    args = made.parse_args()
    if args.batch % args.minibatches:
        raise UserError(f"--minibatches {args.minibatches} does not divide --batch {args.batch}")
    device, dtype = start(args)
    if args.versus:
        require_trl()
    limits = measure_limits(device, dtype)
    args.mean_length = mean_length(args)
    with torch.device("meta"):
        shapes = {role: Shape.of(model) for role, model in ppo_models(args, dtype).items()}
    same = [*SAME] + ["response_tokens"] * (args.lengths == "fixed")
    first, turns = take_turns(args, {"stage": "ppo", "trl_bf16": "weights"}, same)
    rows = [row for name, facts in turns.items() for row in rows_of(name, facts, shapes, args, limits)]
    for name, facts in first.items():
        passes = ", ".join(f"{role} {n} passes, {p} positions" for role, (n, p) in facts[0]["passes"].items())
        print(
            f"{name}: first step after {facts[0]['seconds']:.1f} s; {passes}; peak {turns[name][-1]['peak_gb']:.2f} GB"
        )
    rates = {name: [f["sequences"] / f["seconds"] for f in facts] for name, facts in turns.items()}
    header = phase_header("sequences/s", "tokens/s")
    report(args, limits, header, rows, first=first, turns=turns, ratios=ratios(rates))


if __name__ == "__main__":
    run_program(main)
