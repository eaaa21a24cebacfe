"""A rollout of an actor whose weights are sharded (ZeRO 3) beside one whose weights each rank has (ZeRO 0).

    torchrun --nproc_per_node 2 benchmarks/zero3_rollout.py           4 layers x 256, 16 x (64 + 64) tokens a rank
    torchrun --nproc_per_node 2 benchmarks/zero3_rollout.py --size 125m --batch 8

Both sides answer in turns, in the same processes, through `dschat.rlhf.collect.roll_out`, as step 3 does. At ZeRO 3 a
turn includes gathering the weights, which is done once for all of its tokens.
"""

import argparse
import json
import statistics

from dschat.engine.deepspeed_engine import TrainSpec, create_train_engine, whole_model
from dschat.engine.distributed import all_reduce_max, barrier, init_runtime
from dschat.errors import run_program
from dschat.models.attention import use_fast_attention
from dschat.rlhf.collect import Collector, roll_out
from dschat.rlhf.rewards import CombinedReward
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import Sampling, banned_token_ids
from dschat.rlhf.slots import SlotDecoder

import torch
from shapes import EOS_ID, SIZES, model_config, random_model, random_prompts, word_tokenizer
from turns import now


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", default="tiny", choices=tuple(SIZES))
    made.add_argument("--batch", type=int, default=16, help="prompts of a rank")
    made.add_argument("--prompt", type=int, default=64, help="tokens of every prompt")
    made.add_argument("--response", type=int, default=64, help="tokens of every answer")
    made.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    made.add_argument("--repeats", type=int, default=5)
    args, _ = made.parse_known_args()  # launchers add --local_rank
    runtime = init_runtime(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]

    def side(stage: int) -> Collector:
        model = random_model(model_config(args.size), dtype, 0).eval()
        use_fast_attention(model)
        spec = TrainSpec(1e-5, 0.0, "constant", 0, 10, 0.0, stage)
        actor = create_train_engine(model, spec, dtype=dtype, runtime=runtime)
        engine = RLHFEngine(actor, None, actor.module, model)
        tokenizer = word_tokenizer(model.config.vocab_size)
        sampling = Sampling(args.response, banned_ids=(*banned_token_ids(tokenizer, len(tokenizer)), EOS_ID))
        return Collector(
            engine, CombinedReward([]), tokenizer, sampling, runtime, args.batch, args.batch, decoder=SlotDecoder()
        )

    def turn(collector: Collector, seed: int) -> float:
        """Seconds, those of the slowest rank."""
        num_rows = args.batch * runtime.world_size
        prompts = random_prompts(collector.engine.family.config.vocab_size, num_rows, args.prompt, seed)
        rows = [{"prompt_ids": ids.tolist()} for ids in prompts[runtime.rank :: runtime.world_size]]
        barrier(runtime)
        begin = now()
        rollout = roll_out(collector, rows, seed)
        seconds = now() - begin
        assert int(rollout.response_mask.sum()) == args.batch * args.response
        return all_reduce_max(seconds, runtime)

    sides = {stage: side(stage) for stage in (0, 3)}
    taken: dict[int, list[float]] = {stage: [] for stage in sides}
    for seed in range(args.repeats + 1):
        for stage, collector in sides.items():
            taken[stage].append(turn(collector, seed))
    gathering = []
    for _ in range(args.repeats):
        barrier(runtime)
        begin = now()
        with whole_model(sides[3].engine.actor, runtime.device):
            gathering.append(now() - begin)
    if not runtime.is_main:
        return
    tokens = args.batch * args.response * runtime.world_size
    rates = {stage: tokens / statistics.median(seconds[1:]) for stage, seconds in taken.items()}  # the first records
    line = {f"tokens/s at ZeRO {stage}": round(rate, 1) for stage, rate in rates.items()}
    line |= {"ratio": round(rates[3] / rates[0], 3), "seconds to gather": round(statistics.median(gathering), 3)}
    print(json.dumps(line | vars(args) | {"ranks": runtime.world_size}))


if __name__ == "__main__":
    run_program(main)
