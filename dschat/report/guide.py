"""What each metric means: its definition, its unit, where a healthy run has it, and what to do when it is not there.

The report prints this beside its charts and docs/reading-a-run.md holds it as a table, so that there is one text.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One quantity of metrics.jsonl."""

    title: str
    unit: str
    definition: str
    healthy: str
    mend: str  # when it is not


SFT = {
    "loss": Metric(
        "training loss", "nats a token", "mean negative log-probability of the answers' tokens",
        "falls fast, then slowly", "flat: raise the learning rate; not a number or jumping: lower it",
    ),
    "eval/perplexity": Metric(
        "held-out perplexity", "", "exp of the mean negative log-probability of held-out answers' tokens",
        "falls, then flattens", "rises again: fewer epochs; PPO wants an earlier model than the lowest perplexity's",
    ),
}  # fmt: skip
REWARD = {
    "loss": Metric(
        "training loss", "nats a pair", "-log sigmoid(score of the chosen - score of the rejected)",
        "below 0.69 (log 2), which a coin has", "at 0.69: nothing is learned; look at the pairs, raise the rate",
    ),
    "eval/accuracy": Metric(
        "held-out accuracy", "share of pairs", "held-out pairs whose chosen answer scores higher; a tie is half",
        "0.65 to 0.75 on human preferences, well above that of the length alone",
        "near 0.5: the labels are noise or chosen and rejected are mixed up; more data, a larger model, fewer epochs",
    ),
    "eval/margin": Metric(
        "held-out margin", "score", "mean of the chosen's score - the rejected's", "above 0 and growing slowly",
        "grows without a gain in accuracy: the model is only becoming surer of itself; fewer epochs",
    ),
}  # fmt: skip
DPO = {
    "loss": Metric(
        "training loss", "nats a pair", "the loss of --loss_type", "starts at 0.69 (log 2) for DPO and falls",
        "flat: raise the learning rate or beta",
    ),
    "eval/accuracy": Metric(
        "held-out accuracy", "share of pairs", "held-out pairs whose chosen answer gained more over the reference",
        "above 0.6", "near 0.5: as for a reward model",
    ),
    "eval/margin": Metric(
        "held-out margin", "nats", "mean of the chosen's gain over the reference - the rejected's", "grows",
        "grows without accuracy: fewer epochs, a larger beta",
    ),
}  # fmt: skip
PPO = {
    "eval/score_mean": Metric(
        "training reward, held-out", "score", "mean score by the reward that PPO is trained on, on held-out prompts",
        "rises, then flattens", "flat: see the preflight; rises while the judge falls: the reward is being hacked",
    ),
    "eval/judge_mean": Metric(
        "independent judge", "judge's score", "mean score by --judge, which training never sees, of the same answers",
        "rises with the reward", "falls while the reward rises: stop, take the best checkpoint, mend the reward",
    ),
    "objective/score_mean": Metric(
        "training reward, rollouts", "score", "mean score of the rollout's answers", "rises, noisily",
        "see the held-out one: this one looks healthy while a policy cheats",
    ),
    "objective/score_std": Metric(
        "spread of the reward", "score", "standard deviation of the rollout's scores", "falls slowly",
        "a jump up: the policy has found a hole in the reward; near 0: nothing is left to learn from",
    ),
    "eval/kl_per_seq": Metric(
        "KL to the reference", "nats a sequence", "mean over answers of log-probability under policy - reference",
        "1 to 20, growing ever slower", "runs away: raise kl_coef, lower the learning rate, or give a kl_target",
    ),
    "objective/entropy_per_token": Metric(
        "entropy", "nats a token", "mean entropy of the next-token distribution along the answers",
        "falls slowly, to no less than a third of its start",
        "falls to 0: every answer is the same; raise kl_coef, lower the learning rate, add --entropy_coef",
    ),
    "eval/response_length": Metric(
        "answer length", "tokens", "mean tokens of an answer, end token included", "changes by less than a half",
        "grows with the reward: the reward pays for length; balance the preferences by length",
    ),
    "eval/finished_fraction": Metric(
        "finished answers", "share of the answers", "answers that ended with the end token before the limit",
        "above 0.95", "falls: answers never end; raise missing_eos_penalty or max_answer_seq_len",
    ),
    "eval/distinct_2": Metric(
        "distinct-2", "share of the pairs of tokens", "different pairs of neighbouring tokens of all answers over all",
        "stays above half of its start", "falls: the answers become one answer; as for the entropy",
    ),
    "eval/repetition": Metric(
        "repetition", "share of the 4-grams", "4-grams of an answer that came before in the same answer",
        "below 0.1", "rises: answers loop; raise kl_coef, look at the samples",
    ),
    "eval/judge_agreement": Metric(
        "reward model agrees with the judge", "share of pairs",
        "pairs of answers of the current policy to one prompt that reward and judge order alike; a tie is half",
        "as at step 0", "falls to 0.5: the reward knows nothing of what the policy says now; gather preferences there",
    ),
    "eval/preference_accuracy": Metric(
        "policy's own preferences", "share of pairs",
        "held-out pairs whose chosen answer is likelier a token than the rejected one under the policy",
        "rises a little", "falls: the policy moves away from what people preferred",
    ),
    "policy/approx_kl": Metric(
        "KL of an update", "nats a token", "mean of ratio - 1 - log ratio over the update's tokens", "below 0.02",
        "larger: lower the learning rate or ppo_epochs, or give --max_approx_kl",
    ),
    "policy/clip_fraction": Metric(
        "clipped tokens", "share of the tokens", "tokens whose policy ratio the clip left without a gradient",
        "0.01 to 0.2", "above 0.3: updates are too large; at 0 throughout: they are too small",
    ),
    "critic/explained_variance": Metric(
        "explained variance", "share", "1 - variance of (returns - values) / variance of returns",
        "rises above 0.3", "below 0: the critic is worse than a constant; raise its learning rate, warm it up",
    ),
}  # fmt: skip
METRICS = {"sft": SFT, "reward": REWARD, "dpo": DPO, "ppo": PPO}


def guide_table(stage: str) -> str:
    """The metrics of a stage as a Markdown table, for docs/reading-a-run.md."""
    lines = ["| metric | unit | definition | healthy | when it is not |", "|---|---|---|---|---|"]
    for name, metric in METRICS[stage].items():
        lines.append(f"| `{name}` | {metric.unit or '-'} | {metric.definition} | {metric.healthy} | {metric.mend} |")
    return "\n".join(lines)
