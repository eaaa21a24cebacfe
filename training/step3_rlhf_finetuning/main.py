"""Step 3: PPO. The policy learns to answer so that the reward scores it higher, without leaving its reference.

    python training/step3_rlhf_finetuning/main.py --actor_model_name_or_path output/sft \\
        --critic_model_name_or_path output/reward --data_path toy --output_dir output/ppo

Several ranks: the same after `deepspeed` or `torchrun`. Each rollout: sample answers, score them, turn scores and the
KL penalty into rewards, estimate advantages, then ppo_epochs passes of clipped updates over fresh minibatches. Every
part has its flags and its page: docs/ppo.md.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dschat.config import parse_config, to_dict
from dschat.errors import UserError, run_before_imports, run_program
from dschat.flags import REMOVED
from dschat.rlhf.flags import PPOFlags
from dschat.rlhf.specs import Sampling


@dataclass(kw_only=True)
class Config(PPOFlags):
    """The flags are those of dschat/rlhf/flags.py, which has them by group."""


if __name__ == "__main__":  # help, and mistakes in flags, need not wait for the libraries below, which take seconds
    run_before_imports(partial(parse_config, Config, doc=__doc__, removed=REMOVED))

from dschat.data.loader import PromptStream, collate_prompts, rows_at
from dschat.data.prepare import load_rows
from dschat.data.show import show_batch
from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import learning_rate, save_weights, whole_model
from dschat.engine.distributed import init_runtime, main_process_first
from dschat.engine.micro_batches import MicroBatches
from dschat.engine.run_state import RunState, limit_micro_batches
from dschat.models.adapter_files import refuse_other_kind
from dschat.models.liger import require_liger
from dschat.models.load import CRITIC, POLICY, check_context, resolve_dtype, save_model
from dschat.models.scorer import save_score_stats
from dschat.planning import plan_run
from dschat.report.bad_steps import BadSteps
from dschat.report.metrics import MetricsWriter, prepare_output_dir, write_run_json
from dschat.report.progress import Console
from dschat.report.samples import SampleWriter
from dschat.rlhf.build import check_quality, create_models, trained_tables
from dschat.rlhf.collect import BadScores, Collector, collect, judge, roll_out
from dschat.rlhf.demonstrations import Demonstrations
from dschat.rlhf.evaluate import BestSoFar, best_of_n, held_out_prompts
from dschat.rlhf.experience import Experience, add_advantages, experience_metrics, repro_responses, rollout_values
from dschat.rlhf.explain import explain_update
from dschat.rlhf.judges import check_judge, create_judge
from dschat.rlhf.kl_coefficient import KLCoefficient
from dschat.rlhf.monitor import Monitor, load_pairs, restore_best, update_ratios
from dschat.rlhf.policies import spread
from dschat.rlhf.ppo_trainer import Stats, mean_of, train_rlhf
from dschat.rlhf.preflight import check_sample_space
from dschat.rlhf.rewards import reward_metrics
from dschat.rlhf.rollout import banned_token_ids
from dschat.rlhf.rollout_engine import create_decoder
from dschat.rlhf.samples import prompt_text
from dschat.rlhf.self_check import (
    check_critic_padding,
    check_experience,
    check_first_minibatch,
    check_reward_padding,
    tolerance,
)
from dschat.rlhf.token_details import write_token_details
from dschat.rlhf.update_state import CurrentUpdate, Update


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, doc=__doc__, removed=REMOVED)
    if config.asks_for_plan:
        return plan_run(config.plan_request(), main, argv)
    runtime = init_runtime(config.seed, config.stall_timeout)
    dtype = resolve_dtype(config.dtype, runtime.device)
    if config.use_liger_kernel:
        require_liger(runtime.device)
    console = Console(runtime.is_main)
    prepare_output_dir(config.output_dir)
    for folder, dim in (("actor", config.actor_lora_dim), ("critic", config.critic_lora_dim)):
        refuse_other_kind(str(Path(config.output_dir) / folder), dim > 0 and not config.lora_save_merged)
    run = RunState(config.output_dir, config.checkpoint_spec(), runtime, console.print)
    config = config.with_micro_batches(run.micro_batch_limits())

    # Data
    tokenizer = load_tokenizer(config.actor_model_name_or_path, config.chat_template)
    with main_process_first(runtime):
        data = load_rows(config.data_spec(config.seed), "prompt", tokenizer, config.max_prompt_seq_len)
        found, ptx_rows = data.record(), None
        if config.ptx_data_path:
            longest = config.max_prompt_seq_len + config.max_answer_seq_len
            ptx_rows = load_rows(config.ptx_spec(), "sft", tokenizer, longest).train
            found["ptx_fingerprint"] = ptx_rows._fingerprint
        pairs = None
        if config.preferences_from:
            pairs = load_pairs(config.preferences_from, tokenizer, **config.pairs_shape(), runtime=runtime)
            found["preference_fingerprint"] = pairs.rows._fingerprint
    data.require_held_out()
    console.print(data.summary("prompts"))
    if run.is_finished(lambda: config.identity(found, dtype, runtime.world_size)):
        return
    held_out = held_out_prompts(data.eval, runtime)
    num_prompts = config.per_device_generation_batch_size * config.generation_batches * runtime.world_size
    num_rows = num_prompts * config.num_samples_per_prompt
    num_rollouts = config.max_steps or -(-config.num_train_epochs * len(data.train) // num_prompts)
    if config.show_batch:
        first = collate_prompts([data.train[i] for i in range(min(4, len(data.train)))], tokenizer.pad_token_id)
        none_trained = first["attention_mask"] & False
        console.print(show_batch(tokenizer, first["input_ids"], first["attention_mask"], none_trained))
    if config.kl_target and num_rows >= 5 * config.kl_horizon:
        raise UserError(f"--kl_horizon {config.kl_horizon} is too short for rollouts of {num_rows} answers; raise it")
    shaping, update = config.shaping(), config.update_spec(runtime.world_size)
    num_updates = config.ppo_epochs * -(-num_rows // update.minibatch_size)
    ptx = None
    if ptx_rows is not None:
        sizes = (update.minibatch_size, update.micro_batch_size)
        ptx = Demonstrations(ptx_rows, *sizes, tokenizer.pad_token_id, config.seed, runtime)

    # Model
    spec = config.models_spec(num_rollouts, num_updates)
    for line in check_quality(spec.rewards, config.allow_weak_reward_model):
        console.print(line)
    engine, rewards = create_models(spec, tokenizer, dtype=dtype, runtime=runtime)
    console.print(rewards.summary())
    for line in trained_tables(engine):
        console.print(line)
    longest = config.max_prompt_seq_len + config.max_answer_seq_len
    check_context(engine.family.config, longest, "--max_prompt_seq_len + --max_answer_seq_len")
    banned = banned_token_ids(tokenizer, engine.family.config.vocab_size)
    sampling = Sampling(config.max_answer_seq_len, config.temperature, banned_ids=banned)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with whole_model(engine.actor, runtime.device) as whole:
        decoder, line = create_decoder(config.rollout_engine, whole, sampling, limit=tolerance(dtype), **ends)
    if line:
        console.print(line)
    remember = partial(limit_micro_batches, run.limits_file, config.half_micro_batches())
    memory = MicroBatches(runtime, engine.policy_models, remember)
    collector = Collector(
        engine,
        rewards,
        tokenizer,
        sampling,
        runtime,
        config.per_device_generation_batch_size,
        config.per_device_training_batch_size,
        config.kl_penalty,
        config.num_samples_per_prompt,
        config.max_tokens_per_batch,
        config.old_logprobs,
        decoder,
        memory,
        MicroBatches(runtime, unit="the answers to {} prompts"),
    )

    def save_actor(name: str) -> None:
        directory = str(Path(config.output_dir) / name)
        save_weights(engine.actor, lambda whole: save_model(whole, tokenizer, directory, engine.actor_base), runtime)
        record(directory, POLICY)

    def record(directory: str, role: str) -> None:
        if runtime.is_main:
            write_run_json(
                directory,
                role=role,
                config=to_dict(config),
                data=found,
                metrics=metrics.last,
                seconds=run.seconds,
            )

    judged_by = None
    if config.judged_by:
        check_judge(config.judged_by, tokenizer, [prompt_text(row["messages"]) for row in held_out.rows])
        place = {"dtype": dtype, "device": runtime.device, "batch_size": config.per_device_training_batch_size}
        judged_by = create_judge(config.judged_by, tokenizer, **place)

    # Train
    metrics = MetricsWriter(config.output_dir, "ppo", runtime.is_main, config.report_to)
    samples_file = SampleWriter(config.output_dir, console, metrics)
    bad_scores = BadScores(config.output_dir, runtime)
    bad_steps = BadSteps(config.output_dir, runtime.rank, console.print)
    best = BestSoFar(config.keeps_best_by, config.early_stopping_patience)
    stops = config.stop_on_overoptimisation
    monitor = Monitor(collector, held_out, judged_by, pairs, Path(config.output_dir), stops)
    kl_coef = KLCoefficient(config.kl_coef, config.kl_target, config.kl_horizon)
    current = CurrentUpdate(runtime.device)

    def evaluate_and_log(step: int) -> None:
        values, rows = monitor.evaluate(config.kl_coef)
        metrics.log(step, values)
        samples_file.add(step, "policy", rows)
        console.print(
            f"step {step}: held-out score {values['eval/score_mean']:.3f}, KL {values['eval/kl_per_seq']:.2f} nats a "
            f"sequence, {values['eval/response_length']:.1f} tokens, {values['eval/finished_fraction']:.0%} finished"
            + (f", judge {values['eval/judge_mean']:.3f}" if config.judged_by else "")
        )
        for finding in monitor.observe(step, values, rows):
            console.print(f"step {step}: ALARM: {finding.text}")
        if best.improves(step, values):
            save_actor("best")

    def is_bad(step: int, position: int, stats: Stats, minibatch: Experience) -> bool:
        rows = partial(repro_responses, minibatch, tokenizer)
        return bad_steps.found(f"step {step}, minibatch {position}", stats, rows)

    engines = {"actor": engine.actor} | ({"critic": engine.critic} if engine.critic is not None else {})
    parts = {"metrics": metrics, "samples": samples_file, "bad_scores": bad_scores, "bad_steps": bad_steps}
    parts |= {"best": best, "kl_coef": kl_coef, "monitor": monitor}
    parts |= {name: part for name, part in (("ptx", ptx), ("ema", engine.ema)) if part is not None}
    run.restore(engines, parts | {"update": current})
    prompts = PromptStream(len(data.train), num_prompts, config.seed, position=run.step)
    if run.is_new:
        if config.preflight != "off":
            asked = [data.train[i] for i in spread(len(data.train), config.preflight_prompts)]
            say = console.print
            start = time.time()
            check_sample_space(collector, asked, config.preflight_samples, config.preflight, config.output_dir, say)
            metrics.log(0, {"time/preflight_s": time.time() - start})
        evaluate_and_log(0)
        if config.best_of_n:
            chosen = best_of_n(collector, held_out, config.best_of_n, judged_by)
            samples_file.add(0, f"best_of_{config.best_of_n}", chosen)
    with run, console.bar(num_rollouts, "ppo", run.step) as bar:
        for step in run.steps(num_rollouts):
            seed = config.seed * 1_000_003 + step
            evaluates = step == num_rollouts or (config.eval_interval > 0 and step % config.eval_interval == 0)
            is_first = step == 1 + bad_scores.number
            indices = next(prompts)[runtime.rank :: runtime.world_size]
            if current.update is None:  # else the run was stopped inside this update
                # 1. Roll out: answers to the next prompts, sampled from the actor as it is.
                times = [time.time()]
                rows = rows_at(data.train, indices)
                rollout = roll_out(collector, rows, seed)
                times.append(time.time())
                run.stop_if_asked()  # the seeds would draw the same answers again

                # 2. Score: the rewards' judgement, log-probabilities, values; advantages over the rows of all ranks.
                samples, scores = judge(collector, rollout, rows)
                if bad_scores.found(step, samples, scores):
                    bar.update()
                    console.print(bad_scores.message)
                    metrics.log(step, {"rewards/num_bad_rollouts": bad_scores.number})
                    if evaluates:
                        evaluate_and_log(step)
                    continue
                experience, by_source = collect(collector, rollout, samples, scores)
                experience = add_advantages(experience, shaping, kl_coef.value)
                if is_first and config.self_check:
                    check_experience(experience, shaping, kl_coef.value, dtype)
                    check_reward_padding(rewards, samples, dtype)
                    if engine.critic is not None:
                        check_critic_padding(engine.critic, experience, tokenizer.pad_token_id, dtype)
                times.append(time.time())
                seconds = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
                current.update = Update(experience, by_source, learning_rate(engine.actor), seconds)

            # 3. Update: clipped policy and value losses over minibatches.
            update_start, experience = time.time(), current.update.experience
            train_policy = step > config.critic_warmup_rollouts
            updates = train_rlhf(
                engine,
                experience,
                collector.sampling,
                update,
                seed,
                runtime,
                kl_coef=kl_coef.value,
                train_policy=train_policy,
                ptx=ptx,
                progress=current.update.progress,
                after_step=run.stop_if_asked,
                is_bad=partial(is_bad, step),
                memory=memory,
            )
            bar.update()
            if config.self_check and updates:
                check_first_minibatch(updates[0], dtype)
                if is_first:
                    console.print("self-check passed: ratio 1, KL 0, one score per answer, padding without effect")
            seconds = [*current.update.seconds, time.time() - update_start]
            if is_first and config.explain:
                explain_update(
                    collector, experience, shaping, update, kl_coef.value, config.explain, config.output_dir
                )

            line = experience_metrics(experience, config.clip_reward_value) | mean_of(updates)
            line |= reward_metrics(current.update.by_source) | {"rewards/num_bad_rollouts": bad_scores.number}
            line |= {"objective/kl_coef": kl_coef.value, "lr": current.update.learning_rate}
            line |= {"policy/updates_left_out": num_updates - len(updates), "num_bad_steps": bad_steps.number}
            line |= phase_times(seconds, num_rows, float(experience.response_mask.sum()))
            current.update = None
            score, kl = line["objective/score_mean"], line["objective/kl_per_seq"]
            if train_policy:
                kl_coef.update(kl, num_rows)
            if step % config.log_interval == 0 or step == num_rollouts:
                metrics.log(step, line)
                for name, values in rollout_values(experience).items():
                    metrics.histogram(step, name, values)
            bar.set_postfix_str(f", score {score:.3f}, KL {kl:.2f}", refresh=False)
            if evaluates:
                metrics.histogram(step, "policy/ratios", update_ratios(collector, experience))
                evaluate_and_log(step)
            if monitor.is_over:
                console.print(f"stopped at step {step} by the alarm: the actor is the one of step {best.step} again")
                break
            if best.is_over:
                console.print(f"stopped at step {step}: no better {config.best_metric} since step {best.step}")
                break
    write_token_details(collector, held_out, shaping, kl_coef.value, monitor.history[-1]["step"], config.output_dir)

    # Save
    if monitor.is_over:
        monitor.log_restored(metrics, samples_file)
        restore_best(config.output_dir, runtime)
    else:
        save_actor("actor")
        if engine.ema is not None:
            with engine.ema.swapped():
                save_actor("actor_ema")
    samples_file.close()
    if engine.critic is not None:
        directory, scorer = str(Path(config.output_dir) / "critic"), engine.critic.module
        base = engine.critic_base
        save_weights(engine.critic, lambda whole: save_model(whole.model, tokenizer, directory, base), runtime)
        if runtime.is_main:
            save_score_stats(directory, scorer.mean, scorer.std)
        record(directory, CRITIC)
    record(config.output_dir, POLICY)
    metrics.hparams(to_dict(config))
    metrics.close()
    run.finish()
    console.print(f"saved to {config.output_dir}/actor" + (f"; best: step {best.step}" if best.name else ""))


def phase_times(seconds: list[float], num_sequences: int, num_tokens: float) -> dict[str, float]:
    total = sum(seconds)
    named = dict(zip(("time/rollout_s", "time/score_s", "time/train_s"), seconds, strict=True))
    return named | {"perf/seq_per_s": num_sequences / total, "perf/tokens_per_s": num_tokens / total}


if __name__ == "__main__":
    run_program(main)
