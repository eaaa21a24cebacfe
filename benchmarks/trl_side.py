"""The working process of TRL's side; step3.py, sft.py, reward.py and dpo.py start it with --versus trl.

TRL 1.12.0 is the last with a PPO trainer. It runs with the pinned libraries and is no requirement of this project:

    .venv/bin/pip install trl==1.12.0

How TRL is set, so that both do the same: no gradient checkpointing (its default is on, at about a fifth of the speed),
one process, fused AdamW with the same betas, no reports, no checkpoints, no sample tables, the same token rows, batch,
micro-batch, learning rate, clipping, epochs and minibatches. bf16: see `trl_settings.autocast`. ``--trl_settings``
changes any of it. Nothing of what TRL computes is changed: functions are wrapped to read the clock.
"""

from typing import Any

from dschat.engine.distributed import quiet_libraries

import transformers
import trl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl_settings import common, hand_over, weights_dtype
from turns import Facts, Turns, now
from workloads import add_facts, count_tokens, data_size, settings, stage_rows, trl_rows


def supervised(args: Any, turns: Turns) -> None:
    """SFTTrainer, RewardTrainer or DPOTrainer on the token rows of our program."""
    data, tokenizer = stage_rows(args)
    load = AutoModelForSequenceClassification if args.stage == "reward" else AutoModelForCausalLM
    more = {"num_labels": 1} if args.stage == "reward" else {}
    model = load.from_pretrained(args.model, dtype=weights_dtype(args), **more)
    names = {"sft": "SFT", "reward": "Reward", "dpo": "DPO"}
    config, base = (getattr(trl, names[args.stage] + kind) for kind in ("Config", "Trainer"))
    own = {"per_device_train_batch_size": args.batch, "max_steps": args.turns + 1, "max_length": args.max_seq_len}
    if args.stage == "dpo":
        own["precompute_ref_log_probs"] = True
    known: dict[str, Any] = {"data": data_size(data)}
    seen: list[Facts] = []

    class Trainer(base):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # the rows are tokens already

        def training_step(self, model: Any, inputs: Any, *given: Any, **more: Any) -> Any:
            attended = inputs["attention_mask"].bool()
            if args.stage == "sft":
                scored = inputs["labels"] != -100
            else:
                scored = inputs["completion_mask"].bool() if args.stage == "dpo" else attended
            seen.append(count_tokens(args.stage, attended, scored))
            return super().training_step(model, inputs, *given, **more)

        def _precompute_ref_logps(self, dataset: Any, *given: Any) -> Any:
            begin = now()
            result = super()._precompute_ref_logps(dataset, *given)
            known["reference_s_per_row"] = (now() - begin) / len(dataset)
            return result

    trainer = Trainer(
        model=model,
        args=config(**(common(args) | own | args.trl_settings)),
        train_dataset=trl_rows(args.stage, data.train),
        processing_class=tokenizer,
    )

    def facts() -> Facts:
        found = add_facts(seen) | known
        seen.clear()
        return found | {"optimizer_steps": trainer.state.global_step, "dtype": str(next(model.parameters()).dtype)}

    trainer.add_callback(hand_over(turns, facts))
    trainer.train()


if __name__ == "__main__":
    taken = Turns()
    taken.begin()
    quiet_libraries()
    given = settings()
    transformers.set_seed(given.seed)
    if given.stage == "ppo":
        import trl_ppo  # experimental in TRL: the other trainers do without

        trl_ppo.ppo(given, taken)
    else:
        supervised(given, taken)
