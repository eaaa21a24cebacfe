"""What the tests of step 3 share: small engines, ragged rollouts, experiences with holes and rows without a score."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident
from typing import Any

from dschat.engine.deepspeed_engine import TrainSpec, create_frozen_model, create_train_engine
from dschat.engine.distributed import Runtime
from dschat.models.attention import use_fast_attention
from dschat.models.load import disable_dropout
from dschat.models.scorer import Scorer
from dschat.rlhf.experience import Experience, Shaping, add_advantages, score_rollout
from dschat.rlhf.ppo_trainer import UpdateSpec
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import Rollout, Sampling, generate, row_uniforms
from tests.families import ragged_prompts, tiny_config, tiny_model

import torch
import transformers

SIZES = (3, 9, 6, 1, 7, 4)
STEPS, TEMPERATURE = 8, 2.0
CLIP, CLIP_VALUE, RATE = 0.2, 0.3, 1e-4
FP32, CPU = torch.float32, torch.device("cpu")
ALONE = Runtime(0, 1, CPU)
KL_COEF = 0.1
PER_ACTION = ("sampler_logprobs", "logprobs", "ref_logprobs", "entropy", "kl", "values")


def ends(tokenizer) -> dict[str, Any]:
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def few_tokens(tokenizer, vocab_size: int, *, eos: bool = True) -> tuple[int, ...]:
    """All ids but a dozen and EOS, to be banned: random models then end their answers at different lengths."""
    kept = {20, 31, 42, 53, 64, 75, 86, 97, 108, 119, 130, 141} | ({tokenizer.eos_token_id} if eos else set())
    return tuple(i for i in range(vocab_size) if i not in kept)


def tiny_scorer(family: str, tokenizer, seed: int, mean: float = 0.0, std: float = 1.0) -> Scorer:
    torch.manual_seed(seed)
    config = tiny_config(family, tokenizer)
    config.num_labels = 1
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return Scorer(model, mean, std)


def moved(model, by: float, seed: int = 1):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def as_loaded(model):
    """As step 3 loads its models: without dropout, in our attention."""
    disable_dropout(model)
    use_fast_attention(model.model if isinstance(model, Scorer) else model)
    return model


def plain_models(family: str, tokenizer) -> RLHFEngine:
    """Three different models without an optimizer, so that none can stand in for another."""
    actor, ref = as_loaded(tiny_model(family, tokenizer)), as_loaded(moved(tiny_model(family, tokenizer), 0.02))
    return RLHFEngine(actor, as_loaded(tiny_scorer(family, tokenizer, 2, 0.5, 2.0)), ref, actor)


def trained_models(
    tokenizer,
    runtime: Runtime,
    family: str = "llama",
    *,
    rate: float = RATE,
    stage: int = 0,
    drift: float = 0.0,
    **spec,
) -> RLHFEngine:
    """An engine that can be trained. ``drift`` moves the reference away from the actor."""
    given: dict[str, Any] = {"max_grad_norm": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "constant"} | spec
    train = TrainSpec(learning_rate=rate, num_warmup_steps=0, num_steps=10, zero_stage=stage, **given)
    actor = as_loaded(tiny_model(family, tokenizer))
    reference = moved(as_loaded(tiny_model(family, tokenizer)), drift)
    critic = as_loaded(tiny_scorer(family, tokenizer, 2, 0.5, 2.0))
    options: dict[str, Any] = {"dtype": FP32, "runtime": runtime}
    frozen_stage = 3 if stage == 3 else 0
    return RLHFEngine(
        create_train_engine(actor, train, **options),
        create_train_engine(critic, train, **options),
        create_frozen_model(reference, zero_stage=frozen_stage, dtype=FP32, device=runtime.device),
        actor,
    )


def sampling_for(engine: RLHFEngine, tokenizer, temperature: float = TEMPERATURE, steps: int = STEPS) -> Sampling:
    """Over eight tokens, so that answers end at different lengths."""
    kept = {*range(20, 300, 40), tokenizer.eos_token_id}
    banned = tuple(i for i in range(engine.family.config.vocab_size) if i not in kept)
    return Sampling(steps, temperature, banned_ids=banned)


def rollout_of(actor, tokenizer, sampling: Sampling, seed: int = 4) -> Rollout:
    """Six ragged answers, some of them cut off."""
    uniforms = row_uniforms(len(SIZES), sampling.max_new_tokens, seed)
    rollout = generate(actor, *ragged_prompts(tokenizer, SIZES), sampling, uniforms, **ends(tokenizer))
    assert len(set(rollout.response_mask.sum(1).tolist())) >= 3
    return rollout


def with_few_prompts(batch):
    """The answers of `rollout_of` as if they had been given to three prompts, of 9, 6 and 6 tokens, in turns."""
    batch = dataclasses.replace(batch)
    picked = [1, 2, 2, 1, 2, 2]
    batch.input_ids, batch.attention_mask = batch.input_ids[picked], batch.attention_mask[picked]
    batch.input_ids[[2, 5], -1] += 1  # the third prompt is the second one but for its last token
    return batch


SCORES = torch.tensor([1.5, -0.75, 7.0, 0.25, -6.0, 2.0])


def with_holes(rollout: Rollout) -> torch.Tensor:
    """Which tokens are learned from: of the longest answer not the second, of the next its last, of row 5 nothing."""
    mask = rollout.response_mask.clone()
    sizes = mask.sum(1).tolist()
    longest, second, *_ = sorted(range(len(SIZES) - 1), key=lambda row: -sizes[row])
    assert sizes[second] >= 3
    mask[longest, 1] = False
    mask[second, sizes[second] - 1] = False
    mask[len(SIZES) - 1] = False
    return mask


def shaping(**changes) -> Shaping:
    given: dict[str, Any] = {
        "estimator": "gae",
        "group_size": 1,
        "kl_in_reward": True,
        "gamma": 1.0,
        "lam": 0.9,
        "clip_reward_value": 5.0,
        "missing_eos": "subtract",
        "missing_eos_penalty": 1.0,
        "whiten_rewards": False,
        "whiten_advantages": True,
    }
    return Shaping(**(given | changes))


def update_spec(micro_batch_size: int = 2, epochs: int = 1, minibatch_size: int = 100, **changes) -> UpdateSpec:
    return UpdateSpec(epochs, minibatch_size, micro_batch_size, CLIP, CLIP_VALUE, **changes)


def experience_of(
    engine: RLHFEngine, tokenizer, sampling: Sampling, *, holes: bool = False, kl_kind: str = "kl", **changes
) -> Experience:
    """Of the engine's first rollout."""
    engine.eval()
    rollout = rollout_of(engine.family, tokenizer, sampling)
    mask = with_holes(rollout) if holes else rollout.response_mask
    scored = score_rollout(engine, rollout, torch.where(mask.any(1), SCORES, 0.0), mask, sampling, kl_kind, 4)
    return add_advantages(scored, shaping(**changes), KL_COEF)


