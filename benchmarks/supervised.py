"""What sft.py, reward.py and dpo.py share: our program beside TRL's trainer, turn by turn, on the same token rows."""

import shlex
import tempfile
from pathlib import Path

from dschat.data.sources import load_examples
from dschat.data.tokenizer import train_tokenizer
from dschat.models.create import texts
from dschat.models.load import save_model

import torch
from harness import add_turn_flags, parser, phase_header, phase_row, ratios, report, start
from machine import Limits, measure_limits
from shapes import Shape, model_config, random_model
from turns import Facts
from versus import add_trl_flags, require_trl, take_turns
from workloads import program_flags

NOUN = {"sft": "dialogues/s", "reward": "pairs/s", "dpo": "pairs/s"}


def compare(stage: str, doc: str | None) -> None:
    """The whole benchmark of a stage: sft, reward or dpo."""
    made = parser(doc)
    add_turn_flags(made, repeats=10)
    add_trl_flags(made)
    made.add_argument("--data_path", required=True, help="as our programs take it; …/hh-rlhf/train.jsonl, say")
    made.add_argument("--batch", type=int, default=16, help="dialogues (reward, dpo: pairs) in an optimizer step")
    made.add_argument("--max_seq_len", type=int, default=512)
    made.add_argument("--learning_rate", type=float, default=1e-5)
    made.add_argument("--flags", default="", help='more flags of our program, as one text: --flags "--zero_stage 1"')
    made.add_argument(
        "--trl_bf16",
        default="weights",
        choices=("weights", "autocast"),
        help="how TRL computes in bf16: with weights in bf16, or under autocast over float32 ones, its default",
    )
    args = made.parse_args()
    device, dtype = start(args)
    if args.versus:
        require_trl()
    limits = measure_limits(device, dtype)
    args.stage = stage
    with torch.device("meta"):
        shape = Shape.of(random_model(model_config(args.size), dtype, args.seed, scorer=stage == "reward"))
    with tempfile.TemporaryDirectory(prefix=f"{stage}-") as name:
        folder = Path(name)
        make_model(args.data_path, args.size, args.seed, folder)
        given = {"model": folder / "model", "program_flags": program_flags(args, folder) + shlex.split(args.flags)}
        first, turns = take_turns(args, given, ["data", "rows", "optimizer_steps"])
    rows, rates = [], {}
    for name, facts in turns.items():
        reference = facts[0].get("reference_s_per_row", 0.0)
        seconds = [f["seconds"] + reference * f["rows"] for f in facts]
        rates[name] = [f["tokens"] / s for f, s in zip(facts, seconds, strict=True)]
        rows += rows_of(stage, name, facts, seconds, shape, limits)
        padding = 1 - sum(f["tokens"] for f in facts) / sum(f["positions"] for f in facts)
        start_s, peak = first[name][0]["seconds"], facts[-1]["peak_gb"]
        print(
            f"{name}: {facts[0]['dtype']}; first step after {start_s:.1f} s; {padding:.0%} padding; peak {peak:.2f} GB"
        )
    header = phase_header("tokens/s", NOUN[stage])
    report(args, limits, header, rows, first=first, turns=turns, ratios=ratios(rates))


def rows_of(
    stage: str, name: str, facts: list[Facts], seconds: list[float], shape: Shape, limits: Limits
) -> list[list[str]]:
    """The step with the median time for each token, and for DPO, which asks the reference once for each pair before
    training, that and both together. ``seconds`` are both."""
    middle = sorted(range(len(facts)), key=lambda i: seconds[i] / facts[i]["tokens"])[len(facts) // 2]
    step, whole = facts[middle], seconds[middle]
    train = shape.train(step["lengths"], step["projected"])
    phases = {"train": (step["seconds"], train)}
    if stage == "dpo":
        asked = shape.forward(step["lengths"], step["projected"])
        phases |= {"reference": (whole - step["seconds"], asked), "both": (whole, train + asked)}
    return [
        phase_row(name, phase, took, work, limits, [f"{step['tokens'] / took:.0f}", f"{step['rows'] / took:.1f}"])
        for phase, (took, work) in phases.items()
    ]


def make_model(data_path: str, size: str, seed: int, folder: Path) -> None:
    """``folder``/model: random weights in float32, and a tokenizer trained on the data, of the model's vocabulary at
    most."""
    config = model_config(size)
    given = {"cache_dir": str(folder / "cache"), "seed": seed, "skip_bad_records": True}
    examples, _ = load_examples([data_path], "train", "sft", **given)
    save_model(
        random_model(config, torch.float32, seed),
        train_tokenizer(texts(examples), config.vocab_size),
        str(folder / "model"),
    )
