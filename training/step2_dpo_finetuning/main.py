"""Step 2 without a reward model: the policy learns from preferences directly, by DPO and its relatives.

    python training/step2_dpo_finetuning/main.py --model_name_or_path output/sft --data_path toy \\
        --output_dir output/dpo

Several ranks: the same after `deepspeed` or `torchrun`. The default loss is -log sigmoid(beta h), h by how much more
than the reference the policy prefers the chosen answer (Rafailov et al. 2023, eq. 7), the mean over the pairs of the
whole optimizer step. The reference is the model before training; it is asked once, before the first step.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from dschat.config import flag, parse_config, require_not_negative, require_positive, to_dict
from dschat.engine.workload import RESPONSE, Workload
from dschat.errors import UserError, run_before_imports, run_program
from dschat.flags import REMOVED, SupervisedFlags
from dschat.rlhf.specs import CONSTANTS, WITHOUT_REFERENCE


@dataclass(kw_only=True)
class Config(SupervisedFlags):
    loss_type: str = flag("sigmoid", "sigmoid is DPO; kto takes single good and bad answers", choices=tuple(CONSTANTS))
    beta: float | None = flag(None, "strength of the tie to the reference; default: 0.1; simpo 2.0, of the reward")
    label_smoothing: float = flag(0.0, "sigmoid, ipo, hinge, simpo: probability that a label is wrong")
    sft_coef: float = flag(0.0, "the same losses: adds so much of the chosen answer's -logp per token")
    simpo_gamma: float | None = flag(None, "simpo: how far the rewards should be apart; default: half of beta")
    orpo_lambda: float | None = flag(None, "orpo: weight of the odds ratio; default: 0.1")
    desirable_weight: float | None = flag(None, "kto: weight of the good answers; default: 1")
    undesirable_weight: float | None = flag(None, "kto: weight of the bad answers; default: 1")
    reference_model_name_or_path: str | None = flag(None, "default: the model before training (not simpo, orpo)")

    def __post_init__(self) -> None:
        super().__post_init__()
        own = CONSTANTS[self.loss_type]
        for name in dict.fromkeys(name for names in CONSTANTS.values() for name in names):
            if name not in own and getattr(self, name) != getattr(Config, name):
                losses = ", ".join(loss for loss, names in CONSTANTS.items() if name in names)
                raise UserError(f"--{name} has no effect with --loss_type {self.loss_type}, only with {losses}")
            if name in own and getattr(self, name) is None:
                setattr(self, name, self.beta / 2 if name == "simpo_gamma" else own[name])
        require_positive(self, *{"beta", "desirable_weight", "undesirable_weight"} & own.keys())
        require_not_negative(self, *{"sft_coef", "simpo_gamma", "orpo_lambda"} & own.keys())
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing {self.label_smoothing}: expected at least 0 and below 0.5")
        if self.reference_model_name_or_path and self.loss_type in WITHOUT_REFERENCE:
            raise UserError(f"--loss_type {self.loss_type} has no reference; drop --reference_model_name_or_path")

    def inputs(self) -> dict[str, str]:
        reference = self.reference_model_name_or_path
        return super().inputs() | ({"reference_model_name_or_path": reference} if reference else {})

    def objective(self) -> "Objective":
        return Objective(self.loss_type, {name: getattr(self, name) for name in CONSTANTS[self.loss_type]})

    def workload(self) -> Workload:
        return self.supervised_workload("step 2, DPO", RESPONSE, num_sequences=2, response_size=self.max_seq_len - 1)


if __name__ == "__main__":  # help, and mistakes in flags, need not wait for the libraries below, which take seconds
    run_before_imports(partial(parse_config, Config, doc=__doc__, removed=REMOVED))

from dschat.data.loader import Batch, num_rows, take_rows
from dschat.data.prepare import load_rows, training_batches
from dschat.data.show import repro_rows, show_batch
from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import backward, create_train_engine, grad_norm, learning_rate, save_weights
from dschat.engine.distributed import Runtime, all_reduce_sum, init_runtime, main_process_first
from dschat.engine.micro_batches import MicroBatches
from dschat.engine.run_state import RunState, limit_micro_batches
from dschat.engine.sharded_loading import sharded_loading
from dschat.models.adapted import trained_table
from dschat.models.adapter_files import refuse_other_kind
from dschat.models.liger import apply_liger, require_liger
from dschat.models.load import POLICY, check_context, load_causal_lm, resolve_dtype, save_model
from dschat.models.specs import LoraSpec
from dschat.planning import plan_run
from dschat.report.bad_steps import BadSteps
from dschat.report.metrics import MetricsWriter, prepare_output_dir, write_run_json
from dschat.report.progress import Console
from dschat.report.statistics import wilson_interval
from dschat.rlhf.answer_logprobs import (
    AnswerLogprobs,
    ask_answers,
    gather_answers,
    score_answers,
    with_mismatched_logps,
)
from dschat.rlhf.answer_rows import AnswerRows
from dschat.rlhf.preference_objective import Objective
from dschat.rlhf.reference_logprobs import reference_logprobs, weights_hash, with_frozen_model

import deepspeed
import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel


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
    objective = config.objective()
    kind, noun = ("preference", "pairs") if objective.is_paired else ("feedback", "answers")

    # Data
    spec = config.data_spec(config.seed)
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    with main_process_first(runtime):
        data = load_rows(spec, kind, tokenizer, config.max_seq_len)
    console.print(data.summary(noun))
    if run.is_finished(lambda: config.identity(data.record(), dtype, runtime.world_size)):
        return
    shape = {"pad_token_id": tokenizer.pad_token_id, "max_len": config.max_seq_len, "seed": config.seed}
    shape |= {"batch_size": config.per_device_eval_batch_size, "runtime": runtime}
    train = AnswerRows(data.train, objective.is_paired, **shape)
    held_out = AnswerRows(data.eval, objective.is_paired, **shape)
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
    if config.show_batch:
        batch = train.collate(train_batches[0][0])
        answers = pad(batch["response_mask"], (batch["input_ids"].shape[1] - batch["response_mask"].shape[1], 0))
        console.print(show_batch(tokenizer, batch["input_ids"], batch["attention_mask"], answers))

    # Model
    def ask_reference(reference: torch.nn.Module, family: PreTrainedModel, weights: str) -> None:
        for name, part in (("training", train), ("held-out", held_out)):
            part.ref_logps, was_read = reference_logprobs(reference, family, weights, part, spec.cache_dir, console)
            console.print(f"reference: {name} log-probabilities {'read from the cache' if was_read else 'computed'}")

    if config.reference_model_name_or_path:
        paths = (config.reference_model_name_or_path, config.model_name_or_path)
        placed = {"dtype": dtype, "zero_stage": config.zero_stage, "runtime": runtime}
        placed |= {"use_liger_kernel": config.use_liger_kernel}
        with_frozen_model(*paths, tokenizer, config.max_seq_len, ask_reference, **placed)
    given = {"dtype": dtype, "dropout": config.dropout, "quantization": config.quantization}
    with sharded_loading(config.zero_stage, dtype):
        model = load_causal_lm(config.model_name_or_path, tokenizer, **given)
    check_context(model.config, config.max_seq_len, "--max_seq_len")
    if config.use_liger_kernel:
        apply_liger(model)
    is_own_reference = objective.has_reference and not config.reference_model_name_or_path
    weights = weights_hash(model) if is_own_reference else ""  # now: without adapters
    if config.lora_dim:
        from dschat.models.lora import add_lora  # PEFT takes a second to import

        add_lora(model, LoraSpec(*config.lora_shape()))
        console.print(trained_table(model))
    engine = create_train_engine(model, config.train_spec(len(train_batches)), dtype=dtype, runtime=runtime)
    if is_own_reference:
        ask_reference(engine, model, weights)

    # Train
    metrics = MetricsWriter(config.output_dir, "dpo", runtime.is_main, config.report_to)

    eval_memory = MicroBatches(runtime, [engine], unit="{} rows in evaluation")

    def evaluate_and_log(step: int) -> None:
        batches = console.track(held_out.in_order(), len(held_out.steps), "evaluate")
        values = evaluate(engine, model, objective, batches, eval_memory)
        metrics.log(step, values)
        interval = ""
        if objective.is_paired:
            interval = f" (95 %: {values['eval/accuracy_low']:.3f} to {values['eval/accuracy_high']:.3f})"
        console.print(
            f"step {step}: accuracy {values['eval/accuracy']:.3f}{interval} on {len(data.eval)} held-out {noun}, "
            f"margin {values['eval/margin']:.3f}"
        )

    remember = partial(limit_micro_batches, run.limits_file, config.half_micro_batches())
    memory = MicroBatches(runtime, [engine], remember)
    bad_steps = BadSteps(config.output_dir, runtime.rank, console.print)
    run.restore({"model": engine}, {"metrics": metrics, "bad_steps": bad_steps})
    if run.is_new:
        evaluate_and_log(0)
    with run, console.bar(len(train_batches), "dpo", run.step) as bar:
        for step in run.steps(len(train_batches)):
            step_start = time.time()
            batches = [train.collate(micro_batch) for micro_batch in train_batches[step - 1]]
            rate = learning_rate(engine)
            stats, num_seen = train_step(engine, model, objective, batches, memory, runtime)
            line = {"loss": stats["loss"], "grad_norm": grad_norm(engine)}
            rows = partial(repro_rows, data.train, train_batches[step - 1], tokenizer)
            bad_steps.found(f"step {step}", line, rows)
            if step % config.log_interval == 0 or step == len(train_batches):
                line |= stats | {"lr": rate, "num_bad_steps": bad_steps.number}
                metrics.log(step, line | {f"perf/{noun}_per_s": num_seen / (time.time() - step_start)})
            bar.set_postfix_str(f", loss {stats['loss']:.3f}", refresh=False)
            bar.update()
            if step == len(train_batches) or (config.eval_interval and step % config.eval_interval == 0):
                evaluate_and_log(step)

    # Save
    base = config.model_name_or_path if saves_adapter else None
    save_weights(engine, lambda whole: save_model(whole, tokenizer, config.output_dir, base), runtime)
    if runtime.is_main:
        write_run_json(
            config.output_dir,
            role=POLICY,
            config=to_dict(config),
            data=data.record(),
            metrics=metrics.last,
            seconds=run.seconds,
        )
    metrics.hparams(to_dict(config))
    metrics.close()
    run.finish()
    console.print(f"saved to {config.output_dir}")


def train_step(
    engine: deepspeed.DeepSpeedEngine,
    model: PreTrainedModel,
    objective: Objective,
    batches: list[Batch],
    memory: MicroBatches,
    runtime: Runtime,
) -> tuple[dict[str, float], float]:
    """One optimizer step over this rank's micro-batches; loss, statistics and the number of rows, of all ranks."""
    total_rows = all_reduce_sum(torch.stack([batch["row_mask"].sum() for batch in batches]).sum(), runtime).item()
    kl = None
    if not objective.is_paired:
        batches, kl = with_mismatched_logps(engine, model, batches, runtime)
    engine.train()

    def accumulate() -> tuple[torch.Tensor, list[AnswerLogprobs]]:
        losses, scored = [], []
        for batch in memory.cut(batches, num_rows, take_rows):
            rows = score_answers(engine, model, batch)
            loss, _ = objective.loss(rows.real(), kl=kl, denominator=total_rows)
            backward(engine, loss)
            losses.append(loss.detach())
            scored.append(rows.each(torch.Tensor.detach))
        return torch.stack(losses).sum(), scored

    loss, scored = memory.run(engine, accumulate)
    loss_value = all_reduce_sum(loss, runtime).item()
    engine.step()
    return objective.measure(gather_answers(scored, runtime)) | {"loss": loss_value}, total_rows


@torch.no_grad()
def evaluate(
    engine: deepspeed.DeepSpeedEngine,
    model: PreTrainedModel,
    objective: Objective,
    batches: Iterable[Batch],
    memory: MicroBatches,
) -> dict[str, float]:
    """Loss, accuracy and implicit rewards over the whole held-out set; of pairs, the accuracy's 95 % interval too."""
    rows = ask_answers(engine, model, batches, memory)
    values = objective.measure(rows)
    if objective.is_paired:
        interval = wilson_interval(values["accuracy"] * len(rows.logps), len(rows.logps))
        values["accuracy_low"], values["accuracy_high"] = interval
    return {f"eval/{name}": value for name, value in values.items()}


if __name__ == "__main__":
    run_program(main)
