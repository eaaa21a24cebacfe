"""PPO a second time, in NumPy and float64, row by row without padding: no torch, no formula taken from dschat.

The models are bigrams: tanh(embed[token]) @ head. Their forward and backward passes are written out here, and with
them scoring, rewards, advantages, both losses with their gradients, the clipping of the gradient and AdamW.
"""

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Settings:
    kl_kind: str = "kl"
    kl_in_loss: bool = False
    kl_coef: float = 0.2
    estimator: str = "gae"
    group_size: int = 2
    gamma: float = 0.97
    lam: float = 0.9
    clip_score: float = 3.0
    missing_eos: str = "subtract"
    penalty: float = 0.5
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    cliprange: float = 0.1
    cliprange_value: float = 0.1
    dual_clip: float | None = None
    vf_coef: float = 1.0
    entropy_coef: float = 0.0
    temperature: float = 1.3
    max_grad_norm: float = 0.05
    actor_rate: float = 0.03
    critic_rate: float = 0.05


@dataclass
class Row:
    """One answer; the lists have a number for each of its tokens, holes included."""

    prompt: list[int]
    response: list[int]
    acts: list[bool]
    finished: bool
    score: float
    numbers: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def states(self) -> np.ndarray:
        """The token that each response token follows."""
        return np.array((self.prompt + self.response)[len(self.prompt) - 1 : -1])


