"""What the flags say of sampling, scoring and training. Plain values: flags are read before any library is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dschat.engine.specs import TrainSpec
from dschat.models.specs import LoraSpec
from dschat.rlhf.reward_specs import RewardSpec

GAE = "gae"
ESTIMATORS = (GAE, "rloo", "grpo", "reinforce_pp")
KL_KINDS = ("kl", "abs", "mse", "k3", "full")
FORWARD, SAMPLER = "forward", "sampler"  # where the log-probabilities that the ratio starts from come from
SLOTS, HF = "slots", "hf"
ROLLOUT_ENGINES = (SLOTS, HF)
PREFILL_TOKENS = 8192  # of prompts computed at once
GREEDY, SAMPLE, BEAM, BEST_OF_N = DECODINGS = ("greedy", "sample", "beam", "best_of_n")

Constants = Mapping[str, float | None]

_DPO: Constants = {"beta": 0.1, "label_smoothing": 0.0, "sft_coef": 0.0}
# loss -> its constants and their defaults, which are flags; None: half of beta, the paper's gamma / beta
CONSTANTS: dict[str, Constants] = {
    "sigmoid": _DPO,
    "ipo": _DPO,
    "hinge": _DPO,
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "simpo": {"beta": 2.0, "simpo_gamma": None, "label_smoothing": 0.0, "sft_coef": 0.0},
    "orpo": {"orpo_lambda": 0.1},
}
WITHOUT_REFERENCE = ("simpo", "orpo")


@dataclass(frozen=True)
class ModelsSpec:
    """Which models a run has and how; see the flags of the same names in step 3."""

    actor_path: str
    critic_path: str | None  # None: the first reward model that reads the actor's ids, else the actor
    rewards: tuple[RewardSpec, ...]
    actor: TrainSpec
    critic: TrainSpec | None  # None: the advantages need none
    reference_stage: int
    reward_stage: int
    offload_reference: bool
    offload_reward: bool
    actor_lora: LoraSpec | None
    critic_lora: LoraSpec | None
    share_trunk: bool
    save_merged: bool
    quantization: str | None  # of the actor's frozen weights: 4bit or 8bit
    normalize_reward: bool
    use_liger_kernel: bool  # in all of them
    upcast_layernorm: bool
    ema_decay: float | None  # None: no moving average
    micro_batch_size: int  # responses that a model scores at once
    api_timeout: float
    api_retries: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 mean off.

    ``banned_ids`` can never be drawn and have probability 0 in every score: the pad token, and rows of the embedding
    that no token uses.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    banned_ids: tuple[int, ...] = field(default=(), repr=False)

    @property
    def scored(self) -> dict[str, Any]:
        """The distribution that is sampled from, before any top-k or top-p, as `functional.token_logprobs`,
        ``entropy`` and ``full_kl`` take it. Greedy choices are scored at temperature 1."""
        return {"temperature": self.temperature or 1.0, "banned_ids": self.banned_ids}


@dataclass(frozen=True)
class Shaping:
    """How scores become advantages; see the flags of the same names in step 3."""

    estimator: str  # one of ESTIMATORS
    group_size: int  # responses to one prompt, which are neighbours
    kl_in_reward: bool
    gamma: float
    lam: float
    clip_reward_value: float  # 0: no clipping
    missing_eos: str  # subtract, replace or bootstrap
    missing_eos_penalty: float
    whiten_rewards: bool
    whiten_advantages: bool


@dataclass(frozen=True)
class UpdateSpec:
    """How a rollout is trained on; see the flags of the same names in step 3. Sizes count rows."""

    ppo_epochs: int
    minibatch_size: int  # of all ranks: one optimizer step
    micro_batch_size: int  # of one rank at most: one forward and backward
    cliprange: float
    cliprange_value: float
    dual_clip: float | None = None
    vf_coef: float = 1.0
    entropy_coef: float = 0.0
    kl_loss: str | None = None  # the kind of KL that is part of the loss; None: it is in the rewards
    unsup_coef: float = 0.0
    max_approx_kl: float = 0.0  # 0: no limit
    max_ratio: float = 0.0  # 0: no limit
    max_tokens: int = 0  # of a micro-batch, with padding; 0: no limit


@dataclass(frozen=True)
class AnswerSpec:
    """How answers are made; see the flags of the same names."""

    sampling: Sampling
    num_beams: int
    best_of_n: int
    seed: int
    batch_size: int  # answers made at once


@dataclass(frozen=True)
class CurveSpec:
    """Who answers, who judges, and how much is sampled."""

    policy_path: str
    judge: str  # as --judge
    num_samples: int  # N, the largest n of the curve
    max_new_tokens: int
    batch_size: int  # answers sampled and scored at once
    seed: int
