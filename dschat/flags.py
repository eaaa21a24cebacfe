"""The flags that several programs share, under DeepSpeed-Chat's names where it has them."""

import dataclasses
import os
from abc import ABCMeta, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from dschat.config import DTYPES, flag, require_not_negative, require_positive, to_dict
from dschat.data.specs import DataSpec
from dschat.engine.run_identity import RunIdentity, content_key
from dschat.engine.specs import CheckpointSpec, TrainSpec
from dschat.engine.workload import SCORER, Changes, ModelUse, PassUse, PlanRequest, Workload
from dschat.errors import UserError
from dschat.flag_checks import check_lora, check_offload, check_quantized

if TYPE_CHECKING:
    import torch

TRUST_HELP = "run the Python code that a model or tokenizer brings along, with your rights"

OFFLOAD_HELP = "optimizer states (at ZeRO 3 weights too) in the CPU's memory; needs ZeRO 1 or more"

# Flags that change nothing of what a run computes. The data are told by what is in them, not by where they are.
WITHOUT_EFFECT = {
    *("output_dir", "checkpoint_interval", "keep_checkpoints", "resume", "fresh", "log_interval", "show_batch"),
    *("data_path", "eval_data_path", "ptx_data_path", "data_output_path", "num_workers", "self_check"),
    *("reward_api_timeout", "reward_api_retries", "allow_weak_reward_model", "stall_timeout", "trust_remote_code"),
    *("dry_run", "plan_for", "calibrate"),
    *("report_to", "preference_data_path", "preflight", "preflight_prompts", "preflight_samples"),
}
# Flags that change rounding alone, as long as an optimizer step and a rollout have as many rows.
ROUNDING = {
    *("per_device_train_batch_size", "per_device_eval_batch_size", "max_tokens_per_batch", "generation_batches"),
    *("per_device_generation_batch_size", "per_device_training_batch_size", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "actor_gradient_checkpointing", "critic_gradient_checkpointing"),
    *("zero_stage", "actor_zero_stage", "critic_zero_stage", "reference_zero_stage", "reward_zero_stage"),
    *("rollout_engine", "offload", "offload_reference_model", "offload_reward_model", "use_liger_kernel"),
}
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(kw_only=True)
class RunFlags(metaclass=ABCMeta):
    output_dir: str = flag(help="where the model and the records of the run go")
    seed: int = flag(1234, "of weights, data order and sampling; the same seed gives the same weights on a CPU")
    dtype: str = flag("auto", "of weights and activations; auto: bf16 on a GPU that has it, else fp32", choices=DTYPES)
    use_liger_kernel: bool = flag(
        False, "Liger's fused kernels for the norms, rotary embeddings and gated MLPs of all models; a GPU only"
    )
    max_steps: int = flag(0, "stop after this many optimizer steps (step 3: rollouts); 0: by num_train_epochs")
    num_train_epochs: int = flag(1, "passes over the data of this stage")
    max_grad_norm: float = flag(1.0, "clip the gradient's L2 norm; 0: never")
    eval_interval: int = flag(0, "evaluate every so many steps (step 3: rollouts); 0: before and after training only")
    log_interval: int = flag(1, "steps between lines of metrics.jsonl")
    report_to: str = flag("none", "send the metrics to wandb too, through its own library", choices=("none", "wandb"))
    trust_remote_code: bool = flag(False, TRUST_HELP)
    stall_timeout: float = flag(
        1800.0, "several ranks: one that gives no sign or makes no step for so many seconds ends the job; 0: never"
    )
    checkpoint_interval: int = flag(
        500, "save the whole run every so many steps (step 3: rollouts); 0: only when a signal stops it"
    )
    keep_checkpoints: int = flag(2, "of those, how many are kept; removed when the run is done")
    resume: str = flag(
        "auto",
        "auto: continue from the newest checkpoint of this run in output_dir, else start; required: never start",
        choices=("auto", "required"),
    )
    fresh: bool = flag(False, "start over, whatever checkpoints or finished run output_dir holds")
    dry_run: bool = flag(False, "say what memory and disk the run needs, and end; exit code 3: it does not fit")
    plan_for: str = flag("", "dry_run for so many ranks here (2), or GPUs of so many GB (8x80); default: as launched")
    calibrate: int = flag(0, "dry_run after so many real steps of a copy that is removed again: adds the time")

    def __post_init__(self) -> None:
        require_positive(self, "num_train_epochs", "log_interval", "keep_checkpoints")
        require_not_negative(self, "calibrate")
        if self.plan_for and (self.calibrate or not self.dry_run):
            raise UserError("--plan_for goes with --dry_run, and not with --calibrate, whose steps are made here")
        require_not_negative(self, "max_steps", "eval_interval", "max_grad_norm", "checkpoint_interval")
        require_not_negative(self, "stall_timeout")
        if self.fresh and self.resume == "required":
            raise UserError("--fresh starts over and --resume required forbids it; drop one of them")

    def checkpoint_spec(self) -> CheckpointSpec:
        return CheckpointSpec(self.checkpoint_interval, self.keep_checkpoints, self.resume, self.fresh)

    @abstractmethod
    def inputs(self) -> dict[str, str]:
        """By flag, the files and model directories that the run starts from."""

    @abstractmethod
    def step_sizes(self, num_ranks: int) -> dict[str, int]:
        """What the flags in ROUNDING and the number of ranks come to together; first the rows of the data that a step
        takes."""

    @abstractmethod
    def workload(self) -> Workload:
        """What decides the run's memory."""

    @abstractmethod
    def plan_hints(self) -> tuple[dict[str, int], list[Changes]]:
        """The flags that say how many rows a pass has, times what; changes of flags that save memory."""

    @property
    def asks_for_plan(self) -> bool:
        return self.dry_run or self.calibrate > 0

    def plan_request(self) -> PlanRequest:
        return PlanRequest(
            lambda changes: dataclasses.replace(self, **changes).workload(),
            *self.plan_hints(),
            plan_for=self.plan_for,
            num_steps=self.calibrate,
            output_dir=self.output_dir,
            count_steps=self.count_steps,
            eval_interval=self.eval_interval,
        )

    def count_steps(self, num_rows: int, num_ranks: int) -> int:
        """Of the whole run on so many rows of data."""
        rows_per_step = next(iter(self.step_sizes(num_ranks).values()))
        return self.max_steps or self.num_train_epochs * -(-num_rows // rows_per_step)

    def identity(self, data: dict[str, Any], dtype: "torch.dtype", num_ranks: int) -> RunIdentity:
        """What this run is, to tell whether a checkpoint or a finished model is of the same one.

        Args:
            data: the fingerprints and the like of the token rows.
        """
        inputs = self.inputs()
        flags = {name: value for name, value in to_dict(self).items() if name not in {*WITHOUT_EFFECT, *inputs}}
        result = {f"--{name}": value for name, value in flags.items() if name not in ROUNDING}
        result |= {f"the content of --{name}": content_key(path) for name, path in inputs.items()}
        result |= {f"data: {name}": value for name, value in data.items()}
        result |= self.step_sizes(num_ranks) | {"dtype": str(dtype)}
        rounding = {f"--{name}": value for name, value in flags.items() if name in ROUNDING}
        return RunIdentity(result, rounding | {"the number of ranks": num_ranks})


@dataclass(kw_only=True)
class DataFlags:
    data_path: list[str] = flag(help="files, save_to_disk folders, hub names or 'toy'; 'path:0.5' takes half of it")
    data_split: str = flag("2,4,4", "shares of steps 1, 2 and 3; every record trains in one stage only")
    eval_data_path: list[str] = flag([], "held-out data; without it the source's own test split or eval_fraction")
    eval_fraction: float = flag(0.1, "of sources without a test split, held out before the stages are split")
    max_eval_samples: int = flag(0, "evaluate on the first so many held-out rows; 0: all")
    skip_bad_records: bool = flag(
        False, "drop and count records that cannot be read, instead of stopping at the first"
    )
    chat_template: str = flag("auto", "auto: the model's own, else plain Human/Assistant; plain; or a jinja file")
    data_output_path: str = flag("~/.cache/dschat", "folder of the tokenised data, keyed by content")
    num_workers: int = flag(1, "processes that tokenise")
    show_batch: bool = flag(False, "print the first batch decoded, trained tokens in colour")

    def __post_init__(self) -> None:
        require_positive(self, "num_workers")
        require_not_negative(self, "max_eval_samples")
        if not 0 < self.eval_fraction < 1:
            raise UserError(f"--eval_fraction {self.eval_fraction}: expected a share between 0 and 1")

    def data_spec(self, seed: int) -> DataSpec:
        return DataSpec(
            data_path=tuple(self.data_path),
            eval_data_path=tuple(self.eval_data_path),
            data_split=self.data_split,
            eval_fraction=self.eval_fraction,
            seed=seed,
            cache_dir=os.path.expanduser(self.data_output_path),
            skip_bad_records=self.skip_bad_records,
            num_workers=self.num_workers,
            max_eval_samples=self.max_eval_samples,
        )


@dataclass(kw_only=True)
class LoraModeFlags:
    """How adapters are trained and saved, whatever model they are on."""

    only_optimize_lora: bool = flag(
        True, "False also trains what is under no adapter: embeddings, norms, biases; needs lora_save_merged"
    )
    lora_save_merged: bool = flag(False, "save whole models, W + B A alpha / dim, in place of adapters")
    load_in_4bit: bool = flag(False, "the frozen weights under the (actor's) adapters in 4 bits (NF4; QLoRA)")
    load_in_8bit: bool = flag(False, "the same in 8 bits")

    @property
    def quantization(self) -> str | None:
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None


class MicroBatchFlags:
    """Those that cut an optimizer step into micro-batches; of a dataclass that has them."""

    ROWS = ""  # the name of the flag that bounds their rows
    gradient_accumulation_steps: int
    max_tokens_per_batch: int

    def half_micro_batches(self) -> dict[str, int]:
        """The flags that bound a micro-batch, at half of what they are."""
        names = [name for name in (self.ROWS, "max_tokens_per_batch") if getattr(self, name)]
        return {name: max(1, getattr(self, name) // 2) for name in names}

    def with_micro_batches(self, limits: dict[str, int]) -> Self:
        """Micro-batches of at most these `half_micro_batches`; an optimizer step has as many rows as before."""
        rows, tokens = getattr(self, self.ROWS), self.max_tokens_per_batch
        step = rows * self.gradient_accumulation_steps
        fitting = max(size for size in range(1, min(rows, limits.get(self.ROWS, rows)) + 1) if step % size == 0)
        changed = {self.ROWS: fitting, "gradient_accumulation_steps": step // fitting}
        changed["max_tokens_per_batch"] = min(tokens, limits.get("max_tokens_per_batch", tokens))
        config: Any = self
        return dataclasses.replace(config, **changed)


@dataclass(kw_only=True)
class SupervisedFlags(RunFlags, DataFlags, LoraModeFlags, MicroBatchFlags):
    """Steps 1 and 2: one trained model, one loss over a data set."""

    ROWS = "per_device_train_batch_size"
    model_name_or_path: str = flag(help="a Hugging Face directory, a hub name or 'toy' (the embedded model)")
    per_device_train_batch_size: int = flag(16, "rows per rank and micro-batch; step 2: prompts with their answers")
    per_device_eval_batch_size: int = flag(16, "the same in evaluation")
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    max_tokens_per_batch: int = flag(
        0, "micro-batches of so many tokens with padding, of a step's rows sorted by length; 0: by number of rows"
    )
    max_seq_len: int = flag(512, "tokens of a whole dialogue; longer ones lose their earliest turns")
    learning_rate: float = flag(1e-5, "peak")
    weight_decay: float = flag(0.0, "of matrices; biases and norms never decay")
    lr_scheduler_type: str = flag("cosine", "of the learning rate", choices=SCHEDULES)
    num_warmup_steps: int = flag(0, "optimizer steps of linear warm-up")
    zero_stage: int = flag(
        0, "DeepSpeed ZeRO: 0 nothing, 1 optimizer, 2 gradients, 3 weights are sharded", choices=ZERO_STAGES
    )
    offload: bool = flag(False, OFFLOAD_HELP)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    lora_dim: int = flag(0, "train adapters of this rank (LoRA) and the head, if any; 0: the whole model")
    lora_alpha: int | None = flag(None, "adapters count lora_alpha / lora_dim; default: twice lora_dim")
    lora_module_name: str = flag("auto", "parts of names of linear layers, with commas; auto: all in the blocks")
    lora_learning_rate: float = flag(5e-4, "of the adapters, peak; the head's is learning_rate")
    dropout: float | None = flag(None, "every dropout of the model; default: as its config says")

    def __post_init__(self) -> None:
        RunFlags.__post_init__(self)
        DataFlags.__post_init__(self)
        require_positive(
            self,
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "max_seq_len",
            "learning_rate",
        )
        require_not_negative(self, "weight_decay", "num_warmup_steps", "max_tokens_per_batch")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout}: expected a probability of at least 0 and below 1")
        check_lora(self, "")
        check_offload("--offload", self.offload, "--zero_stage", self.zero_stage)
        check_quantized(self, "zero_stage")
        if self.lora_dim and self.model_name_or_path == "toy":
            raise UserError("--lora_dim needs a trained trunk, which toy is not; give the directory of step 1")

    def inputs(self) -> dict[str, str]:
        return {"model_name_or_path": self.model_name_or_path}

    def step_sizes(self, num_ranks: int) -> dict[str, int]:
        per_rank = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return {"rows of an optimizer step, of all ranks,": per_rank * num_ranks}

    def lora_shape(self) -> tuple[int, int | None, str, bool]:
        """What `dschat.models.specs.LoraSpec` is made of."""
        return self.lora_dim, self.lora_alpha, self.lora_module_name, self.only_optimize_lora

    def supervised_workload(self, title: str, kind: str, num_sequences: int = 1, response_size: int = 0) -> Workload:
        """``num_sequences``: of a row of the data."""
        length = self.max_seq_len
        rows, eval_rows = self.per_device_train_batch_size, self.per_device_eval_batch_size * num_sequences
        if self.max_tokens_per_batch:
            rows *= self.gradient_accumulation_steps  # those of a step, cut by tokens
            rows = min(rows * num_sequences, max(num_sequences, self.max_tokens_per_batch // length))
        else:
            rows *= num_sequences
        model = ModelUse(
            "model",
            self.model_name_or_path,
            is_scorer=kind == SCORER,
            zero_stage=self.zero_stage,
            checkpointing=self.gradient_checkpointing,
            accumulates=self.gradient_accumulation_steps > 1,
            offload=self.offload,
            lora=self.lora_shape(),
            saves_adapter=self.lora_dim > 0 and not self.lora_save_merged,
            quantized_bits=4 if self.load_in_4bit else 8 if self.load_in_8bit else 0,
        )
        passes = [PassUse("train", "model", kind, rows, length, response_size, train=True)]
        passes.append(PassUse("evaluate", "model", kind, eval_rows, length, response_size))
        checkpoints = self.keep_checkpoints if self.checkpoint_interval else 0
        return Workload(title, self.dtype, (model,), tuple(passes), checkpoints, (length, "--max_seq_len"))

    def plan_hints(self) -> tuple[dict[str, int], list[Changes]]:
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        changes: list[Changes] = [
            {"gradient_checkpointing": True},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows},
            {"per_device_eval_batch_size": 1},
            {"max_seq_len": self.max_seq_len // 2},
            {"zero_stage": 2},
            {"zero_stage": 3},
            {"zero_stage": max(2, self.zero_stage), "offload": True},
            {"lora_dim": self.lora_dim or 64},
            {"dtype": "bf16"},
        ]
        if self.max_tokens_per_batch:
            return {"max_tokens_per_batch": self.max_seq_len}, changes
        return {"per_device_train_batch_size": 1}, changes

    def train_spec(self, num_steps: int) -> TrainSpec:
        return TrainSpec(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            lr_scheduler_type=self.lr_scheduler_type,
            num_warmup_steps=self.num_warmup_steps,
            num_steps=num_steps,
            max_grad_norm=self.max_grad_norm,
            zero_stage=self.zero_stage,
            gradient_checkpointing=self.gradient_checkpointing,
            lora_learning_rate=self.lora_learning_rate,
            offload=self.offload,
        )


@dataclass(kw_only=True)
class EvaluationFlags:
    """Tools that measure and train nothing: prompt_eval.py and rw_eval.py, one process each."""

    eval_fraction: float = flag(
        0.0, "of data_path without a test split take only what the stages hold out at this fraction and seed; 0: all"
    )
    seed: int = flag(1234, "of eval_fraction and of sampling; the same seed draws the same numbers for every model")
    batch_size: int = flag(16, "prompts answered, or scored with all their answers, at once")
    dtype: str = flag("auto", "of the weights; auto: bf16 on a GPU that has it, else fp32", choices=DTYPES)
    chat_template: str = flag("auto", "auto: each model's own, else plain Human/Assistant; plain; or a jinja file")
    data_output_path: str = flag("~/.cache/dschat", "folder of the tokenised data, keyed by content")
    trust_remote_code: bool = flag(False, TRUST_HELP)
    skip_bad_records: bool = flag(
        False, "drop and count records that cannot be read, instead of stopping at the first"
    )

    def __post_init__(self) -> None:
        require_positive(self, "batch_size")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"--eval_fraction {self.eval_fraction}: expected at least 0 and below 1")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("this program is one process; start it with python, without a launcher")


@dataclass(kw_only=True)
class CurveFlags:
    """The best-of-n curve in the report on a reward model."""

    judge: str | None = flag(
        None, "toy, function:FILE.py:NAME, api:URL or full:PATH: judges a policy's answers for a best-of-n curve"
    )
    judge_samples: int = flag(8, "answers to a prompt for that curve")
    judge_max_new_tokens: int = flag(128, "tokens of such an answer at most")

    def __post_init__(self) -> None:
        require_positive(self, "judge_samples", "judge_max_new_tokens")
        if not self.judge and (self.judge_samples, self.judge_max_new_tokens) != (8, 128):
            raise UserError("--judge_samples and --judge_max_new_tokens need --judge")


_HYBRID = "the rollout runs on the training weights; drop the flag"
_TENSORBOARD = "tensorboard files are always written to <output_dir>/tensorboard; drop the flag"
_END = "every answer ends with the tokenizer's end token in all stages; drop the flag"

# DeepSpeed-Chat's flags that have no meaning here, and what to do instead.
REMOVED = {
    "num_padding_at_beginning": "masks come from lengths, for every model family; drop the flag",
    "enable_hybrid_engine": _HYBRID,
    "inference_tp_size": _HYBRID,
    "tp_gather_partition_size": _HYBRID,
    "release_inference_cache": _HYBRID,
    "unpin_actor_parameters": _HYBRID,
    "enable_tensorboard": _TENSORBOARD,
    "tensorboard_path": _TENSORBOARD,
    "add_eot_token": _END,
    "eot_token": _END,
    "compute_fp32_loss": "losses are always computed in float32; drop the flag",
    "print_loss": "the progress bar shows the loss and metrics.jsonl keeps it; drop the flag",
    "print_answers": "samples are printed and kept in samples.jsonl at every evaluation; use --eval_interval",
    "print_answers_interval": "use --eval_interval",
    "align_overflow": "losses are checked before either model steps; drop the flag",
    "enable_test_mode": "use --max_steps",
    "test_stop_step": "use --max_steps",
    "sft_only_data_path": "give it to step 1 as --data_path with --data_split 1,0,0",
    "eval_iters": "evaluation covers the whole held-out set; bound it with --max_eval_samples",
    "actor_dropout": "dropout is off in step 3, where it would make every log-probability random; drop the flag",
    "critic_dropout": "dropout is off in step 3, where it would make every value random; drop the flag",
    "preprocessing_num_workers": "use --num_workers",
    "unsupervised_dataset_name": "use --ptx_data_path, in any of the shapes of --data_path",
    "unsupervised_dataset_config_name": "use --ptx_data_path, in any of the shapes of --data_path",
    "reload": "the cache is keyed by content and is never stale; drop the flag",
}
