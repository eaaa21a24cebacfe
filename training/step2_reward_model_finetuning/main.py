"""Step 2: the reward model. It learns to score the preferred answer of a pair above the other.

    python training/step2_reward_model_finetuning/main.py --model_name_or_path output/sft --data_path toy \\
        --output_dir output/reward

Several ranks: the same after `deepspeed` or `torchrun`. One score per dialogue, read at its last real token, the end
token; the loss is -log sigmoid(chosen - rejected) (Ouyang et al. 2022, eq. 1), the mean over the pairs of the whole
optimizer step.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from dschat.config import flag, parse_config, require_not_negative, require_positive, to_dict
from dschat.data.loader import collate_preferences, epoch_batches
from dschat.data.prepare import load_rows, training_batches
from dschat.data.show import show_batch
from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import backward, create_train_engine, grad_norm, learning_rate, save_weights
from dschat.engine.distributed import (
    Runtime,
    all_reduce_sum,
    gather_rows,
    init_runtime,
    main_process_first,
)
from dschat.errors import UserError, run_program
from dschat.flags import REMOVED, SupervisedFlags
from dschat.functional import pairwise_ranking_loss
from dschat.models.load import REWARD, check_context, load_scorer, resolve_dtype, save_model
from dschat.models.scorer import Scorer, last_token_values, make_probes, save_score_stats
from dschat.report.metrics import MetricsWriter, prepare_output_dir, write_run_json
from dschat.report.progress import Console
from dschat.report.statistics import wilson_interval

import deepspeed
import torch

Batch = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class Config(SupervisedFlags):
    lora_dim: int = flag(0, "train adapters of this rank and the head, on a frozen trunk; 0: the whole model")
    lora_alpha: int | None = flag(None, "adapters count lora_alpha / lora_dim; default: twice lora_dim")
    lora_module_name: str = flag("auto", "parts of names of linear layers, with commas; auto: all in the blocks")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "lora_dim")
        if self.lora_alpha is not None:
            require_positive(self, "lora_alpha")
        if not self.lora_dim and (self.lora_alpha is not None or self.lora_module_name != "auto"):
            raise UserError("--lora_alpha and --lora_module_name need --lora_dim above 0")
        if self.lora_dim and self.model_name_or_path == "toy":
            raise UserError("--lora_dim needs a trained trunk, which toy is not; give the directory of step 1")


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, doc=__doc__, removed=REMOVED)
    start = time.time()
    runtime = init_runtime(config.seed)
    dtype = resolve_dtype(config.dtype, runtime.device)
    console = Console(runtime.is_main)
    prepare_output_dir(config.output_dir)
    other_kind = Path(config.output_dir) / ("config.json" if config.lora_dim else "adapter_config.json")
    if other_kind.exists():
        raise UserError(f"{other_kind}: a model of another kind is here; choose another --output_dir, or empty it")

    # Data
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    with main_process_first(runtime):
        data = load_rows(config.data_spec(config.seed), "preference", tokenizer, config.max_seq_len)
    console.print(data.summary("pairs"))
    train_batches = training_batches(
        len(data.train),
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        *runtime.place,
        config.seed,
        config.num_train_epochs,
        config.max_steps,
    )
    eval_batches = epoch_batches(
        len(data.eval), config.per_device_eval_batch_size, 1, *runtime.place, seed=0, epoch=0, shuffle=False
    )

    def collate(rows, micro_batch) -> Batch:
        pairs = [rows[i] for i in micro_batch.indices]
        batch = collate_preferences(pairs, micro_batch.num_real, tokenizer.pad_token_id)
        return {name: tensor.to(runtime.device) for name, tensor in batch.items()}

    if config.show_batch:
        batch = collate(data.train, train_batches[0][0])
        console.print(show_batch(tokenizer, batch["input_ids"], batch["attention_mask"], batch["loss_mask"]))

    # Model
    classifier = load_scorer(config.model_name_or_path, tokenizer, dtype=dtype, dropout=config.dropout)
    check_context(classifier.config, config.max_seq_len, "--max_seq_len")
    spec = config.train_spec(len(train_batches))
    scorer = Scorer(classifier)
    if config.lora_dim:
        from dschat.models import adapters  # PEFT takes a second to import

        scorer = adapters.create_lora_scorer(classifier, config.lora_dim, config.lora_alpha, config.lora_module_name)
        console.print(adapters.trained_table(scorer))
    engine = create_train_engine(scorer, spec, dtype=dtype, runtime=runtime)

    # Train
    metrics = MetricsWriter(config.output_dir, "reward", runtime.is_main)

    def evaluate_and_log(step: int) -> torch.Tensor:
        batches = (collate(data.eval, micro_batch) for (micro_batch,) in eval_batches)
        values, scores = evaluate(engine, console.track(batches, len(eval_batches), "evaluate"), runtime)
        metrics.log(step, values)
        interval = f"{values['eval/accuracy_low']:.3f} to {values['eval/accuracy_high']:.3f}"
        console.print(
            f"step {step}: accuracy {values['eval/accuracy']:.3f} (95 %: {interval}) on "
            f"{values['eval/num_pairs']} held-out pairs, margin {values['eval/margin']:.3f}"
        )
        return scores

    scores = evaluate_and_log(0)
    with console.bar(len(train_batches), "reward") as bar:
        for step, micro_batches in enumerate(train_batches, 1):
            step_start = time.time()
            batches = [collate(data.train, micro_batch) for micro_batch in micro_batches]
            rate = learning_rate(engine)
            stats, num_pairs = train_step(engine, batches, runtime)
            if step % config.log_interval == 0 or step == len(train_batches):
                line = stats | {"lr": rate, "grad_norm": grad_norm(engine)}
                metrics.log(step, line | {"perf/pairs_per_s": num_pairs / (time.time() - step_start)})
            bar.set_postfix_str(f", loss {stats['loss']:.3f}", refresh=False)
            bar.update()
            if step == len(train_batches) or (config.eval_interval and step % config.eval_interval == 0):
                scores = evaluate_and_log(step)
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    metrics.log(len(train_batches), {"eval/score_mean": mean, "eval/score_std": std})
    for row, name in enumerate(("chosen", "rejected")):
        metrics.histogram(len(train_batches), f"eval/{name}_scores", scores[row].cpu())

    # Save
    def save(whole) -> None:
        if config.lora_dim:
            adapters.save_adapter(whole, tokenizer, config.output_dir, config.model_name_or_path)
        else:
            save_model(whole.model, tokenizer, config.output_dir)
        save_score_stats(config.output_dir, mean, std, make_probes(whole, data.eval, tokenizer))

    save_weights(engine, save, runtime)
    if runtime.is_main:
        write_run_json(
            config.output_dir,
            role=REWARD,
            config=to_dict(config),
            data=data.record(),
            metrics=metrics.last,
            seconds=time.time() - start,
        )
    metrics.close()
    console.print(f"saved to {config.output_dir}")


def pair_scores(engine: deepspeed.DeepSpeedEngine, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,), (B,): the scores of the chosen and of the rejected dialogues, from one forward."""
    values = engine(batch["input_ids"], batch["attention_mask"])
    chosen, rejected = last_token_values(values, batch["attention_mask"]).chunk(2)
    return chosen, rejected


