"""The losses of the DPO program once more: row by row, without batches or padding, on plain transformers."""

import math

import torch

AWAY = {  # loss -> constants, none at its default
    "sigmoid": {"beta": 0.3, "label_smoothing": 0.1, "sft_coef": 0.5},
    "ipo": {"beta": 0.15, "label_smoothing": 0.2, "sft_coef": 0.3},
    "hinge": {"beta": 0.05, "label_smoothing": 0.15, "sft_coef": 0.2},
    "kto": {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.6},
    "simpo": {"beta": 1.7, "simpo_gamma": 0.4, "label_smoothing": 0.1, "sft_coef": 0.6},
    "orpo": {"orpo_lambda": 0.35},
}


def logp(model, ids: list[int], prompt_len: int) -> torch.Tensor:
    """The log-probability of ids[prompt_len:] after ids[:prompt_len]."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    steps = [logits[t - 1].log_softmax(-1)[ids[t]] for t in range(prompt_len, len(ids))]
    return torch.stack(steps).sum()


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return -torch.log(1 + torch.exp(-x))


def pair_loss(kind: str, c: dict, policy, reference, row: dict) -> torch.Tensor:
    prompt_len = row["prompt_len"]
    chosen, rejected = row["chosen_ids"], row["rejected_ids"]
    w, l = logp(policy, chosen, prompt_len), logp(policy, rejected, prompt_len)  # noqa: E741
    mean_w, mean_l = w / (len(chosen) - prompt_len), l / (len(rejected) - prompt_len)
    if kind == "orpo":
        odds_w, odds_l = (torch.exp(mean) / (1 - torch.exp(mean)) for mean in (mean_w, mean_l))
        return -mean_w + c["orpo_lambda"] * -log_sigmoid(torch.log(odds_w / odds_l))
    if kind == "simpo":
        h = c["beta"] * (mean_w - mean_l)
        right, wrong = -log_sigmoid(h - c["simpo_gamma"]), -log_sigmoid(-h - c["simpo_gamma"])
    else:
        with torch.no_grad():
            base = logp(reference, chosen, prompt_len) - logp(reference, rejected, prompt_len)
        h = w - l - base
        right, wrong = (
            {
                "sigmoid": lambda h: -log_sigmoid(c["beta"] * h),
                "ipo": lambda h: (h - 1 / (2 * c["beta"])) ** 2,
                "hinge": lambda h: (1 - c["beta"] * h).clamp(min=0),
            }[kind](sign * h)
            for sign in (1, -1)
        )
    e = c["label_smoothing"]
    return (1 - e) * right + e * wrong - c["sft_coef"] * mean_w


def kto_losses(c: dict, policy, reference, rows: list[dict], others: list[dict], max_len: int) -> list[torch.Tensor]:
    """``others``: whose answer each row borrows for z0."""
    ratios = []
    with torch.no_grad():
        for row, other in zip(rows, others, strict=True):
            ids = (row["input_ids"][: row["prompt_len"]] + other["input_ids"][other["prompt_len"] :])[:max_len]
            ratios.append((logp(policy, ids, row["prompt_len"]) - logp(reference, ids, row["prompt_len"])).item())
    z0 = max(0.0, math.fsum(ratios) / len(ratios))
    losses = []
    for row in rows:
        with torch.no_grad():
            base = logp(reference, row["input_ids"], row["prompt_len"])
        r = logp(policy, row["input_ids"], row["prompt_len"]) - base
        if row["good"]:
            losses.append(c["desirable_weight"] * (1 - torch.sigmoid(c["beta"] * (r - z0))))
        else:
            losses.append(c["undesirable_weight"] * (1 - torch.sigmoid(c["beta"] * (z0 - r))))
    return losses


def mean_loss(kind: str, c: dict, policy, reference, rows, others, max_len: int) -> torch.Tensor:
    if kind == "kto":
        return torch.stack(kto_losses(c, policy, reference, rows, others, max_len)).mean()
    return torch.stack([pair_loss(kind, c, policy, reference, row) for row in rows]).mean()
