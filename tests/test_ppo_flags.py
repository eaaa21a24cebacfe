"""Every flag of step 3 arrives in the specs that the functions below the program take; bad ones are refused."""

import dataclasses

from dschat.errors import UserError
from dschat.rlhf.flags import PPOFlags
from dschat.rlhf.model_flags import frozen_stage

import pytest

BASE = {
    "output_dir": "out",
    "data_path": ["toy"],
    "actor_model_name_or_path": "actor",
    "critic_model_name_or_path": "critic",
}


def lora_of(role: str) -> dict:
    given = {"alpha": 3, "module_name": "q_proj", "learning_rate": 1e-3}
    found = {f"{role}_lora_{name}": (value, {f"{role}_lora_dim": 4}) for name, value in given.items()}
    return found | {f"{role}_lora_dim": (4, {})}


# flag -> another value and, if it needs them, the flags beside it
OTHERS = {
    "actor_model_name_or_path": ("other", {}),
    "critic_model_name_or_path": ("other", {"reward": ["full:x"]}),
    "reward": (["0.5*full:x"], {}),
    "reward_api_timeout": (1.5, {}),
    "reward_api_retries": (2, {}),
    "normalize_reward": (False, {}),
    "clip_reward_value": (2.0, {}),
    "missing_eos": ("bootstrap", {}),
    "missing_eos_penalty": (0.25, {}),
    "num_samples_per_prompt": (3, {}),
    "kl_penalty": ("k3", {"kl_in": "loss", "kl_penalty": "mse"}),
    "kl_in": ("loss", {"kl_penalty": "k3"}),
    "advantage_estimator": ("reinforce_pp", {}),
    "gamma": (0.5, {}),
    "lam": (0.5, {}),
    "whiten_rewards": (True, {}),
    "whiten_advantages": (False, {}),
    "per_device_training_batch_size": (2, {}),
    "gradient_accumulation_steps": (2, {}),
    "max_tokens_per_batch": (512, {}),
    "ppo_epochs": (3, {}),
    "cliprange": (0.1, {}),
    "cliprange_value": (0.1, {}),
    "dual_clip": (3.0, {}),
    "vf_coef": (0.5, {}),
    "entropy_coef": (0.01, {}),
    "max_approx_kl": (0.1, {}),
    "max_ratio": (3.0, {}),
    "critic_warmup_rollouts": (2, {}),
    "actor_learning_rate": (1e-3, {}),
    "critic_learning_rate": (1e-3, {}),
    "actor_weight_decay": (0.1, {}),
    "critic_weight_decay": (0.1, {}),
    "lr_scheduler_type": ("constant", {}),
    "num_warmup_steps": (3, {}),
    "max_grad_norm": (0.5, {}),
    "actor_gradient_checkpointing": (True, {}),
    "critic_gradient_checkpointing": (True, {}),
    "use_liger_kernel": (True, {}),
    "upcast_layernorm": (True, {}),
    "actor_zero_stage": (2, {}),
    "critic_zero_stage": (2, {}),
    "reference_zero_stage": (3, {}),
    "reward_zero_stage": (3, {}),
    "offload": (True, {"actor_zero_stage": 2, "critic_zero_stage": 2}),
    "offload_reference_model": (True, {"reference_zero_stage": 3}),
    "offload_reward_model": (True, {"reward_zero_stage": 3}),
    **{name: value for role in ("actor", "critic") for name, value in lora_of(role).items()},
    "only_optimize_lora": (False, {"actor_lora_dim": 4, "lora_save_merged": True}),
    "lora_save_merged": (True, {"actor_lora_dim": 4}),
    "share_trunk": (True, {"actor_lora_dim": 4, "critic_lora_dim": 4, "reward": ["lora:x"]}),
    "load_in_4bit": (True, {"actor_lora_dim": 4}),
    "load_in_8bit": (True, {"actor_lora_dim": 4}),
    "unsup_coef": (1.0, {"ptx_data_path": ["toy"]}),
    "ptx_data_path": (["toy"], {}),
    "enable_ema": (True, {}),
    "ema_decay": (0.5, {"enable_ema": True}),
    "data_path": (["a.jsonl"], {}),
    "data_split": ("1,1,1", {}),
    "eval_data_path": (["b.jsonl"], {}),
    "eval_fraction": (0.2, {}),
    "max_eval_samples": (3, {}),
    "skip_bad_records": (True, {}),
    "data_output_path": ("elsewhere", {}),
    "num_workers": (2, {}),
    "seed": (5, {}),
}
# Read by the program itself: tests/test_ppo_programs.py, test_programs.py and test_reward_program.py run them.
BY_THE_PROGRAM = {
    *("output_dir", "dtype", "max_steps", "num_train_epochs", "eval_interval", "log_interval", "chat_template"),
    *("show_batch", "per_device_generation_batch_size", "generation_batches", "max_prompt_seq_len"),
    *("max_answer_seq_len", "temperature", "kl_coef", "kl_target", "kl_horizon", "best_metric"),
    *("early_stopping_patience", "best_of_n", "self_check", "explain", "allow_weak_reward_model"),
    *("rollout_engine", "old_logprobs", "trust_remote_code", "stall_timeout"),
    *("checkpoint_interval", "keep_checkpoints", "resume", "fresh", "dry_run", "calibrate", "plan_for"),
    *("preflight", "preflight_prompts", "preflight_samples", "judge", "preference_data_path"),
    *("max_preference_pairs", "stop_on_overoptimisation", "report_to"),
    *("dry_run", "plan_for", "calibrate"),
}
REFUSED = {"top_k", "top_p"}  # any other value than off ends the program