def weights(*engines) -> list[torch.Tensor]:
    return [p.detach().clone() for engine in engines for p in engine.module.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def made_up(lengths, finished, seed=0, size=None, holes=False) -> Experience:
    """Random numbers in the shape of an experience; 0 outside the mask. ``holes``: some tokens do not count, the last
    one of some rows among them, and no token of the second row does."""
    generator = torch.Generator().manual_seed(seed)
    size = size or max(lengths)
    response_mask = torch.arange(size) < torch.tensor(lengths)[:, None]
    mask = response_mask.clone()
    if holes:
        mask[0, 1] = mask[2, lengths[2] - 1] = mask[4, 0] = False
        mask[4, 3:5] = False
        mask[1] = False

    def numbers(scale=1.0):
        return torch.where(mask, scale * torch.randn(mask.shape, generator=generator), 0.0)

    logprobs, ref_logprobs = -numbers().abs(), -numbers().abs()
    return Experience(
        input_ids=torch.arange(len(lengths))[:, None].expand(-1, 2),  # different prompts
        attention_mask=torch.ones(len(lengths), 2, dtype=torch.bool),
        response_ids=torch.where(response_mask, torch.randint(2, 6, mask.shape, generator=generator), 0),
        response_mask=response_mask,
        action_mask=mask,
        finished=torch.tensor(finished),
        scores=torch.where(mask.any(1), 4 * torch.randn(len(lengths), generator=generator), 0.0),
        sampler_logprobs=logprobs,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        entropy=numbers().abs(),
        kl=logprobs - ref_logprobs,
        values=numbers(),
        final_values=torch.randn(len(lengths), generator=generator),
    )


class TwoRanks:
    """torch.distributed for two threads, each a rank."""

    class ReduceOp:
        MAX = "max"

    def __init__(self, size: int = 2):
        self.barrier, self.slots = Barrier(size), [None] * size
        self.ranks: dict[int, int] = {}  # by thread

    def _exchange(self, value):
        self.slots[self.ranks[get_ident()]] = value
        self.barrier.wait(timeout=30)
        found = list(self.slots)
        self.barrier.wait(timeout=30)
        return found

    def all_gather(self, parts, rows):
        found = self._exchange(rows)
        assert {part.shape for part in parts} == {part.shape for part in found}  # what the real one demands
        for part, value in zip(parts, found, strict=True):
            part.copy_(value)

    def all_gather_object(self, parts, items):
        parts[:] = self._exchange(items)

    def all_reduce(self, value, op="sum"):
        found = torch.stack([v.clone() for v in self._exchange(value.clone())])
        value.copy_(found.amax(0) if op == "max" else found.sum(0))

    def run(self, function) -> list:
        """``function`` of each rank's runtime, at the same time."""

        def of_rank(rank: int):
            self.ranks[get_ident()] = rank
            return function(Runtime(rank, len(self.slots), CPU))

        with ThreadPoolExecutor(len(self.slots)) as pool:
            return list(pool.map(of_rank, range(len(self.slots))))
