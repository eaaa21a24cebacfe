"""Step 1: supervised fine-tuning. The model learns to answer as the demonstrations do.

    python training/step1_supervised_finetuning/main.py --model_name_or_path toy --data_path toy \\
        --output_dir output/sft

Several ranks: the same after `deepspeed` or `torchrun`. The loss is on answer tokens only, the end token included, and
is the mean over the tokens of the whole optimizer step: neither micro-batches, accumulation nor ranks change it.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from dschat.config import flag, parse_config, require_not_negative, to_dict
from dschat.engine.workload import SFT, Workload
from dschat.errors import run_before_imports, run_program
from dschat.flags import REMOVED, SupervisedFlags


@dataclass(kw_only=True)
class Config(SupervisedFlags):
    prompt_loss_weight: float = flag(0.0, "weight of prompt tokens in the loss; an answer token weighs 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "prompt_loss_weight")

    def workload(self) -> Workload:
        return self.supervised_workload("step 1", SFT)


if __name__ == "__main__":  # help, and mistakes in flags, need not wait for the libraries below, which take seconds
    run_before_imports(partial(parse_config, Config, doc=__doc__, removed=REMOVED))

from dschat.data.loader import collate_sft, epoch_batches, num_rows, rows_at, take_rows
from dschat.data.prepare import load_rows, training_batches
from dschat.data.show import repro_rows, show_batch
from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import backward, create_train_engine, grad_norm, learning_rate, save_weights
from dschat.engine.distributed import Runtime, all_reduce_sum, init_runtime, main_process_first
from dschat.engine.micro_batches import MicroBatches
from dschat.engine.run_state import RunState, limit_micro_batches
from dschat.engine.sharded_loading import sharded_loading
from dschat.functional import sft_loss
from dschat.models.adapted import trained_table
from dschat.models.adapter_files import refuse_other_kind
from dschat.models.liger import apply_liger, require_liger
from dschat.models.load import POLICY, check_context, load_causal_lm, resolve_dtype, save_model
from dschat.models.packed import token_logits
from dschat.models.specs import LoraSpec
from dschat.planning import plan_run
from dschat.report.bad_steps import BadSteps
from dschat.report.metrics import MetricsWriter, prepare_output_dir, write_run_json
from dschat.report.progress import Console

import deepspeed
import torch
from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]


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
        data = load_rows(config.data_spec(config.seed), "sft", tokenizer, config.max_seq_len)
    data.require_held_out()
    console.print(data.summary("dialogues"))
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
    eval_batches = epoch_batches(
        len(data.eval), config.per_device_eval_batch_size, 1, *runtime.place, seed=0, epoch=0, shuffle=False
    )

    def collate(rows, micro_batch) -> Batch:
        batch = collate_sft(rows_at(rows, micro_batch.indices), micro_batch.num_real, tokenizer.pad_token_id)
        return {name: tensor.to(runtime.device) for name, tensor in batch.items()}

    if config.show_batch:
        batch = collate(data.train, train_batches[0][0])
        console.print(show_batch(tokenizer, batch["input_ids"], batch["attention_mask"], batch["loss_mask"]))

    # Model
    given = {"dtype": dtype, "dropout": config.dropout, "quantization": config.quantization}
    with sharded_loading(config.zero_stage, dtype):
        model = load_causal_lm(config.model_name_or_path, tokenizer, **given)
    check_context(model.config, config.max_seq_len, "--max_seq_len")
    if config.use_liger_kernel:
        apply_liger(model)
    if config.lora_dim:
        from dschat.models.lora import add_lora  # PEFT takes a second to import

        add_lora(model, LoraSpec(*config.lora_shape()))
        console.print(trained_table(model))
    engine = create_train_engine(model, config.train_spec(len(train_batches)), dtype=dtype, runtime=runtime)

    # Train
    metrics = MetricsWriter(config.output_dir, "sft", runtime.is_main, config.report_to)

    eval_memory = MicroBatches(runtime, [engine], unit="{} rows in evaluation")

    def evaluate_and_log(step: int) -> None:
        batches = (collate(data.eval, micro_batch) for (micro_batch,) in eval_batches)
        values = evaluate(engine, model, console.track(batches, len(eval_batches), "evaluate"), eval_memory)
        metrics.log(step, values)
        console.print(f"step {step}: perplexity {values['eval/perplexity']:.2f} on held-out answers")

    remember = partial(limit_micro_batches, run.limits_file, config.half_micro_batches())
    memory = MicroBatches(runtime, [engine], remember)
    bad_steps = BadSteps(config.output_dir, runtime.rank, console.print)
    run.restore({"model": engine}, {"metrics": metrics, "bad_steps": bad_steps})
    if run.is_new:
        evaluate_and_log(0)
    with run, console.bar(len(train_batches), "sft", run.step) as bar:
        for step in run.steps(len(train_batches)):
            step_start = time.time()
            batches = [collate(data.train, micro_batch) for micro_batch in train_batches[step - 1]]
            rate = learning_rate(engine)
            loss, num_tokens = train_step(engine, model, batches, config.prompt_loss_weight, memory, runtime)
            line = {"loss": loss, "grad_norm": grad_norm(engine)}
            rows = partial(repro_rows, data.train, train_batches[step - 1], tokenizer)
            bad_steps.found(f"step {step}", line, rows)
            if step % config.log_interval == 0 or step == len(train_batches):
                line |= {"lr": rate, "num_bad_steps": bad_steps.number}
                metrics.log(step, line | {"perf/tokens_per_s": num_tokens / (time.time() - step_start)})
            bar.set_postfix_str(f", loss {loss:.3f}", refresh=False)
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
    batches: list[Batch],
    prompt_loss_weight: float,
    memory: MicroBatches,
    runtime: Runtime,
) -> tuple[float, float]:
    """One optimizer step over this rank's micro-batches; the loss and the number of tokens seen, over all ranks."""
    engine.train()
    weights = [trained_tokens(batch, prompt_loss_weight)[1] for batch in batches]
    counts = [torch.stack([w.sum(), b["attention_mask"].sum()]) for b, w in zip(batches, weights, strict=True)]
    denominator, num_tokens = all_reduce_sum(torch.stack(counts).sum(0), runtime).tolist()

    def accumulate() -> torch.Tensor:
        losses = []
        for batch in memory.cut(batches, num_rows, take_rows):
            mask, weights = trained_tokens(batch, prompt_loss_weight)
            logits = token_logits(engine, model, batch["input_ids"], batch["attention_mask"], mask)
            tokens = {"token_ids": batch["input_ids"][mask][None], "weights": weights[mask][None]}
            loss, _ = sft_loss(logits, **tokens, denominator=denominator)
            backward(engine, loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    total = all_reduce_sum(memory.run(engine, accumulate), runtime).item()
    engine.step()
    return total, num_tokens


def trained_tokens(batch: Batch, prompt_loss_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) bool, (B, T) float32: which tokens are in the loss, and their weights. A filler row has none."""
    answer = batch["loss_mask"]
    if prompt_loss_weight == 0:
        return answer, answer.float()
    mask = batch["attention_mask"] & answer.any(dim=1, keepdim=True)
    mask[:, 0] = False  # nothing predicts the first token
    return mask, torch.where(answer, 1.0, prompt_loss_weight) * mask


@torch.no_grad()
def evaluate(
    engine: deepspeed.DeepSpeedEngine, model: PreTrainedModel, batches: Iterable[Batch], memory: MicroBatches
) -> dict[str, float]:
    """Loss and perplexity over the answer tokens of the whole held-out set."""
    engine.eval()

    def measure(batch: Batch) -> torch.Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=memory.runtime.device)
        for part in memory.cut([batch], num_rows, take_rows):
            mask = part["loss_mask"]
            logits = token_logits(engine, model, part["input_ids"], part["attention_mask"], mask)
            _, stats = sft_loss(logits, part["input_ids"][mask][None])
            sums += torch.stack([stats["loss_sum"], stats["num_tokens"]])
        return sums

    total = torch.stack([memory.ask(partial(measure, batch)) for batch in batches]).sum(0)
    loss_sum, num_tokens = all_reduce_sum(total, memory.runtime).tolist()
    loss = loss_sum / num_tokens
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}


if __name__ == "__main__":
    run_program(main)
