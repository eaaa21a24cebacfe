"""Step 3: PPO. The policy learns to answer so that the reward model scores it higher, without leaving its reference.

    python training/step3_rlhf_finetuning/main.py --actor_model_name_or_path output/sft \\
        --critic_model_name_or_path output/reward --data_path toy --output_dir output/ppo

Several ranks: the same after `deepspeed` or `torchrun`. Each rollout: sample answers, score them, turn scores and the
KL penalty into rewards, estimate advantages (GAE), then ppo_epochs passes of clipped updates over fresh minibatches.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from dschat.config import flag, parse_config, require_not_negative, require_positive, to_dict
from dschat.data.loader import collate_prompts, prompt_stream
from dschat.data.prepare import load_rows
from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import TrainSpec, learning_rate, save_weights, whole_model
from dschat.engine.distributed import Runtime, init_runtime, main_process_first
from dschat.errors import UserError, run_program
from dschat.flags import REMOVED, SCHEDULES, ZERO_STAGES, DataFlags, RunFlags
from dschat.models.load import CRITIC, POLICY, check_context, resolve_dtype, save_model
from dschat.models.scorer import save_score_stats
from dschat.report.metrics import MetricsWriter, prepare_output_dir, write_run_json
from dschat.report.progress import Console
from dschat.report.samples import SampleWriter
from dschat.rlhf.evaluate import best_of_n, evaluate_policy, held_out_prompts
from dschat.rlhf.experience import Shaping, add_advantages, experience_metrics, gather_experience, score_rollout
from dschat.rlhf.ppo_trainer import (
    UpdateSpec,
    check_experience,
    check_first_update,
    check_reward_padding,
    train_rlhf,
)
from dschat.rlhf.rlhf_engine import RLHFEngine, create_rlhf_engine
from dschat.rlhf.rollout import Rollout, Sampling, banned_token_ids, generate, row_uniforms

import torch
from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class Config(RunFlags, DataFlags):
    actor_model_name_or_path: str = flag(help="the policy to train: the output of step 1")
    critic_model_name_or_path: str = flag(help="the reward model, which the critic starts from: the output of step 2")
    max_eval_samples: int = flag(512, "evaluate on the first so many held-out prompts; 0: all")

    per_device_generation_batch_size: int = flag(16, "prompts per rank sampled at once")
    generation_batches: int = flag(1, "generation batches per rollout")
    max_prompt_seq_len: int = flag(256, "tokens of a prompt; longer ones lose their earliest turns")
    max_answer_seq_len: int = flag(256, "tokens of an answer")
    temperature: float = flag(1.0, "of sampling, and of every log-probability")
    top_k: int = flag(0, "must stay 0: the scored distribution would not be the sampled one")
    top_p: float = flag(1.0, "must stay 1: the scored distribution would not be the sampled one")

    per_device_training_batch_size: int = flag(16, "rows per rank and micro-batch of training and scoring")
    gradient_accumulation_steps: int = flag(1, "micro-batches per minibatch, that is per optimizer step")
    ppo_epochs: int = flag(1, "passes over a rollout")
    kl_coef: float = flag(0.05, "weight of the KL penalty in the reward of each token")
    gamma: float = flag(1.0, "discount of GAE")
    lam: float = flag(0.95, "lambda of GAE")
    cliprange: float = flag(0.2, "the policy ratio is clipped to 1 ± this")
    cliprange_value: float = flag(0.2, "values are clipped to the old ones ± this")
    whiten_advantages: bool = flag(True, "advantages to mean 0 and std 1 over the whole rollout")
    normalize_reward: bool = flag(True, "scores to mean 0 and std 1 by the statistics of step 2")
    clip_reward_value: float = flag(5.0, "scores are clipped to ± this after normalisation; 0: never")
    missing_eos_penalty: float = flag(1.0, "taken from the score of an answer cut off at max_answer_seq_len")

    actor_learning_rate: float = flag(9.65e-6, "peak")
    critic_learning_rate: float = flag(5e-6, "peak")
    actor_weight_decay: float = flag(0.0, "of matrices")
    critic_weight_decay: float = flag(0.0, "of matrices")
    lr_scheduler_type: str = flag("cosine", "of both learning rates", choices=SCHEDULES)
    num_warmup_steps: int = flag(0, "optimizer steps of linear warm-up")
    actor_gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    critic_gradient_checkpointing: bool = flag(False, "the same for the critic")
    actor_zero_stage: int = flag(0, "DeepSpeed ZeRO stage of the actor", choices=ZERO_STAGES)
    critic_zero_stage: int = flag(0, "of the critic", choices=ZERO_STAGES)
    reference_zero_stage: int | None = flag(
        None, "of the reference; default: 3 with the actor's 3, else 0", choices=ZERO_STAGES
    )
    reward_zero_stage: int | None = flag(
        None, "of the reward; default: 3 with the critic's 3, else 0", choices=ZERO_STAGES
    )

    self_check: bool = flag(
        True, "prove on the first rollout that ratio, KL, rewards and padding are exact; stop if not"
    )
    best_of_n: int = flag(0, "also score the best of so many samples of the untrained policy per held-out prompt")

    def __post_init__(self) -> None:
        RunFlags.__post_init__(self)
        DataFlags.__post_init__(self)
        for name in ("per_device_generation_batch_size", "generation_batches", "max_prompt_seq_len", "ppo_epochs"):
            require_positive(self, name)
        for name in (
            "max_answer_seq_len",
            "per_device_training_batch_size",
            "gradient_accumulation_steps",
            "cliprange",
        ):
            require_positive(self, name)
        require_positive(self, "temperature", "cliprange_value", "actor_learning_rate", "critic_learning_rate")
        require_not_negative(
            self, "kl_coef", "clip_reward_value", "missing_eos_penalty", "best_of_n", "num_warmup_steps"
        )
        require_not_negative(self, "actor_weight_decay", "critic_weight_decay")
        if self.top_k != 0 or self.top_p != 1:
            raise UserError(
                "--top_k and --top_p must stay off in PPO: log-probabilities are of the whole distribution"
            )
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise UserError("--gamma and --lam: expected numbers from 0 to 1")

    def actor_spec(self, num_steps: int) -> TrainSpec:
        return TrainSpec(
            self.actor_learning_rate,
            self.actor_weight_decay,
            self.lr_scheduler_type,
            self.num_warmup_steps,
            num_steps,
            self.max_grad_norm,
            self.actor_zero_stage,
            self.actor_gradient_checkpointing,
        )

    def critic_spec(self, num_steps: int) -> TrainSpec:
        return TrainSpec(
            self.critic_learning_rate,
            self.critic_weight_decay,
            self.lr_scheduler_type,
            self.num_warmup_steps,
            num_steps,
            self.max_grad_norm,
            self.critic_zero_stage,
            self.critic_gradient_checkpointing,
        )

    def shaping(self) -> Shaping:
        return Shaping(
            self.kl_coef,
            self.gamma,
            self.lam,
            self.clip_reward_value,
            self.missing_eos_penalty,
            self.whiten_advantages,
        )

    def update_spec(self, minibatch_size: int) -> UpdateSpec:
        micro_batch_size = self.per_device_training_batch_size
        return UpdateSpec(self.ppo_epochs, minibatch_size, micro_batch_size, self.cliprange, self.cliprange_value)


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, doc=__doc__, removed=REMOVED)
    start = time.time()
    runtime = init_runtime(config.seed)
    dtype = resolve_dtype(config.dtype, runtime.device)
    console = Console(runtime.is_main)
    prepare_output_dir(config.output_dir)

    # Data
    tokenizer = load_tokenizer(config.actor_model_name_or_path, config.chat_template)
    with main_process_first(runtime):
        data = load_rows(config.data_spec(config.seed), "prompt", tokenizer, config.max_prompt_seq_len)
    console.print(data.summary("prompts"))
    held_out = held_out_prompts(data.eval, tokenizer, runtime)
    rollout_size = config.per_device_generation_batch_size * config.generation_batches * runtime.world_size
    minibatch_size = config.per_device_training_batch_size * config.gradient_accumulation_steps * runtime.world_size
    num_rollouts = config.max_steps or -(-config.num_train_epochs * len(data.train) // rollout_size)
    shaping, update = config.shaping(), config.update_spec(minibatch_size)
    num_updates = num_rollouts * config.ppo_epochs * -(-rollout_size // minibatch_size)

    # Model
    engine = create_rlhf_engine(
        config.actor_model_name_or_path,
        config.critic_model_name_or_path,
        tokenizer,
        (config.actor_spec(num_updates), config.critic_spec(num_updates)),
        (
            frozen_stage(config.reference_zero_stage, config.actor_zero_stage),
            frozen_stage(config.reward_zero_stage, config.critic_zero_stage),
        ),
        dtype=dtype,
        runtime=runtime,
        normalize_reward=config.normalize_reward,
    )
    longest = config.max_prompt_seq_len + config.max_answer_seq_len
    check_context(engine.family.config, longest, "--max_prompt_seq_len + --max_answer_seq_len")
    banned = banned_token_ids(tokenizer, engine.family.config.vocab_size)
    sampling = Sampling(config.max_answer_seq_len, config.temperature, banned_ids=banned)

    # Train
    metrics = MetricsWriter(config.output_dir, "ppo", runtime.is_main)
    samples = SampleWriter(config.output_dir, console, metrics)

    def evaluate_and_log(step: int) -> None:
        values, rows = evaluate_policy(
            engine,
            held_out,
            sampling,
            tokenizer,
            batch_size=config.per_device_generation_batch_size,
            micro_batch_size=config.per_device_training_batch_size,
            runtime=runtime,
        )
        metrics.log(step, values)
        samples.add(step, "policy", rows)
        console.print(
            f"step {step}: held-out score {values['eval/score_mean']:.3f}, KL {values['eval/kl_per_seq']:.2f} nats a "
            f"sequence, {values['eval/response_length']:.1f} tokens, {values['eval/finished_fraction']:.0%} finished"
        )

    evaluate_and_log(0)
    if config.best_of_n:
        size = config.per_device_generation_batch_size
        best = best_of_n(engine, held_out, sampling, tokenizer, n=config.best_of_n, batch_size=size, runtime=runtime)
        samples.add(0, f"best_of_{config.best_of_n}", best)
    prompts = prompt_stream(len(data.train), rollout_size, config.seed)
    with console.bar(num_rollouts, "ppo") as bar:
        for step in range(1, num_rollouts + 1):
            # 1. Roll out: answers to the next prompts, sampled from the actor as it is.
            times = [time.time()]
            rows = [data.train[i] for i in next(prompts)[runtime.rank :: runtime.world_size]]
            seed = config.seed * 1_000_003 + step
            rollout = roll_out(engine, rows, sampling, tokenizer, seed, runtime)
            times.append(time.time())

            # 2. Score: log-probabilities, values, rewards; then advantages over the rows of all ranks.
            scored = score_rollout(engine, rollout, sampling, config.per_device_training_batch_size)
            experience = gather_experience(scored, runtime, tokenizer.pad_token_id)
            if not torch.isfinite(experience.scores).all():
                raise RuntimeError(f"rollout {step}: the reward model gave a score that is not finite")
            experience = add_advantages(experience, shaping)
            if step == 1 and config.self_check:
                check_experience(experience, config.kl_coef, dtype)
                check_reward_padding(engine.reward, experience, tokenizer.pad_token_id, dtype)
            times.append(time.time())

            # 3. Update: clipped policy and value losses over minibatches.
            rate = learning_rate(engine.actor)
            updates = train_rlhf(engine, experience, sampling, update, seed, runtime)
            if step == 1 and config.self_check:
                check_first_update(updates[0], dtype)
                console.print("self-check passed: ratio 1, KL 0, one score per answer, padding without effect")
            times.append(time.time())

            line = experience_metrics(experience, config.clip_reward_value) | mean_of(updates)
            line |= {"objective/kl_coef": config.kl_coef, "lr": rate}
            line |= phase_times(times, rollout_size, float(experience.action_mask.sum()))
            if step % config.log_interval == 0 or step == num_rollouts:
                metrics.log(step, line)
                metrics.histogram(step, "objective/scores", experience.scores.cpu())
            score, kl = line["objective/score_mean"], line["objective/kl_per_seq"]
            bar.set_postfix_str(f", score {score:.3f}, KL {kl:.2f}", refresh=False)
            bar.update()
            if step == num_rollouts or (config.eval_interval and step % config.eval_interval == 0):
                evaluate_and_log(step)
    samples.close()

    # Save
    actor_dir, critic_dir = (str(Path(config.output_dir) / name) for name in ("actor", "critic"))
    save_weights(engine.actor, lambda whole: save_model(whole, tokenizer, actor_dir), runtime)
    save_weights(engine.critic, lambda whole: save_model(whole.model, tokenizer, critic_dir), runtime)
    if runtime.is_main:
        save_score_stats(critic_dir, engine.critic.module.mean, engine.critic.module.std)
        for directory, role in ((config.output_dir, POLICY), (actor_dir, POLICY), (critic_dir, CRITIC)):
            write_run_json(
                directory,
                role=role,
                config=to_dict(config),
                data=data.record(),
                metrics=metrics.last,
                seconds=time.time() - start,
            )
    metrics.close()
    console.print(f"saved to {actor_dir} and {critic_dir}")


def roll_out(
    engine: RLHFEngine,
    rows: list[dict],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    runtime: Runtime,
) -> Rollout:
    """Answers to this rank's rows of the global batch, drawn with the random numbers of those rows."""
    prompts = collate_prompts(rows, tokenizer.pad_token_id)
    uniforms = row_uniforms(len(rows) * runtime.world_size, sampling.max_new_tokens, seed)
    with whole_model(engine.actor, runtime.device) as actor:
        return generate(
            actor,
            prompts["input_ids"].to(runtime.device),
            prompts["attention_mask"].to(runtime.device),
            sampling,
            uniforms[runtime.rank :: runtime.world_size],
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )


def frozen_stage(given: int | None, trained: int) -> int:
    return given if given is not None else (3 if trained == 3 else 0)


def mean_of(updates: list[dict[str, float]]) -> dict[str, float]:
    """Over the minibatches of one rollout; of a maximum the maximum."""
    return {
        name: max(u[name] for u in updates) if name.endswith("_max") else sum(u[name] for u in updates) / len(updates)
        for name in updates[0]
    }


def phase_times(times: list[float], num_sequences: int, num_tokens: float) -> dict[str, float]:
    seconds = times[-1] - times[0]
    phases = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    named = dict(zip(("time/rollout_s", "time/score_s", "time/train_s"), phases, strict=True))
    return named | {"perf/seq_per_s": num_sequences / seconds, "perf/tokens_per_s": num_tokens / seconds}


if __name__ == "__main__":
    run_program(main)
