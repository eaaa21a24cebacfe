"""What step 3 will do, in the numbers that decide its memory."""

from dataclasses import dataclass

from dschat.engine.workload import COMPARE, RESPONSE, SAMPLE, SCORER, LoraShape, ModelUse, PassUse, Workload
from dschat.models.specs import LoraSpec
from dschat.rlhf.specs import PREFILL_TOKENS, SAMPLER, SLOTS, ModelsSpec

BITS = {None: 0, "4bit": 4, "8bit": 8}


@dataclass(frozen=True)
class RolloutSizes:
    """See the flags of the same names. Rows are of one rank."""

    num_prompts: int  # sampled at once
    num_samples: int  # answers to each
    micro_batch: int  # answers scored or trained on at once
    accumulates: bool  # several micro-batches make a step
    prompt_size: int
    answer_size: int
    max_tokens: int  # of a micro-batch; 0: no limit
    rollout_engine: str
    old_logprobs: str


def ppo_workload(spec: ModelsSpec, sizes: RolloutSizes, dtype: str, num_checkpoints: int) -> Workload:
    return Workload(
        "step 3, PPO",
        dtype,
        tuple(model_uses(spec, sizes.accumulates)),
        tuple(pass_uses(spec, sizes)),
        num_checkpoints,
        (sizes.prompt_size + sizes.answer_size, "--max_prompt_seq_len + --max_answer_seq_len"),
    )


def model_uses(spec: ModelsSpec, accumulates: bool) -> list[ModelUse]:
    adapters_only = spec.actor_lora is not None and spec.actor_lora.only
    uses = [
        ModelUse(
            "actor",
            spec.actor_path,
            zero_stage=spec.actor.zero_stage,
            checkpointing=spec.actor.gradient_checkpointing,
            accumulates=accumulates,
            offload=spec.actor.offload,
            has_average=spec.ema_decay is not None,
            saves_adapter=spec.actor_lora is not None and not spec.save_merged,
            lora=_shape(spec.actor_lora),
            quantized_bits=BITS[spec.quantization],
        ),
        ModelUse(
            "reference",
            spec.actor_path,
            is_trained=False,
            zero_stage=spec.reference_stage,
            offload=spec.offload_reference,
            shares_trunk=adapters_only,
        ),
    ]
    full = [reward.target for reward in spec.rewards if reward.kind == "full"]
    for number, path in enumerate(full):
        role = f"reward {number + 1}" if number else "reward"
        stage, offload = spec.reward_stage, spec.offload_reward
        uses.append(ModelUse(role, path, is_scorer=True, is_trained=False, zero_stage=stage, offload=offload))
    if spec.critic is not None:
        uses.append(
            ModelUse(
                "critic",
                spec.actor_path if spec.share_trunk else spec.critic_path or next(iter(full), spec.actor_path),
                is_scorer=True,
                zero_stage=spec.critic.zero_stage,
                checkpointing=spec.critic.gradient_checkpointing,
                accumulates=accumulates,
                offload=spec.critic.offload,
                lora=_shape(spec.critic_lora),
                shares_trunk=spec.share_trunk,
                saves_adapter=spec.critic_lora is not None and not spec.save_merged,
            )
        )
    return uses


def pass_uses(spec: ModelsSpec, sizes: RolloutSizes) -> list[PassUse]:
    length, answer = sizes.prompt_size + sizes.answer_size, sizes.answer_size
    rows = min(sizes.micro_batch, max(1, sizes.max_tokens // length)) if sizes.max_tokens else sizes.micro_batch
    at_once = sizes.num_prompts
    if sizes.rollout_engine == SLOTS:
        at_once = min(at_once, max(1, PREFILL_TOKENS // sizes.prompt_size))
    sampled = sizes.num_prompts * sizes.num_samples
    passes = [PassUse("sample answers", "actor", SAMPLE, sampled, length, answer, num_prompts=at_once)]
    scored = RESPONSE if sizes.old_logprobs == SAMPLER else COMPARE
    passes.append(PassUse("score: log-probabilities", "actor", scored, rows, length, answer))
    if any(reward.kind == "full" for reward in spec.rewards):
        passes.append(PassUse("score: reward", "reward", SCORER, sizes.micro_batch, length))
    passes.append(PassUse("train the actor", "actor", RESPONSE, rows, length, answer, train=True))
    if spec.critic is not None:
        passes.append(PassUse("train the critic", "critic", SCORER, rows, length, train=True))
    return passes


def _shape(lora: LoraSpec | None) -> LoraShape:
    return (lora.dim, lora.alpha, lora.module_name, lora.only) if lora is not None else (0, None, "auto", True)
