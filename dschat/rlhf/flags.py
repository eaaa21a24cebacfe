"""The flags of step 3, in the groups of docs/ppo.md, and the specs that the functions below the program take."""

from dataclasses import dataclass, replace
from typing import Any

from dschat.config import flag, require_not_negative, require_positive
from dschat.data.specs import DataSpec, parse_source
from dschat.engine.specs import TrainSpec
from dschat.engine.workload import Changes, Workload
from dschat.errors import UserError
from dschat.flag_checks import check_offload, check_quantized
from dschat.flags import DataFlags, MicroBatchFlags, RunFlags
from dschat.rlhf.model_flags import AdapterFlags, OptimizerFlags
from dschat.rlhf.monitor_flags import MonitorFlags
from dschat.rlhf.reward_specs import TOY, parse_reward
from dschat.rlhf.specs import (
    ESTIMATORS,
    FORWARD,
    GAE,
    KL_KINDS,
    ROLLOUT_ENGINES,
    SAMPLER,
    SLOTS,
    ModelsSpec,
    Shaping,
    UpdateSpec,
)
from dschat.rlhf.workload import RolloutSizes, ppo_workload


@dataclass(kw_only=True)
class RolloutFlags:
    """Sampling."""

    per_device_generation_batch_size: int = flag(16, "prompts per rank sampled at once")
    generation_batches: int = flag(1, "generation batches per rollout")
    num_samples_per_prompt: int = flag(1, "answers to each prompt of a rollout; the prompt is computed once for all")
    max_prompt_seq_len: int = flag(256, "tokens of a prompt; longer ones lose their earliest turns")
    max_answer_seq_len: int = flag(256, "tokens of an answer")
    temperature: float = flag(1.0, "of sampling, and of every log-probability")
    top_k: int = flag(0, "must stay 0: the scored distribution would not be the sampled one")
    top_p: float = flag(1.0, "must stay 1: the scored distribution would not be the sampled one")
    rollout_engine: str = flag(
        SLOTS, "slots: a preallocated cache whose places are refilled; hf: a plain loop", choices=ROLLOUT_ENGINES
    )

    def __post_init__(self) -> None:
        require_positive(self, "per_device_generation_batch_size", "generation_batches", "num_samples_per_prompt")
        require_positive(self, "max_prompt_seq_len", "max_answer_seq_len", "temperature")
        if self.top_k != 0 or self.top_p != 1:
            raise UserError(
                "--top_k and --top_p must stay off in PPO: log-probabilities are of the whole distribution"
            )


@dataclass(kw_only=True)
class RewardFlags:
    """Where scores come from, and what is done to them."""

    reward: list[str] = flag(
        [],
        "full:PATH, lora:PATH, api:URL or function:FILE.py:NAME, each with an optional weight as in 0.5*full:PATH; "
        "summed; default: full:CRITIC_MODEL_NAME_OR_PATH, with share_trunk lora:",
    )
    reward_api_timeout: float = flag(60.0, "seconds that one request to an api reward may take")
    reward_api_retries: int = flag(5, "tries after a failed request to an api reward, with growing pauses")
    normalize_reward: bool = flag(True, "a model's scores to mean 0 and std 1 by the statistics of step 2")
    allow_weak_reward_model: bool = flag(False, "use a reward model that its own quality report calls weak")
    clip_reward_value: float = flag(5.0, "scores are clipped to ± this after normalisation; 0: never")
    missing_eos: str = flag(
        "subtract",
        "an answer cut off at max_answer_seq_len: subtract the penalty from its score, replace the score by minus the "
        "penalty, or bootstrap: no score but the critic's value of what would have followed",
        choices=("subtract", "replace", "bootstrap"),
    )
    missing_eos_penalty: float = flag(1.0, "in units of score")

    def __post_init__(self) -> None:
        require_positive(self, "reward_api_timeout")
        require_not_negative(self, "reward_api_retries", "clip_reward_value", "missing_eos_penalty")