def train_step(
    engine: deepspeed.DeepSpeedEngine, batches: list[Batch], runtime: Runtime
) -> tuple[dict[str, float], float]:
    """One optimizer step over this rank's micro-batches; loss and accuracy, and the number of pairs, of all ranks."""
    engine.train()
    num_pairs = all_reduce_sum(torch.stack([batch["pair_mask"].sum() for batch in batches]).sum(), runtime).item()
    sums = []
    for batch in batches:
        real = batch["pair_mask"]
        chosen, rejected = pair_scores(engine, batch)
        loss, stats = pairwise_ranking_loss(chosen[real], rejected[real], batch["margin"][real], denominator=num_pairs)
        backward(engine, loss)
        sums.append(torch.stack([loss.detach(), stats["accuracy"] * real.sum() / num_pairs]))
    loss_value, accuracy = all_reduce_sum(torch.stack(sums).sum(0), runtime).tolist()
    if not math.isfinite(loss_value):
        raise RuntimeError(f"the loss is {loss_value}; lower --learning_rate, or use --dtype bf16 or fp32")
    engine.step()
    return {"loss": loss_value, "accuracy": accuracy}, num_pairs


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, batches, runtime: Runtime) -> tuple[dict[str, float], torch.Tensor]:
    """Accuracy over the whole held-out set (a tie counts half), and its scores (2, N), chosen above rejected."""
    engine.eval()
    scores = []
    for batch in batches:
        rows = torch.stack([*pair_scores(engine, batch), batch["pair_mask"].float()], dim=1)
        everyone = gather_rows(rows, runtime)
        scores.append(everyone[everyone[:, 2] > 0, :2].T)
    both = torch.cat(scores, dim=1).double()
    chosen, rejected = both
    num_pairs = len(chosen)
    correct = (chosen > rejected).sum().item() + (chosen == rejected).sum().item() / 2
    low, high = wilson_interval(correct, num_pairs)
    return {
        "eval/accuracy": correct / num_pairs,
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/margin": (chosen - rejected).mean().item(),
        "eval/num_pairs": num_pairs,
    }, both


if __name__ == "__main__":
    run_program(main)