class Bigram:
    """``embed`` (V, D), ``head`` (D, outputs), trained by AdamW (Loshchilov and Hutter 2019), betas 0.9 and 0.95."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.m = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self.v = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self.gradient = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self.num_steps = 0

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        return np.tanh(self.weights["embed"][tokens]) @ self.weights["head"]

    def backward(self, tokens: np.ndarray, by_output: np.ndarray) -> None:
        hidden = np.tanh(self.weights["embed"][tokens])
        self.gradient["head"] += hidden.T @ by_output
        np.add.at(self.gradient["embed"], tokens, (by_output @ self.weights["head"].T) * (1 - hidden**2))

    def step(self, rate: float, max_grad_norm: float) -> float:
        """The norm of the gradient before it is clipped."""
        norm = math.sqrt(sum(float((g**2).sum()) for g in self.gradient.values()))
        self.num_steps += 1
        for name, gradient in self.gradient.items():
            g = gradient * min(1.0, max_grad_norm / norm)
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.95 * self.v[name] + 0.05 * g**2
            mean, square = self.m[name] / (1 - 0.9**self.num_steps), self.v[name] / (1 - 0.95**self.num_steps)
            self.weights[name] = self.weights[name] - rate * mean / (np.sqrt(square) + 1e-8)
            self.gradient[name] = np.zeros_like(gradient)
        return norm


def log_softmax(logits: np.ndarray, temperature: float, banned: list[int]) -> np.ndarray:
    """(n, V); -inf for a banned token."""
    scaled = logits / temperature
    scaled[:, banned] = -np.inf
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def weighted(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    """p * x, with 0 * inf = 0."""
    return p * np.where(p > 0, x, 0.0)


def apart(logp: np.ndarray, logq: np.ndarray) -> np.ndarray:
    """p * (log p - log q), 0 where both are banned."""
    return np.exp(logp) * np.subtract(logp, logq, where=logp > -np.inf, out=np.zeros_like(logp))


def score(rows: list[Row], actor: Bigram, ref: Bigram, critic: Bigram, how: Settings, banned: list[int]) -> None:
    for row in rows:
        n = np.arange(len(row.response))
        logp = log_softmax(actor(row.states), how.temperature, banned)
        logq = log_softmax(ref(row.states), how.temperature, banned)
        p = np.exp(logp)
        d = logp[n, row.response] - logq[n, row.response]
        kl = {"kl": d, "mse": d**2 / 2, "k3": np.exp(-d) - 1 + d, "full": apart(logp, logq).sum(axis=1)}
        row.numbers = {
            "logprobs": logp[n, row.response],
            "ref_logprobs": logq[n, row.response],
            "entropy": -weighted(p, logp).sum(axis=1),
            "kl": kl[how.kl_kind],
            "values": critic(row.states)[:, 0],
        }
        row.numbers["final"] = critic(np.array([(row.prompt + row.response)[-1]]))[0]


def whiten(rows: list[Row], name: str, keep_mean: bool) -> None:
    flat = [x for row in rows for x, act in zip(row.numbers[name], row.acts, strict=True) if act]
    mean = math.fsum(flat) / len(flat)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in flat) / len(flat))
    for row in rows:
        whitened = (row.numbers[name] - mean) / spread + (mean if keep_mean else 0.0)
        row.numbers[name] = np.where(row.acts, whitened, 0.0)


def advantages(rows: list[Row], how: Settings) -> None:
    for row in rows:
        rewards = np.zeros(len(row.response)) if how.kl_in_loss else -how.kl_coef * row.numbers["kl"]
        total = min(max(row.score, -how.clip_score), how.clip_score)
        if not row.finished:
            total = {"subtract": total - how.penalty, "replace": -how.penalty, "bootstrap": 0.0}[how.missing_eos]
        if any(row.acts):
            rewards[max(t for t, act in enumerate(row.acts) if act)] += total
        row.numbers["rewards"] = np.where(row.acts, rewards, 0.0)
    if how.whiten_rewards:
        whiten(rows, "rewards", keep_mean=True)
    for i, row in enumerate(rows):
        row.numbers["advantages"] = np.zeros(len(row.response))
        row.numbers["returns"] = np.zeros(len(row.response))
        if how.estimator == "gae":
            of_row(row, how)
        elif any(row.acts):  # leave one out
            first = i // how.group_size * how.group_size
            others = [r for r in rows[first : first + how.group_size] if r is not row and any(r.acts)]
            baseline = math.fsum(float(r.numbers["rewards"].sum()) for r in others) / max(1, len(others))
            own = float(row.numbers["rewards"].sum()) - baseline if others else 0.0
            row.numbers["advantages"] = np.where(row.acts, own, 0.0)
    if how.whiten_advantages:
        whiten(rows, "advantages", keep_mean=False)


def of_row(row: Row, how: Settings) -> None:
    """GAE from the last action to the first; what is no action is not there."""
    after = float(row.numbers["final"][0]) if how.missing_eos == "bootstrap" and not row.finished else 0.0
    advantage = 0.0
    for t in reversed([t for t, act in enumerate(row.acts) if act]):
        value = float(row.numbers["values"][t])
        advantage = float(row.numbers["rewards"][t]) + how.gamma * after - value + how.gamma * how.lam * advantage
        row.numbers["advantages"][t], row.numbers["returns"][t] = advantage, advantage + value
        after = value


def policy_step(rows: list[Row], actor: Bigram, ref: Bigram, how: Settings, banned: list[int]) -> dict[str, float]:
    """One optimizer step; the statistics under the names of the trainer."""
    count = sum(sum(row.acts) for row in rows)
    stats = dict.fromkeys(("loss", "approx_kl", "clip_fraction", "entropy_per_token", "kl_loss"), 0.0)
    stats |= {"dual_clip_fraction": 0.0, "ratio_max": 0.0, "log_ratio_abs_max": 0.0}
    for row in rows:
        logp = log_softmax(actor(row.states), how.temperature, banned)
        logq = log_softmax(ref(row.states), how.temperature, banned)
        by_logits = np.zeros_like(logp)
        for t in [t for t, act in enumerate(row.acts) if act]:
            p, token, advantage = np.exp(logp[t]), row.response[t], float(row.numbers["advantages"][t])
            log_ratio = float(logp[t, token] - row.numbers["logprobs"][t])
            loss, by_logprob, cut, dual = surrogate(log_ratio, advantage, how)
            stats["loss"] += loss / count
            stats["clip_fraction"] += (cut or dual) / count
            stats["dual_clip_fraction"] += dual / count
            stats["approx_kl"] += (math.exp(log_ratio) - 1 - log_ratio) / count
            stats["ratio_max"] = max(stats["ratio_max"], math.exp(log_ratio))
            stats["log_ratio_abs_max"] = max(stats["log_ratio_abs_max"], abs(log_ratio))
            entropy = -float(weighted(p, logp[t]).sum())
            stats["entropy_per_token"] += entropy / count
            by_logits[t] += how.entropy_coef * weighted(p, logp[t] + entropy)
            if how.kl_in_loss:
                d = float(logp[t, token] - logq[t, token])
                apart_here = apart(logp[t], logq[t])
                full = float(apart_here.sum())
                kl = {"mse": d * d / 2, "k3": math.exp(-d) - 1 + d, "full": full}[how.kl_kind]
                stats["kl_loss"] += kl / count
                if how.kl_kind == "full":
                    by_logits[t] += how.kl_coef * (apart_here - p * full)
                else:
                    by_logprob += how.kl_coef * {"mse": d, "k3": 1 - math.exp(-d)}[how.kl_kind]
            by_logits[t] += by_logprob * (np.arange(len(p)) == token) - by_logprob * p
        actor.backward(row.states, by_logits / how.temperature / count)
    return stats | {"grad_norm": actor.step(how.actor_rate, how.max_grad_norm)}


def surrogate(log_ratio: float, advantage: float, how: Settings) -> tuple[float, float, bool, bool]:
    """The loss of one action, its derivative by the log-probability, and which clip cuts that off."""
    ratio = math.exp(log_ratio)
    gain = ratio * advantage
    bounded = min(max(ratio, 1 - how.cliprange), 1 + how.cliprange) * advantage
    cut = bounded < gain
    if how.dual_clip is not None and advantage < 0 and min(gain, bounded) < how.dual_clip * advantage:
        return -how.dual_clip * advantage, 0.0, cut, True
    return (-bounded, 0.0, True, False) if cut else (-gain, -gain, False, False)


def value_step(rows: list[Row], critic: Bigram, how: Settings) -> dict[str, float]:
    count = sum(sum(row.acts) for row in rows)
    stats = {"loss": 0.0, "clip_fraction": 0.0}
    for row in rows:
        values = critic(row.states)[:, 0]
        by_value = np.zeros_like(values)
        for t in [t for t, act in enumerate(row.acts) if act]:
            value, target, old = float(values[t]), float(row.numbers["returns"][t]), float(row.numbers["values"][t])
            near = min(max(value, old - how.cliprange_value), old + how.cliprange_value)
            cut = (near - target) ** 2 > (value - target) ** 2
            stats["loss"] += max((near - target) ** 2, (value - target) ** 2) / 2 / count
            stats["clip_fraction"] += cut / count
            by_value[t] = 0.0 if cut else how.vf_coef * (value - target) / count
        critic.backward(row.states, by_value[:, None])
    return stats | {"grad_norm": critic.step(how.critic_rate, how.max_grad_norm)}
