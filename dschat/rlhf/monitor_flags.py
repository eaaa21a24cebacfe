"""The flags of step 3 that watch: before PPO, and during it."""

from dataclasses import dataclass

from dschat.config import flag, require_not_negative, require_positive
from dschat.errors import UserError
from dschat.rlhf.reward_specs import TOY, judge_spec

PREFLIGHTS = ("stop", "warn", "off")


@dataclass(kw_only=True)
class MonitorFlags:
    """Beside the algorithm: what is measured before and during PPO."""

    preflight: str = flag(
        "stop",
        "before PPO, sample answers and look at entropy, spread of reward and endings: stop the run where the verdict "
        "is STOP, or only warn, or do not look",
        choices=PREFLIGHTS,
    )
    preflight_prompts: int = flag(64, "prompts of the preflight, evenly spread over those of training")
    preflight_samples: int = flag(4, "answers to each of them")
    judge: str | None = flag(
        None,
        "an independent reward for every evaluation, which training never sees: toy, full:PATH, "
        "function:FILE.py:NAME, api:URL, or openai:URL#MODEL, a chat model that gives points; default: toy for the "
        "data of that name",
    )
    preference_data_path: list[str] = flag(
        [],
        "held-out pairs on which every evaluation measures what the policy itself prefers, as step 2 reads them; "
        "default: toy for the data of that name",
    )
    max_preference_pairs: int = flag(256, "of those pairs the first so many; 0: all")
    stop_on_overoptimisation: bool = flag(
        False,
        "stop when the reward rises while the judge falls, or length explains the gain; the actor is then the one of "
        "the best evaluation by the judge",
    )

    def __post_init__(self) -> None:
        require_positive(self, "preflight_prompts")
        require_not_negative(self, "max_preference_pairs")
        if self.preflight_samples < 2:
            raise UserError(
                f"--preflight_samples {self.preflight_samples}: expected 2 or more, to compare the answers to a "
                "prompt; --preflight off looks at none"
            )
        if self.judge and self.judge != TOY:
            judge_spec(self.judge)  # refuses what is no judge before anything is loaded

    def judge_place(self) -> str | None:
        """The file or directory that the judge is, where one is named."""
        if self.judge is None or self.judge == TOY:
            return None
        spec = judge_spec(self.judge)
        if spec.kind == "function":
            return spec.target.rpartition(":")[0]
        return spec.target if spec.kind in ("full", "lora") else None
