"""The working process of our side; step3.py, sft.py, reward.py and dpo.py start it."""

from typing import Any

from dschat.engine.deepspeed_engine import TrainSpec, create_frozen_model, create_train_engine
from dschat.engine.distributed import init_runtime
from dschat.engine.micro_batches import MicroBatches
from dschat.models.attention import use_fast_attention
from dschat.models.load import resolve_dtype
from dschat.models.scorer import Scorer
from dschat.rlhf.collect import Collector, collect, judge, roll_out
from dschat.rlhf.experience import Shaping, add_advantages, experience_metrics
from dschat.rlhf.ppo_trainer import UpdateSpec, mean_of, train_rlhf
from dschat.rlhf.reward_sources import FullReward
from dschat.rlhf.rewards import CombinedReward
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import Sampling, banned_token_ids
from dschat.rlhf.rollout_engine import SLOTS
from dschat.rlhf.slots import SlotDecoder

from shapes import random_prompts, word_tokenizer
from turns import Passes, Turns, now
from workloads import add_facts, count_tokens, data_size, ppo_models, program, settings

# As TRL's defaults have it, where both have a setting.
SHAPING = Shaping("gae", 1, True, 1.0, 0.95, 0.0, "subtract", 0.0, False, True)


def ppo(args: Any, turns: Turns) -> None:
    """The loop of step 3, on models and prompts made here."""
    runtime = init_runtime(args.seed)
    dtype = resolve_dtype(args.dtype, runtime.device)
    models = {role: model.to(runtime.device) for role, model in ppo_models(args, dtype).items()}
    for model in models.values():
        use_fast_attention(model)
    passes = Passes(models)
    vocab_size = models["actor"].config.vocab_size
    tokenizer = word_tokenizer(vocab_size)
    spec = TrainSpec(args.learning_rate, 0.0, "constant", 0, 2**31, 1.0, 0)
    placed = {"dtype": dtype, "runtime": runtime}
    frozen = {"zero_stage": 0, "dtype": dtype, "device": runtime.device}
    engine = RLHFEngine(
        create_train_engine(models["actor"], spec, **placed),
        create_train_engine(Scorer(models["critic"]), spec, **placed),
        create_frozen_model(models["ref"], **frozen),
        models["actor"],
    )
    scorer = create_frozen_model(Scorer(models["reward"]), **frozen)
    micro_batch = args.micro_batch or args.batch // args.minibatches
    reward = FullReward(scorer, tokenizer, tokenizer, micro_batch_size=micro_batch, device=runtime.device)
    sampling = Sampling(args.response, banned_ids=banned_token_ids(tokenizer, vocab_size))
    rewards = CombinedReward([(reward, 1.0)])
    tokens = args.max_tokens_per_batch
    decoder = SlotDecoder() if args.rollout_engine == SLOTS else None
    memory = MicroBatches(runtime, engine.policy_models)  # what does not fit is found out once, not in every step
    rest = ("kl", 1, tokens, args.old_logprobs, decoder, memory)
    collector = Collector(engine, rewards, tokenizer, sampling, runtime, args.batch, micro_batch, *rest)
    size = args.batch // args.minibatches
    update = UpdateSpec(args.ppo_epochs, size, micro_batch, 0.2, 0.2, vf_coef=0.1, max_tokens=tokens)
    seed = args.seed
    while True:
        seed += 1
        steps_before = engine.actor.global_steps
        prompts = random_prompts(vocab_size, args.batch, args.prompt, seed).tolist()
        rows = [{"prompt_ids": ids, "messages": [{"role": "user", "content": ""}], "record": "{}"} for ids in prompts]
        times = [now()]
        rollout = roll_out(collector, rows, seed)
        times.append(now())
        samples, scores = judge(collector, rollout, rows)
        experience, _ = collect(collector, rollout, samples, scores)
        experience = add_advantages(experience, SHAPING, 0.05)
        times.append(now())
        updates = train_rlhf(engine, experience, sampling, update, seed, runtime, memory=memory)
        times.append(now())
        experience_metrics(experience, 0.0), mean_of(updates)
        lengths = rollout.response_mask.sum(1).tolist()
        turns.end(
            sequences=len(lengths),
            prompt_tokens=int(rollout.attention_mask.sum()),
            lengths=lengths,
            response_tokens=sum(lengths),
            optimizer_steps=engine.actor.global_steps - steps_before,
            weights={role: sum(p.numel() for p in model.parameters()) for role, model in models.items()},
            dtype=str(models["actor"].dtype),
            passes=passes.take(),
            rollout_s=times[1] - times[0],
            score_s=times[2] - times[1],
            train_s=times[3] - times[2],
        )
        turns.begin()


def supervised(args: Any, turns: Turns) -> None:
    """The program of steps 1 or 2 as it is, stopped after every optimizer step."""
    module: Any = program(args.stage)
    load_rows, train_step, known = module.load_rows, module.train_step, {}

    def loaded(*given: Any) -> Any:
        rows = load_rows(*given)
        known["data"] = data_size(rows)
        return rows

    def stepped(*given: Any) -> Any:
        result = train_step(*given)
        batches = next(value for value in given if isinstance(value, list))
        parts = [
            count_tokens(args.stage, b["attention_mask"], b["response_mask" if args.stage == "dpo" else "loss_mask"])
            for b in batches
        ]
        engine = given[0]
        turns.end(
            **add_facts(parts),
            **known,
            optimizer_steps=engine.global_steps,
            dtype=str(next(engine.parameters()).dtype),
        )
        turns.begin()
        return result

    module.load_rows, module.train_step = loaded, stepped
    if args.stage == "dpo":
        reference_logprobs = module.reference_logprobs

        def asked(model: Any, family: Any, weights: str, rows: Any, *given: Any) -> Any:
            begin = now()
            result = reference_logprobs(model, family, weights, rows, *given)
            known.setdefault("reference_s_per_row", (now() - begin) / len(rows.rows))  # the training rows come first
            return result

        module.reference_logprobs = asked
    module.main(args.program_flags)


if __name__ == "__main__":
    taken = Turns()
    taken.begin()
    given = settings()
    (ppo if given.stage == "ppo" else supervised)(given, taken)
