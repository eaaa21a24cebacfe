"""What the columns of an explained PPO step mean: groups of columns with words, formula and source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """Columns that are explained together. ``example`` is a template of the numbers of a row."""

    title: str
    columns: tuple[str, ...]
    text: str
    formula: str
    source: str
    example: str = ""


KL_FORMULAS = {
    "kl": "kl = k1 = log π − log π_ref",
    "abs": "kl = |k1|, k1 = log π − log π_ref",
    "mse": "kl = k1² / 2, k1 = log π − log π_ref",
    "k3": "kl = exp(−k1) − 1 + k1, k1 = log π − log π_ref",
    "full": "kl = Σ_v π(v) (log π(v) − log π_ref(v)), over the whole vocabulary; k1 = log π − log π_ref of the token",
}
EOS_RULES = {
    "subtract": "minus {missing_eos_penalty:g} if the answer was cut off",
    "replace": "replaced by −{missing_eos_penalty:g} if the answer was cut off",
    "bootstrap": "0 if the answer was cut off: the critic's value of what would have followed stands in for it",
}
GROUP_NOTE = "Answers to one prompt ({group_size}) judge each other; all tokens of one share its advantage."


def column_groups(settings: Mapping[str, Any]) -> list[Group]:
    """The columns that a configuration has, in the order of the computation, with their explanation.

    ``settings`` are the fields of Shaping and UpdateSpec with kl_kind, kl_coef, temperature and num_summed (of each
    answer, the actions whose sums over the vocabulary were checked).
    """
    has_critic = settings["estimator"] == "gae"
    groups = [*_given(settings), *_rewards(settings), *_advantages(settings), *_update(settings)]
    if has_critic:
        groups.append(
            Group(
                "After the update: the critic",
                ("new_value", "clipped_value", "value_loss"),
                "What the critic says now, and its loss. The second term keeps one update from moving a value further "
                f"than {settings['cliprange_value']:g}. The loss of the batch is the mean over all actions, times "
                f"{settings['vf_coef']:g}.",
                "value_loss = max((V_new − return)², (clip(V_new, V ± c) − return)²) / 2",
                "Ziegler et al. 2019, openai/lm-human-preferences",
                "max(({new_value} − {return})², ({clipped_value} − {return})²) / 2 = {value_loss}",
            )
        )
    return groups


def _given(settings: Mapping[str, Any]) -> list[Group]:
    kind = settings["kl_kind"]
    return [
        Group(
            "The answer",
            ("position", "token_id", "token", "in_response", "is_action"),
            "The tokens as they were sampled, up to and including the end token; ⟦…⟧ marks special tokens, ␣ a space. "
            "Learned from are those in the action mask (is_action): none of an answer without a score, none that the "
            "data or the reward leaves out; these are grey. Colour: advantage, green above 0, red below.",
            "is_action ≤ in_response",
            "docs/ppo.md",
        ),
        Group(
            "How likely the token was",
            ("sampler_logprob", "logprob", "ref_logprob"),
            "In nats: as the sampler saw it, token by token; the same weights in one pass over the answer (the 'old' "
            "policy below; the two must agree); and the reference, the policy before PPO.",
            f"log π(token | everything before it), logits / {settings['temperature']:g}",
            "Ouyang et al. 2022 (arXiv 2203.02155), section 3.5",
        ),
        Group(
            "How far from the reference",
            ("k1", "kl"),
            "How far the policy has moved from the reference at this token; k1, the plain estimate, may be negative. "
            f"The penalty is the column kl, here of kind '{kind}'"
            + (", which is the run's own number: that policy has been updated since." if kind == "full" else "."),
            KL_FORMULAS[kind],
            "Schulman 2020, joschu.net/blog/kl-approx.html",
            "k1 = {logprob} − {ref_logprob} = {k1}; kl = {kl}",
        ),
    ]  # fmt: skip


def _rewards(settings: Mapping[str, Any]) -> list[Group]:
    clip, coefficient = settings["clip_reward_value"], settings["kl_coef"] if settings["kl_in_reward"] else 0.0
    clipping = f"clipped to ± {clip:g}" if clip else "not clipped"
    text = (
        f"The score goes to the last action: {clipping}, {EOS_RULES[settings['missing_eos']].format_map(settings)}. "
    )
    text += "Every action pays for its distance from the reference" + (
        "." if settings["kl_in_reward"] else ", here by a term of the loss instead."
    )
    formula = f"score_share + kl_share, kl_share = −{coefficient:g} × kl"
    source = "Ziegler et al. 2019 (arXiv 1909.08593), eq. 2"
    if settings["missing_eos"] == "replace":
        source += "; the EOS trick: Huang et al. 2024 (arXiv 2403.17031)"
    columns: tuple[str, ...] = ("score_share", "kl_share", "reward")
    formula, example = f"reward = {formula}", "{score_share} + {kl_share} = {reward}"
    if settings["whiten_rewards"]:
        columns = ("score_share", "kl_share", "reward_raw", "reward")
        text += " Then all rewards of the rollout are brought to variance 1, their mean kept."
        formula = formula.replace("reward", "reward_raw", 1) + "; reward = (reward_raw − mean) / std + mean"
        example = "{score_share} + {kl_share} = {reward_raw}; "
        example += "({reward_raw} − {reward_mean}) / {reward_std} + {reward_mean} = {reward}"
    return [Group("The reward of a token", columns, text, formula, source, example)]


def _advantages(settings: Mapping[str, Any]) -> list[Group]:
    estimator, gamma, lam = settings["estimator"], settings["gamma"], settings["lam"]
    text, formula, source, example = {
        "gae": (
            "How much better the rest of the answer went than the critic expected: the surprises from here on, later "
            "ones counting less. The return is what the critic should have said.",
            f"advantage_raw_t = Σ_l ({gamma:g} · {lam:g})^l delta_(t+l); return = advantage_raw + value",
            "Schulman et al. 2016 (arXiv 1506.02438), eq. 16",
            "return = {advantage_raw} + {value} = {return}",
        ),
        "reinforce_pp": (
            "Without a critic: the sum of the rewards from here on.",
            f"advantage_raw_t = Σ_l {gamma:g}^l reward_(t+l)",
            "REINFORCE++: Hu 2025 (arXiv 2501.03262)",
            "advantage_raw = {advantage_raw}",
        ),
        "rloo": (
            GROUP_NOTE.format_map(settings),
            "advantage_raw = total − mean total of the others, total = Σ_t reward_t",
            "RLOO: Ahmadian et al. 2024 (arXiv 2402.14740)",
            "{total} − {others_mean} = {advantage_raw}",
        ),
        "grpo": (
            GROUP_NOTE.format_map(settings),
            "advantage_raw = (total − mean) / (std + 1e-6), total = Σ_t reward_t; mean and std of the group",
            "GRPO: Shao et al. 2024 (arXiv 2402.03300), section 4.1.2",
            "({total} − {group_mean}) / ({group_std} + 1e-6) = {advantage_raw}",
        ),
    }[estimator]
    if settings["whiten_advantages"]:
        text += " Then all advantages of the rollout are brought to mean 0 and variance 1: what the update uses."
        formula += "; advantage = (advantage_raw − mean) / std"
        example += "; advantage = ({advantage_raw} − {advantage_mean}) / {advantage_std} = {advantage}"
    bootstrap = ", but if the answer was cut off the guess of what would have followed"
    critic = Group(
        "The critic's surprise",
        ("value", "next_value", "delta"),
        "The critic's guess, before the token, of all rewards from here on; the same one action later (after the last "
        f"0{bootstrap * (settings['missing_eos'] == 'bootstrap')}); how much better the token was than guessed.",
        f"delta = reward + {gamma:g} · next_value − value",
        "Schulman et al. 2016 (arXiv 1506.02438), eq. 9",
        f"{{reward}} + {gamma:g} · {{next_value}} − {{value}} = {{delta}}",
    )
    has_critic = estimator == "gae"
    columns = ("advantage_raw", "advantage", *(("return",) if has_critic else ()))
    return [*([critic] if has_critic else []), Group("The advantage", columns, text, formula, source, example)]


def _update(settings: Mapping[str, Any]) -> list[Group]:
    dual, kl_loss, c = settings["dual_clip"], settings["kl_loss"], settings["cliprange"]
    dual_text = f" Where the advantage is negative the loss ends at a ratio of {dual:g}." if dual else ""
    kl_text = " The KL to the reference is added to the loss." if kl_loss else ""
    bonus = settings["entropy_coef"]
    return [
        Group(
            "After the update: the policy",
            ("new_logprob", "ratio", "clipped", "policy_loss", *(("kl_loss",) if kl_loss else ())),
            "The same token under the updated policy. The loss makes tokens of positive advantage likelier, others "
            f"less so; where the ratio has left 1 ± {c:g} in that direction a clip ends the gradient (clipped = 1)."
            f"{dual_text}{kl_text} The loss of the batch is the mean over all actions.",
            f"ratio = exp(new_logprob − logprob); policy_loss = max(−A ratio, −A clip(ratio, {1 - c:g}, {1 + c:g}))"
            + (f"; kl_loss = {settings['kl_coef']:g} × kl of the updated policy" if kl_loss else ""),
            "Schulman et al. 2017 (arXiv 1707.06347), eq. 7" + "; Ye et al. 2020 (1912.09729), eq. 3" * bool(dual),
            "exp({new_logprob} − {logprob}) = {ratio}; A = {advantage}; policy_loss = {policy_loss}",
        ),
        Group(
            "How undecided the policy was",
            ("entropy", "new_entropy"),
            "In nats, at this token before and after the update: 0 if only one token was possible."
            + (f" It is subtracted from the loss, times {bonus:g}." if bonus else ""),
            "H = −Σ_v π(v) log π(v)",
            "Shannon 1948; as a bonus Schulman et al. 2017, eq. 9",
        ),
    ]  # fmt: skip