def flags(**changes) -> PPOFlags:
    return PPOFlags(**(BASE | changes))


def specs(config: PPOFlags) -> list:
    return [
        config.models_spec(10, 4),
        config.shaping(),
        config.update_spec(2),
        config.data_spec(config.seed),
        config.ptx_spec(),
    ]


def test_every_flag_is_here():
    names = {field.name for field in dataclasses.fields(PPOFlags)}
    assert len(OTHERS) + len(BY_THE_PROGRAM) + len(REFUSED) == len(names)
    assert {*OTHERS, *BY_THE_PROGRAM, *REFUSED} == names


@pytest.mark.parametrize("name", OTHERS)
def test_a_flag_changes_a_spec(name):
    value, beside = OTHERS[name]
    before, after = flags(**beside), flags(**(beside | {name: value}))
    assert getattr(before, name) != value
    assert specs(before) != specs(after)


def test_the_fields_of_the_specs_by_name():
    """What arrives is the value of the flag of that name, not of another one."""
    given = {
        name: value
        for name, (value, _) in OTHERS.items()
        if name not in ("advantage_estimator", "kl_penalty", "kl_in", "share_trunk", "load_in_4bit", "load_in_8bit")
        and not name.startswith("offload_reference")
    }
    given["reference_zero_stage"] = 2  # under LoRA it is the actor's
    config = flags(**given, kl_in="loss", kl_penalty="k3")
    models, shaping, update, data, ptx = specs(config)
    for spec in (shaping, update, data, models):
        for field in dataclasses.fields(spec):
            if field.name in given and not isinstance(given[field.name], list):
                assert getattr(spec, field.name) == given[field.name], field.name
    assert (shaping.estimator, shaping.group_size, shaping.kl_in_reward) == ("gae", 3, False)
    assert (update.minibatch_size, update.micro_batch_size, update.kl_loss) == (2 * 2 * 2, 2, "k3")
    assert update.unsup_coef == 1.0 and flags(unsup_coef=1.0).update_spec(1).unsup_coef == 0.0
    assert (models.actor_path, models.critic_path) == ("other", "other")
    assert [(r.kind, r.target, r.weight) for r in models.rewards] == [("full", "x", 0.5)]
    assert (models.api_timeout, models.api_retries, models.ema_decay) == (1.5, 2, 0.5)
    assert (models.reference_stage, models.reward_stage, models.micro_batch_size) == (2, 3, 2)
    assert models.offload_reward and models.save_merged
    for lora in (models.actor_lora, models.critic_lora):
        assert (lora.dim, lora.alpha, lora.module_name, lora.only) == (4, 3, "q_proj", False)
    for spec, model in ((models.actor, "actor"), (models.critic, "critic")):
        assert spec.learning_rate == 1e-3 and spec.weight_decay == 0.1 and spec.zero_stage == 2, model
        assert spec.lora_learning_rate == 1e-3 and spec.offload, model
        assert spec.max_grad_norm == 0.5 and spec.gradient_checkpointing and spec.num_warmup_steps == 3, model
    assert ptx.data_path == ("toy",) and ptx.data_split == "1,0,0" and ptx.seed == 5