@dataclass(kw_only=True)
class KLFlags:
    """The tie to the reference."""

    kl_coef: float = flag(0.05, "weight of the KL penalty, in units of score per nat")
    kl_penalty: str = flag(
        "kl", "per token: " + ", ".join(KL_KINDS) + " (exact, over the vocabulary)", choices=KL_KINDS
    )
    kl_in: str = flag(
        "reward", "subtract the penalty from each token's reward, or add it to the loss", choices=("reward", "loss")
    )
    kl_target: float = flag(0.0, "nats per sequence that an adaptive kl_coef steers to; 0: kl_coef stays fixed")
    kl_horizon: int = flag(10_000, "sequences over which the adaptive kl_coef reacts")

    def __post_init__(self) -> None:
        require_not_negative(self, "kl_coef", "kl_target")
        require_positive(self, "kl_horizon")
        if self.kl_in == "loss" and self.kl_penalty == "kl":
            raise UserError(
                "--kl_penalty kl as a loss does nothing: its expected gradient is 0; use --kl_penalty mse, k3 or "
                "full, or --kl_in reward"
            )
        if self.kl_target and not self.kl_coef:
            raise UserError("--kl_target needs a --kl_coef above 0 to start from")


@dataclass(kw_only=True)
class AdvantageFlags:
    """From rewards to advantages."""

    advantage_estimator: str = flag(
        GAE, "gae needs a critic; rloo, grpo and reinforce_pp have none", choices=ESTIMATORS
    )
    gamma: float = flag(1.0, "discount, of gae and reinforce_pp")
    lam: float = flag(0.95, "lambda of gae")
    whiten_rewards: bool = flag(False, "rewards to std 1 over the whole rollout, mean kept")
    whiten_advantages: bool | None = flag(
        None, "advantages to mean 0 and std 1 over the whole rollout; default: with gae and reinforce_pp"
    )

    def __post_init__(self) -> None:
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise UserError("--gamma and --lam: expected numbers from 0 to 1")


@dataclass(kw_only=True)
class UpdateFlags(MicroBatchFlags):
    """Optimizer steps on a rollout."""

    ROWS = "per_device_training_batch_size"
    per_device_training_batch_size: int = flag(16, "answers per rank and micro-batch of training and scoring")
    gradient_accumulation_steps: int = flag(1, "micro-batches per minibatch, that is per optimizer step")
    max_tokens_per_batch: int = flag(
        0, "tokens of a micro-batch of training and scoring at most, with padding; 0: no limit but that of answers"
    )
    old_logprobs: str = flag(
        FORWARD,
        "what the policy ratio starts from: a forward of the actor, or the sampler's own, which saves that forward",
        choices=(FORWARD, SAMPLER),
    )
    ppo_epochs: int = flag(1, "passes over a rollout, each in a fresh order")
    cliprange: float = flag(0.2, "the policy ratio is clipped to 1 ± this")
    dual_clip: float = flag(0.0, "bound of the ratio where the advantage is negative, above 1; 0: none")
    cliprange_value: float = flag(0.2, "values are clipped to the old ones ± this")
    vf_coef: float = flag(1.0, "factor of the value loss; Adam undoes it but for the clipping of the gradient")
    entropy_coef: float = flag(0.0, "weight of the entropy bonus, per nat")
    max_approx_kl: float = flag(
        0.0, "end an update before a step whose KL to the sampler, per token, is above; 0: never"
    )
    max_ratio: float = flag(0.0, "end an update before a step whose largest policy ratio is above; 0: never")
    critic_warmup_rollouts: int = flag(0, "rollouts at the start that train the critic alone")

    def __post_init__(self) -> None:
        require_positive(self, "per_device_training_batch_size", "gradient_accumulation_steps", "ppo_epochs")
        require_positive(self, "cliprange", "cliprange_value", "vf_coef")
        require_not_negative(self, "dual_clip", "entropy_coef", "max_approx_kl", "max_ratio", "critic_warmup_rollouts")
        require_not_negative(self, "max_tokens_per_batch")
        for name in ("dual_clip", "max_ratio"):
            if 0 < getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected a ratio above 1, or 0 for none")


@dataclass(kw_only=True)
class CompanionFlags:
    """Beside the algorithm."""

    ptx_data_path: list[str] = flag([], "demonstrations, as step 1 reads them, whose loss is mixed in (PPO-ptx)")
    unsup_coef: float = flag(27.8, "weight of that loss (InstructGPT's gamma); without effect without ptx_data_path")
    enable_ema: bool = flag(False, "keep a moving average of the actor in float32 and save it as actor_ema")
    ema_decay: float = flag(0.992, "of that average, per optimizer step")
    best_metric: str = flag(
        "none",
        "keep the actor that is best on held-out prompts as best/: by score, by objective (score minus kl_coef times "
        "KL) or by the judge; measured every eval_interval",
        choices=("none", "score", "objective", "judge"),
    )
    early_stopping_patience: int = flag(0, "stop after so many evaluations without a better best_metric; 0: never")
    best_of_n: int = flag(0, "also score the best of so many samples of the untrained policy per held-out prompt")
    self_check: bool = flag(
        True, "prove on the first rollout that ratio, KL, rewards and padding are exact; stop if not"
    )
    explain: int = flag(
        0, "write so many answers of the first rollout token by token, each number checked, as explain/"
    )

    def __post_init__(self) -> None:
        require_not_negative(self, "unsup_coef", "early_stopping_patience", "best_of_n", "explain")
        if not 0 < self.ema_decay < 1:
            raise UserError(f"--ema_decay {self.ema_decay}: expected a number between 0 and 1")
        if self.early_stopping_patience and self.best_metric == "none":
            raise UserError("--early_stopping_patience needs --best_metric score, objective or judge")


