"""Step 2: the reward model. It learns to score the preferred answer of a pair above the other.

    python training/step2_reward_model_finetuning/main.py --model_name_or_path output/sft --data_path toy \\
        --output_dir output/reward

Several ranks: the same after `deepspeed` or `torchrun`. One score per dialogue, read at its last real token, the end
token. All ranked answers to a prompt are one element of a batch; the loss is -log sigmoid(better - worse), the mean
over the pairs of a prompt, then over the prompts of the whole optimizer step (Ouyang et al. 2022, eq. 1). At the end
stands a report on whether the model may be trusted; step 3 refuses one that may not.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dschat.config import flag, parse_config, require_not_negative, to_dict
from dschat.engine.workload import SCORER, Workload
from dschat.errors import UserError, run_before_imports, run_program
from dschat.flags import REMOVED, CurveFlags, SupervisedFlags
from dschat.rlhf.specs import CurveSpec


@dataclass(kw_only=True)
class Config(SupervisedFlags, CurveFlags):
    label_smoothing: float = flag(0.0, "probability that a preference label is wrong, as the loss takes it")
    center_rewards_coefficient: float = flag(0.0, "of (better + worse)^2 in the loss, which keeps scores around 0")

    def __post_init__(self) -> None:
        SupervisedFlags.__post_init__(self)
        CurveFlags.__post_init__(self)
        require_not_negative(self, "center_rewards_coefficient")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing {self.label_smoothing}: expected at least 0 and below 0.5")
        if self.judge and self.model_name_or_path == "toy":
            raise UserError("--judge needs answers of a trained model, which toy is not; give the directory of step 1")

    def curve_spec(self) -> CurveSpec | None:
        if self.judge is None:
            return None
        return CurveSpec(
            policy_path=self.model_name_or_path,
            judge=self.judge,
            num_samples=self.judge_samples,
            max_new_tokens=self.judge_max_new_tokens,
            batch_size=self.per_device_eval_batch_size,
            seed=self.seed,
        )

    def workload(self) -> Workload:
        return self.supervised_workload("step 2, reward model", SCORER, num_sequences=2)


if __name__ == "__main__":  # help, and mistakes in flags, need not wait for the libraries below, which take seconds
    run_before_imports(partial(parse_config, Config, doc=__doc__, removed=REMOVED))

from dschat.data.loader import Batch, collate_rankings, num_rows, rows_at, take_rows
from dschat.data.prepare import load_rows, training_batches
from dschat.data.show import repro_rows, show_batch
from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import backward, create_train_engine, grad_norm, learning_rate, save_weights
from dschat.engine.distributed import Runtime, all_reduce_sum, init_runtime, main_process_first
from dschat.engine.micro_batches import MicroBatches
from dschat.engine.run_state import RunState, limit_micro_batches
from dschat.engine.sharded_loading import sharded_loading
from dschat.functional import listwise_ranking_loss
from dschat.models.adapted import trained_table
from dschat.models.adapter_files import refuse_other_kind
from dschat.models.liger import apply_liger, require_liger
from dschat.models.load import REWARD, check_context, load_scorer, resolve_dtype, save_model
from dschat.models.rankings import ranking_facts, ranking_scores, score_rankings
from dschat.models.scorer import Scorer, make_probes, save_score_stats
from dschat.models.specs import LoraSpec
from dschat.planning import plan_run
from dschat.report.bad_steps import BadSteps
from dschat.report.metrics import MetricsWriter, prepare_output_dir, write_run_json
from dschat.report.progress import Console
from dschat.report.reward_quality import (
    QUALITY_FOLDER,
    pairs_of_rankings,
    quality_tables,
    reward_quality,
    write_quality,
)
from dschat.rlhf.judges import check_judge
from dschat.rlhf.reward_report import report_quality
from dschat.rlhf.samples import prompt_text

import deepspeed
import numpy as np
import torch


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
    saves_adapter = config.lora_dim > 0 and not config.lora_save_merged
    refuse_other_kind(config.output_dir, saves_adapter)
    run = RunState(config.output_dir, config.checkpoint_spec(), runtime, console.print)
    config = config.with_micro_batches(run.micro_batch_limits())

    # Data
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    with main_process_first(runtime):
        data = load_rows(config.data_spec(config.seed), "ranking", tokenizer, config.max_seq_len)
    data.require_held_out()
    console.print(data.summary("ranked prompts"))
    if run.is_finished(lambda: config.identity(data.record(), dtype, runtime.world_size)):
        return
    train_batches = training_batches(
        data.train,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        *runtime.place,
        config.seed,
        config.num_train_epochs,
        config.max_steps,
        config.max_tokens_per_batch,
    )
    facts = ranking_facts(data.eval)
    if config.judge:
        check_judge(config.judge, tokenizer, [prompt_text(messages) for messages in data.eval["messages"]])

    def collate(rows, micro_batch) -> Batch:
        ranked = rows_at(rows, micro_batch.indices)
        batch = collate_rankings(ranked, micro_batch.num_real, tokenizer.pad_token_id)
        return {name: tensor.to(runtime.device) for name, tensor in batch.items()}

    if config.show_batch:
        batch = collate(data.train, train_batches[0][0])
        console.print(show_batch(tokenizer, batch["input_ids"], batch["attention_mask"], batch["loss_mask"]))

    # Model
    given = {"dtype": dtype, "dropout": config.dropout, "quantization": config.quantization}
    with sharded_loading(config.zero_stage, dtype):
        classifier = load_scorer(config.model_name_or_path, tokenizer, **given)
    check_context(classifier.config, config.max_seq_len, "--max_seq_len")
    if config.use_liger_kernel:
        apply_liger(classifier)
    spec = config.train_spec(len(train_batches))
    if config.lora_dim:
        from dschat.models.lora import add_lora  # PEFT takes a second to import

        add_lora(classifier, LoraSpec(*config.lora_shape()))
        console.print(trained_table(classifier))
    engine = create_train_engine(Scorer(classifier), spec, dtype=dtype, runtime=runtime)

    # Train
    metrics = MetricsWriter(config.output_dir, "reward", runtime.is_main, config.report_to)

    eval_memory = MicroBatches(runtime, [engine], unit="{} rows in evaluation")

    def evaluate_and_log(step: int) -> np.ndarray:
        batch_size = config.per_device_eval_batch_size
        scores = score_rankings(engine, data.eval, batch_size, tokenizer.pad_token_id, eval_memory, console)
        quality = reward_quality(pairs_of_rankings(facts, scores))
        values = accuracy_metrics(quality)
        metrics.log(step, values)
        interval = f"{values['eval/accuracy_low']:.3f} to {values['eval/accuracy_high']:.3f}"
        console.print(
            f"step {step}: accuracy {values['eval/accuracy']:.3f} (95 %: {interval}) on "
            f"{values['eval/num_pairs']:.0f} held-out pairs, margin {values['eval/margin']:.3f}"
        )
        return scores

    remember = partial(limit_micro_batches, run.limits_file, config.half_micro_batches())
    memory = MicroBatches(runtime, [engine], remember)
    bad_steps = BadSteps(config.output_dir, runtime.rank, console.print)
    run.restore({"model": engine}, {"metrics": metrics, "bad_steps": bad_steps})
    if run.is_new:
        evaluate_and_log(0)
    with run, console.bar(len(train_batches), "reward", run.step) as bar:
        for step in run.steps(len(train_batches)):
            step_start = time.time()
            batches = [collate(data.train, micro_batch) for micro_batch in train_batches[step - 1]]
            rate = learning_rate(engine)
            options = {"label_smoothing": config.label_smoothing, "center_coef": config.center_rewards_coefficient}
            stats, num_pairs = train_step(engine, batches, options, memory, runtime)
            line = {"loss": stats["loss"], "grad_norm": grad_norm(engine)}
            rows = partial(repro_rows, data.train, train_batches[step - 1], tokenizer)
            bad_steps.found(f"step {step}", line, rows)
            if step % config.log_interval == 0 or step == len(train_batches):
                line |= stats | {"lr": rate, "num_bad_steps": bad_steps.number}
                metrics.log(step, line | {"perf/pairs_per_s": num_pairs / (time.time() - step_start)})
            bar.set_postfix_str(f", loss {stats['loss']:.3f}", refresh=False)
            bar.update()
            if step < len(train_batches) and config.eval_interval and step % config.eval_interval == 0:
                evaluate_and_log(step)
    scores = evaluate_and_log(len(train_batches))
    given = scores[np.isfinite(scores)]
    mean, std = float(given.mean()), float(given.std())
    metrics.log(len(train_batches), {"eval/score_mean": mean, "eval/score_std": std})
    pairs = pairs_of_rankings(facts, scores)
    metrics.histogram(len(train_batches), "eval/chosen_scores", pairs.chosen)
    metrics.histogram(len(train_batches), "eval/rejected_scores", pairs.rejected)

    # Save
    def save(whole) -> None:
        save_model(whole.model, tokenizer, config.output_dir, config.model_name_or_path if saves_adapter else None)
        save_score_stats(config.output_dir, mean, std, make_probes(whole, data.eval, tokenizer))

    report_dir = Path(config.output_dir) / QUALITY_FOLDER
    if runtime.is_main:  # the report on an earlier model: step 3 must not take it for this one's
        (report_dir / "quality.json").unlink(missing_ok=True)
    save_weights(engine, save, runtime)
    if runtime.is_main:
        write_run_json(
            config.output_dir,
            role=REWARD,
            config=to_dict(config),
            data=data.record(),
            metrics=metrics.last,
            seconds=run.seconds,
        )

    # Report
    place = {"dtype": dtype, "device": runtime.device}
    quality = report_quality(engine, tokenizer, data.eval, pairs, config.curve_spec(), **place)
    console.print(quality_tables(quality))
    if runtime.is_main:
        write_quality(quality, report_dir)
    metrics.hparams(to_dict(config))
    metrics.close()
    run.finish()
    console.print(f"saved to {config.output_dir}")


def accuracy_metrics(quality: dict) -> dict[str, float]:
    """The figures of a `reward_quality` that go into metrics.jsonl."""
    low, high = quality["ci95"]
    names = {"eval/accuracy": quality["accuracy"], "eval/accuracy_low": low, "eval/accuracy_high": high}
    margin = quality["margin"] if quality["margin"] is not None else math.nan
    return names | {"eval/margin": margin, "eval/num_pairs": quality["num_pairs"]}


def train_step(
    engine: deepspeed.DeepSpeedEngine,
    batches: list[Batch],
    options: dict[str, float],
    memory: MicroBatches,
    runtime: Runtime,
) -> tuple[dict[str, float], float]:
    """One optimizer step over this rank's micro-batches; loss and accuracy, and the number of pairs, of all ranks."""
    engine.train()
    num_prompts = torch.stack([batch["ranks"].any(dim=1).sum() for batch in batches]).sum()
    num_prompts = all_reduce_sum(num_prompts, runtime).item()

    def accumulate() -> torch.Tensor:
        sums = []
        for batch in memory.cut(batches, num_rows, take_rows):
            scores = ranking_scores(engine, batch)
            loss, stats = listwise_ranking_loss(
                scores, batch["ranks"], batch["margin"], **options, denominator=num_prompts
            )
            backward(engine, loss)
            sums.append(torch.stack([loss.detach(), stats["accuracy"] * stats["num_pairs"], stats["num_pairs"]]))
        return torch.stack(sums).sum(0)

    loss_value, num_correct, num_pairs = all_reduce_sum(memory.run(engine, accumulate), runtime).tolist()
    engine.step()
    return {"loss": loss_value, "accuracy": num_correct / num_pairs}, num_pairs


if __name__ == "__main__":
    run_program(main)