@pytest.mark.parametrize(("name", "model"), [("actor", "critic"), ("critic", "actor")])
def test_a_flag_of_one_model_is_not_one_of_the_other(name, model):
    for flag, value in (("learning_rate", 1e-3), ("weight_decay", 0.1), ("zero_stage", 2)):
        spec, other = (getattr(flags(**{f"{name}_{flag}": value}).models_spec(9, 2), m) for m in (name, model))
        assert getattr(spec, flag) == value != getattr(other, flag)


def test_schedules_count_the_steps_that_are_made():
    """The actor's end with its last step, also when the critic had rollouts to itself before."""
    models = flags(critic_warmup_rollouts=3).models_spec(10, 4)
    assert (models.actor.num_steps, models.critic.num_steps) == (7 * 4, 10 * 4)
    assert flags(critic_warmup_rollouts=30).models_spec(10, 4).actor.num_steps > 0


def test_defaults_that_depend_on_other_flags():
    assert flags().models_spec(1, 1).rewards[0].target == "critic"
    both = flags(reward=["full:x", "api:http://y"])
    assert [r.target for r in both.models_spec(1, 1).rewards] == ["x", "http://y"]
    for estimator, whitens in (("gae", True), ("reinforce_pp", True), ("rloo", False), ("grpo", False)):
        config = flags(advantage_estimator=estimator, num_samples_per_prompt=2)
        assert config.shaping().whiten_advantages == whitens
        assert (config.models_spec(1, 1).critic is None) == (estimator != "gae")
        opposite = flags(advantage_estimator=estimator, num_samples_per_prompt=2, whiten_advantages=not whitens)
        assert opposite.shaping().whiten_advantages != whitens
    assert flags().models_spec(1, 1).ema_decay is None and flags().update_spec(1).dual_clip is None
    assert [frozen_stage(None, stage, False) for stage in (0, 1, 2, 3)] == [0, 0, 0, 3]
    assert frozen_stage(0, 3, False) == 0 and frozen_stage(None, 0, True) == 3
    shared = flags(share_trunk=True, actor_lora_dim=4, critic_lora_dim=4).models_spec(1, 1)
    assert [(r.kind, r.target) for r in shared.rewards] == [("lora", "critic")] and shared.share_trunk
    assert [flags(actor_lora_dim=4, **{f"load_in_{bits}": True}).quantization for bits in ("4bit", "8bit")] == [
        "4bit",
        "8bit",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"top_k": 5}, "--top_k and --top_p must stay off"),
        ({"top_p": 0.9}, "--top_k and --top_p must stay off"),
        ({"critic_model_name_or_path": None}, "no reward: give --critic_model_name_or_path"),
        ({"advantage_estimator": "rloo"}, "--num_samples_per_prompt 2 or more"),
        ({"advantage_estimator": "grpo"}, "--num_samples_per_prompt 2 or more"),
        ({"advantage_estimator": "reinforce_pp", "critic_warmup_rollouts": 1}, "needs a critic"),
        ({"advantage_estimator": "reinforce_pp", "missing_eos": "bootstrap"}, "needs a critic"),
        ({"kl_in": "loss"}, "--kl_penalty kl as a loss"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "--kl_target needs a --kl_coef"),
        ({"dual_clip": 0.5}, "--dual_clip 0.5: expected a ratio above 1"),
        ({"max_ratio": 1.0}, "--max_ratio 1.0: expected a ratio above 1"),
        ({"ema_decay": 1.0}, "--ema_decay 1.0"),
        ({"gamma": 1.5}, "--gamma and --lam"),
        ({"lam": -0.1}, "--gamma and --lam"),
        ({"best_metric": "score"}, "give --eval_interval"),
        ({"early_stopping_patience": 2}, "needs --best_metric"),
        ({"ppo_epochs": 0}, "--ppo_epochs 0"),
        ({"num_samples_per_prompt": 0}, "--num_samples_per_prompt 0"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"missing_eos_penalty": -1.0}, "--missing_eos_penalty -1.0"),
        ({"eval_fraction": 1.5}, "--eval_fraction 1.5"),
        ({"offload": True}, "give --actor_zero_stage 1, 2 or 3"),
        ({"offload": True, "actor_zero_stage": 1}, "give --critic_zero_stage 1, 2 or 3"),
        ({"offload_reference_model": True, "reference_zero_stage": 0}, "at ZeRO 3 only; drop --reference_zero_stage"),
        ({"offload_reward_model": True, "reward": ["api:http://y"]}, "no reward is a full model"),
        ({"offload_reference_model": True, "actor_lora_dim": 4}, "the reference has no weights; use --offload"),
        ({"reference_zero_stage": 3, "actor_lora_dim": 4}, "is the actor's weights; drop it"),
        ({"actor_lora_alpha": 8}, "without --actor_lora_dim above 0"),
        ({"critic_lora_learning_rate": 1e-3}, "without --critic_lora_dim above 0"),
        ({"critic_lora_dim": 4, "advantage_estimator": "reinforce_pp"}, "--critic_lora_dim needs a critic"),
        ({"lora_save_merged": True}, "without --actor_lora_dim or --critic_lora_dim above 0"),
        ({"load_in_4bit": True, "critic_lora_dim": 4}, "without --actor_lora_dim above 0"),
        ({"load_in_4bit": True, "load_in_8bit": True, "actor_lora_dim": 4}, "exclude each other"),
        ({"load_in_4bit": True, "lora_save_merged": True, "actor_lora_dim": 4}, "would write rounded weights"),
        ({"load_in_4bit": True, "actor_zero_stage": 3, "actor_lora_dim": 4}, "lower --actor_zero_stage"),
        ({"only_optimize_lora": False, "actor_lora_dim": 4}, "add --lora_save_merged"),
        ({"share_trunk": True}, "give --actor_lora_dim"),
        ({"share_trunk": True, "actor_lora_dim": 4}, "give --critic_lora_dim"),
        ({"share_trunk": True, "actor_lora_dim": 4, "reward": ["full:x"]}, "a full reward has a trunk of its own"),
        (
            {"share_trunk": True, "actor_lora_dim": 4, "critic_lora_dim": 4, "critic_zero_stage": 3},
            "give both ZeRO 3, or neither",
        ),
        ({"log_interval": 0}, "--log_interval 0"),
        ({"preflight_samples": 1}, "--preflight_samples 1: expected 2 or more"),
        ({"judge": "nothing:here"}, "is no reward source"),
        ({"data_path": ["a.jsonl"], "stop_on_overoptimisation": True, "eval_interval": 1}, "needs --judge"),
        ({"data_path": ["a.jsonl"], "best_metric": "judge", "eval_interval": 1}, "--best_metric judge needs --judge"),
        ({"stop_on_overoptimisation": True}, "give --eval_interval"),
        ({"stop_on_overoptimisation": True, "eval_interval": 1, "best_metric": "score"}, "drop --best_metric"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(changes, expected):
    with pytest.raises(UserError) as error:
        flags(**changes)
    assert expected in str(error.value) and "\n" not in str(error.value)