GROUPS = (
    *(RolloutFlags, RewardFlags, KLFlags, AdvantageFlags, UpdateFlags, OptimizerFlags, AdapterFlags, CompanionFlags),
    MonitorFlags,
)


@dataclass(kw_only=True)
class PPOFlags(
    RunFlags,
    DataFlags,
    RolloutFlags,
    RewardFlags,
    KLFlags,
    AdvantageFlags,
    UpdateFlags,
    OptimizerFlags,
    AdapterFlags,
    CompanionFlags,
    MonitorFlags,
):
    actor_model_name_or_path: str = flag(help="the policy to train: the output of step 1")
    critic_model_name_or_path: str | None = flag(
        None, "what the critic starts from; default: the first full or lora reward, else the actor with a new head"
    )
    max_eval_samples: int = flag(512, "evaluate on the first so many held-out prompts; 0: all")
    checkpoint_interval: int = flag(50, "save the whole run every so many rollouts; 0: only when a signal stops it")

    def __post_init__(self) -> None:
        for group in (RunFlags, DataFlags, *GROUPS):
            group.__post_init__(self)
        if not self.reward and self.critic_model_name_or_path is None:
            raise UserError("no reward: give --critic_model_name_or_path (the output of step 2) or --reward")
        kinds = [parse_reward(text).kind for text in self.rewards]  # refuses what is no source before loading
        self._check_models({*kinds})
        if self.advantage_estimator in ("rloo", "grpo") and self.num_samples_per_prompt < 2:
            raise UserError(
                f"--advantage_estimator {self.advantage_estimator} compares the answers to one prompt; give "
                "--num_samples_per_prompt 2 or more"
            )
        if self.advantage_estimator != GAE and (self.critic_warmup_rollouts or self.missing_eos == "bootstrap"):
            given = "--critic_warmup_rollouts" if self.critic_warmup_rollouts else "--missing_eos bootstrap"
            raise UserError(f"{given} needs a critic; use --advantage_estimator gae")
        if self.old_logprobs == SAMPLER and self.kl_penalty == "full":
            raise UserError("--old_logprobs sampler knows no whole distribution, as --kl_penalty full needs it")
        if self.best_metric != "none" and not self.eval_interval:
            raise UserError("--best_metric is measured at evaluations; give --eval_interval")
        for name, needs in (
            ("best_metric judge", self.best_metric == "judge"),
            ("stop_on_overoptimisation", self.stop_on_overoptimisation),
        ):
            if needs and not self.judged_by:
                raise UserError(f"--{name} needs --judge, an independent reward to go by")
        if self.stop_on_overoptimisation and not self.eval_interval:
            raise UserError("--stop_on_overoptimisation looks at evaluations; give --eval_interval")
        if self.stop_on_overoptimisation and self.best_metric not in ("none", "judge"):
            raise UserError(
                f"--stop_on_overoptimisation goes back to the best by the judge, not by {self.best_metric}; drop "
                "--best_metric"
            )

    def _check_models(self, reward_kinds: set[str]) -> None:
        """Refuse flags of models that exclude each other or have no effect."""
        has_critic, stages = self.advantage_estimator == GAE, (self.actor_zero_stage, self.critic_zero_stage)
        check_offload("--offload", self.offload, "--actor_zero_stage", stages[0])
        if has_critic:
            check_offload("--offload", self.offload, "--critic_zero_stage", stages[1])
        elif self.critic_lora_dim:
            raise UserError("--critic_lora_dim needs a critic; use --advantage_estimator gae")
        if self.offload_reward_model and "full" not in reward_kinds:
            raise UserError("--offload_reward_model has no effect: no reward is a full model; drop it")
        if self.actor_lora_dim and self.only_optimize_lora:
            if self.offload_reference_model:
                raise UserError("--offload_reference_model: under LoRA the reference has no weights; use --offload")
            if self.reference_zero_stage not in (None, self.actor_zero_stage):
                raise UserError("--reference_zero_stage: under LoRA the reference is the actor's weights; drop it")
        check_quantized(self, "actor_zero_stage")
        if not self.share_trunk:
            return
        if "full" in reward_kinds:
            raise UserError(
                "--share_trunk: a full reward has a trunk of its own; train an adapter on the actor by step 2 with "
                "--lora_dim and give it as lora:PATH"
            )
        if not self.actor_lora_dim or not self.only_optimize_lora or (has_critic and not self.critic_lora_dim):
            given = "--critic_lora_dim" if self.actor_lora_dim and self.only_optimize_lora else "--actor_lora_dim"
            raise UserError(f"--share_trunk: all that is trained must be adapters on the trunk; give {given}")
        if has_critic and (stages[0] == 3) != (stages[1] == 3):
            raise UserError(
                "--share_trunk: one copy of the weights is sharded or is not; give both ZeRO 3, or neither"
            )

    @property
    def rewards(self) -> list[str]:
        return self.reward or [f"{'lora' if self.share_trunk else 'full'}:{self.critic_model_name_or_path}"]

    @property
    def is_toy(self) -> bool:
        """Whether every prompt of an evaluation is one of the embedded task, which has a judge and preferences."""
        return all(parse_source(path)[0] == TOY for path in self.eval_data_path or self.data_path)

    @property
    def judged_by(self) -> str | None:
        return self.judge or (TOY if self.is_toy else None)

    @property
    def preferences_from(self) -> list[str]:
        return self.preference_data_path or ([TOY] if self.is_toy else [])

    @property
    def keeps_best_by(self) -> str:
        return "judge" if self.stop_on_overoptimisation else self.best_metric

    @property
    def whitens_advantages(self) -> bool:
        by_default = self.advantage_estimator in (GAE, "reinforce_pp")
        return by_default if self.whiten_advantages is None else self.whiten_advantages

    def models_spec(self, num_rollouts: int, steps_per_rollout: int) -> ModelsSpec:
        actor_steps = max(1, num_rollouts - self.critic_warmup_rollouts) * steps_per_rollout
        has_critic = self.advantage_estimator == GAE
        return ModelsSpec(
            actor_path=self.actor_model_name_or_path,
            critic_path=self.critic_model_name_or_path,
            rewards=tuple(parse_reward(text) for text in self.rewards),
            actor=self.train_spec("actor", actor_steps),
            critic=self.train_spec("critic", num_rollouts * steps_per_rollout) if has_critic else None,
            reference_stage=self.reference_stage,
            reward_stage=self.reward_stage,
            offload_reference=self.offload_reference_model,
            offload_reward=self.offload_reward_model,
            actor_lora=self.lora_spec("actor"),
            critic_lora=self.lora_spec("critic"),
            share_trunk=self.share_trunk,
            save_merged=self.lora_save_merged,
            quantization=self.quantization,
            normalize_reward=self.normalize_reward,
            use_liger_kernel=self.use_liger_kernel,
            upcast_layernorm=self.upcast_layernorm,
            ema_decay=self.ema_decay if self.enable_ema else None,
            micro_batch_size=self.per_device_training_batch_size,
            api_timeout=self.reward_api_timeout,
            api_retries=self.reward_api_retries,
        )

    def train_spec(self, role: str, num_steps: int) -> TrainSpec:
        """Of the "actor" or the "critic"."""
        own = ("learning_rate", "weight_decay", "zero_stage", "gradient_checkpointing", "lora_learning_rate")
        return TrainSpec(
            **{name: getattr(self, f"{role}_{name}") for name in own},
            lr_scheduler_type=self.lr_scheduler_type,
            num_warmup_steps=self.num_warmup_steps,
            num_steps=num_steps,
            max_grad_norm=self.max_grad_norm,
            offload=self.offload,
        )

    def shaping(self) -> Shaping:
        return Shaping(
            estimator=self.advantage_estimator,
            group_size=self.num_samples_per_prompt,
            kl_in_reward=self.kl_in == "reward",
            gamma=self.gamma,
            lam=self.lam,
            clip_reward_value=self.clip_reward_value,
            missing_eos=self.missing_eos,
            missing_eos_penalty=self.missing_eos_penalty,
            whiten_rewards=self.whiten_rewards,
            whiten_advantages=self.whitens_advantages,
        )

    def update_spec(self, world_size: int) -> UpdateSpec:
        return UpdateSpec(
            ppo_epochs=self.ppo_epochs,
            minibatch_size=self.per_device_training_batch_size * self.gradient_accumulation_steps * world_size,
            micro_batch_size=self.per_device_training_batch_size,
            cliprange=self.cliprange,
            dual_clip=self.dual_clip or None,
            cliprange_value=self.cliprange_value,
            vf_coef=self.vf_coef,
            entropy_coef=self.entropy_coef,
            kl_loss=self.kl_penalty if self.kl_in == "loss" else None,
            unsup_coef=self.unsup_coef if self.ptx_data_path else 0.0,
            max_approx_kl=self.max_approx_kl,
            max_ratio=self.max_ratio,
            max_tokens=self.max_tokens_per_batch,
        )

    def workload(self) -> Workload:
        sizes = RolloutSizes(
            num_prompts=self.per_device_generation_batch_size,
            num_samples=self.num_samples_per_prompt,
            micro_batch=self.per_device_training_batch_size,
            accumulates=self.gradient_accumulation_steps > 1,
            prompt_size=self.max_prompt_seq_len,
            answer_size=self.max_answer_seq_len,
            max_tokens=self.max_tokens_per_batch,
            rollout_engine=self.rollout_engine,
            old_logprobs=self.old_logprobs,
        )
        checkpoints = self.keep_checkpoints if self.checkpoint_interval else 0
        return ppo_workload(self.models_spec(1, 1), sizes, self.dtype, checkpoints)

    def plan_hints(self) -> tuple[dict[str, int], list[Changes]]:
        rows = self.per_device_training_batch_size * self.gradient_accumulation_steps
        prompts = self.per_device_generation_batch_size * self.generation_batches
        adapters = {"actor_lora_dim": self.actor_lora_dim or 64, "critic_lora_dim": self.critic_lora_dim or 64}
        sharded = {"actor_zero_stage": 3, "critic_zero_stage": 3}
        stages = {"actor_zero_stage": self.actor_zero_stage or 1, "critic_zero_stage": self.critic_zero_stage or 1}
        changes: list[Changes] = [
            {"actor_gradient_checkpointing": True, "critic_gradient_checkpointing": True},
            {"per_device_training_batch_size": 1, "gradient_accumulation_steps": rows},
            {"per_device_generation_batch_size": 1, "generation_batches": prompts},
            {"max_answer_seq_len": self.max_answer_seq_len // 2},
            sharded,
            {"reference_zero_stage": 3, "reward_zero_stage": 3},
            stages | {"offload": True},
            sharded | {"offload": True},
            adapters,
            {"dtype": "bf16"},
        ]
        return {"per_device_training_batch_size": 1, "per_device_generation_batch_size": 1}, changes

    def inputs(self) -> dict[str, str]:
        found = {"actor_model_name_or_path": self.actor_model_name_or_path}
        if self.critic_model_name_or_path is not None:
            found["critic_model_name_or_path"] = self.critic_model_name_or_path
        for text in self.reward:
            reward = parse_reward(text)
            place = reward.target.rpartition(":")[0] if reward.kind == "function" else reward.target
            found[f"reward {text}"] = place
        if judge_place := self.judge_place():
            found["judge"] = judge_place
        return found

    def step_sizes(self, num_ranks: int) -> dict[str, int]:
        prompts = self.per_device_generation_batch_size * self.generation_batches * num_ranks
        minibatch = self.update_spec(num_ranks).minibatch_size
        return {"prompts of a rollout, of all ranks,": prompts, "answers of an optimizer step": minibatch}

    def pairs_shape(self) -> dict[str, Any]:
        """Of `dschat.rlhf.monitor.load_pairs`."""
        source = {"eval_fraction": self.eval_fraction, "seed": self.seed, "skip_bad_records": self.skip_bad_records}
        return {
            "max_len": self.max_prompt_seq_len + self.max_answer_seq_len,
            "max_pairs": self.max_preference_pairs,
            "batch_size": self.per_device_training_batch_size,
            "source": source | {"cache_dir": self.data_spec(self.seed).cache_dir},
        }

    def ptx_spec(self) -> DataSpec:
        """The demonstrations as step 1 would train on all of them, less what it holds out."""
        return replace(
            self.data_spec(self.seed),
            data_path=tuple(self.ptx_data_path),
            eval_data_path=(),
            data_split="1,0,0",
            max_eval_samples=0,
        )
