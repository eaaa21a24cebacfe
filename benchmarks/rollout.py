"""Sampling answers: our engine, our plain loop, Hugging Face's ``generate`` and transformers' continuous batching.

    python benchmarks/rollout.py                                   4 layers x 256, 64 + 64 tokens, batch 16, bf16
    python benchmarks/rollout.py --lengths drawn --json rollout.json
    python benchmarks/rollout.py --lengths drawn --batch 64 --at_once 16        more answers than are decoded at once
    python benchmarks/rollout.py --size 1.3b --batch 128 --prompt 256 --response 256           on a GPU

They take turns. All sides sample from the same model, on random prompts of one length, at temperature 1. Fixed
lengths: EOS is never drawn. Drawn lengths: EOS has one probability at every step, so that lengths are geometric with
a mean of a quarter of the limit, and cut off there. Both come from a bias in the model (`shapes.set_stops`), which
all sides pay alike. Ours returns the log-probabilities of its tokens too, which the others are not asked for.
"""

import argparse
import statistics
from collections.abc import Callable
from itertools import count

from dschat.errors import UserError, run_program
from dschat.models.attention import use_fast_attention
from dschat.rlhf.rollout import Sampling, banned_token_ids, generate_in_batches, row_uniforms
from dschat.rlhf.slots import SlotDecoder

import torch
from harness import add_turn_flags, parser, phase_header, phase_row, ratios, report, require_same, start
from machine import measure_limits
from shapes import EOS_ID, PAD_ID, Shape, model_config, random_model, random_prompts, set_stops, word_tokenizer
from transformers import GenerationConfig, PreTrainedModel
from turns import Facts, interleave, now, peak_gb

ENGINES = ("dschat", "plain", "generate", "continuous")
RATES = ("sequences", "response_tokens")


def add_length_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument("--batch", type=int, default=16, help="prompts, of which each gets an answer")
    made.add_argument("--prompt", type=int, default=64, help="tokens of every prompt")
    made.add_argument("--response", type=int, default=64, help="tokens of an answer, at most")
    made.add_argument("--lengths", default="fixed", choices=("fixed", "drawn"), help="drawn: a quarter in the mean")


def mean_length(args: argparse.Namespace) -> float | None:
    """Of drawn lengths, before they are cut off.

    Raises:
        UserError: a limit too short to draw below.
    """
    if args.lengths == "fixed":
        return None
    if args.response < 8:
        raise UserError(f"--response {args.response}: drawn lengths need a limit of at least 8")
    return args.response / 4


def engine(name: str, model: PreTrainedModel, args: argparse.Namespace) -> Callable[[], Facts]:
    """A side: one call samples answers to the prompts of one more round."""
    device, vocab_size = model.device, model.config.vocab_size
    rounds = count(args.seed)
    sampling = Sampling(args.response, banned_ids=banned_token_ids(word_tokenizer(vocab_size), vocab_size))
    options = GenerationConfig(
        do_sample=True, max_new_tokens=args.response, top_k=0, top_p=1.0, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    ends = {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    at_once = args.at_once or args.batch
    decoder = SlotDecoder()

    def ours(prompts: torch.Tensor, seed: int) -> list[int]:
        uniforms = row_uniforms(args.batch, args.response, seed)
        given = (model, prompts, torch.ones_like(prompts), sampling, uniforms)
        return decoder.generate(*given, batch_size=at_once, **ends).response_mask.sum(1).tolist()

    def plain(prompts: torch.Tensor, seed: int) -> list[int]:
        uniforms = row_uniforms(args.batch, args.response, seed)
        given = (model, prompts, torch.ones_like(prompts), sampling, uniforms)
        return generate_in_batches(*given, batch_size=at_once, **ends).response_mask.sum(1).tolist()

    def hugging_face(prompts: torch.Tensor, seed: int) -> list[int]:
        lengths: list[int] = []
        for some in prompts.split(at_once):
            whole = model.generate(some, attention_mask=torch.ones_like(some), generation_config=options)
            lengths += (whole[:, args.prompt :] != PAD_ID).sum(1).tolist()  # the model cannot draw the pad token
        return lengths

    def continuous(prompts: torch.Tensor, seed: int) -> list[int]:
        answers = model.generate_batch(prompts.tolist(), generation_config=options, warmup=device.type == "cuda")
        return [len(answer.generated_tokens) for answer in answers.values()]

    sample = {"dschat": ours, "plain": plain, "generate": hugging_face, "continuous": continuous}[name]

    def turn() -> Facts:
        seed = next(rounds)
        torch.manual_seed(seed)
        prompts = random_prompts(vocab_size, args.batch, args.prompt, seed).to(device)
        model.set_attn_implementation("sdpa")
        if name == "dschat":
            use_fast_attention(model)
        begin = now()
        lengths = sample(prompts, seed)
        seconds = now() - begin
        assert len(lengths) == args.batch, f"{name}: {len(lengths)} answers to {args.batch} prompts"
        return {"seconds": seconds, "lengths": lengths, "sequences": args.batch, "response_tokens": sum(lengths)}

    return turn


def main() -> None:
    made = parser(__doc__)
    add_turn_flags(made, repeats=10)
    add_length_flags(made)
    made.add_argument("--at_once", type=int, default=0, help="answers decoded at once, at most; 0: all of the batch")
    made.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES, help="the first is compared")
    args = made.parse_args()
    device, dtype = start(args)
    limits = measure_limits(device, dtype)
    with torch.device(device):
        model = random_model(model_config(args.size), dtype, args.seed).eval()
    set_stops(model, mean_length(args))
    shape = Shape.of(model)
    same = ["sequences"] + ["response_tokens"] * (args.lengths == "fixed")
    with torch.no_grad():
        sides = {name: engine(name, model, args) for name in args.engines}
        _, turns = interleave(sides, args.warmup, args.repeats, lambda facts: require_same(facts, same))
    rows, rates = [], {}
    for name, facts in turns.items():
        works = [shape.rollout([args.prompt] * args.batch, f["lengths"]) for f in facts]
        middle = sorted(range(len(facts)), key=lambda i: facts[i]["seconds"])[len(facts) // 2]
        rates[name] = [f["sequences"] / f["seconds"] for f in facts]
        per_second = [f"{statistics.median(f[n] / f['seconds'] for f in facts):.1f}" for n in RATES]
        rows.append(phase_row(name, "rollout", facts[middle]["seconds"], works[middle], limits, per_second))
    header = phase_header("sequences/s", "tokens/s")
    report(args, limits, header, rows, turns=turns, ratios=ratios(rates), peak_gb=peak_gb())


if __name__ == "__main__":
    run_program(main)
