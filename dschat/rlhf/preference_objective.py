"""The losses of the DPO program behind one call: their constants, their value on a batch, what is told of them."""

import math
from dataclasses import dataclass

from dschat.functional import dpo_loss, kto_loss, orpo_loss, simpo_loss
from dschat.functional.reduction import divide
from dschat.rlhf.answer_logprobs import AnswerLogprobs
from dschat.rlhf.specs import WITHOUT_REFERENCE

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """``loss_type`` and ``constants`` are a key of CONSTANTS and a number for each of its names."""

    loss_type: str
    constants: dict[str, float]

    @property
    def has_reference(self) -> bool:
        return self.loss_type not in WITHOUT_REFERENCE

    @property
    def is_paired(self) -> bool:
        """Whether a row is a pair; else (KTO) it is an answer that was called good or bad."""
        return self.loss_type != "kto"

    def loss(
        self, rows: AnswerLogprobs, *, kl: Tensor | None = None, denominator: float | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over real rows, and its detached statistics, see `dschat.functional.preference`.

        Args:
            rows: of this micro-batch, without those that only fill up.
            kl: for KTO, the scalar of `with_mismatched_logps`; default: the mean over these rows.
            denominator: the rows of the whole optimizer step; default: of this batch.
        """
        own, other = rows.logps.unbind(1)
        own_length, other_length = rows.lengths.unbind(1)
        c = self.constants
        if self.loss_type == "orpo":
            return orpo_loss(own, other, own_length, other_length, c["orpo_lambda"], denominator=denominator)
        if self.loss_type == "simpo":
            goal = (c["beta"], c["simpo_gamma"], c["label_smoothing"])
            loss, stats = simpo_loss(own, other, own_length, other_length, *goal, denominator=denominator)
        else:
            assert rows.ref_logps is not None
            ref_own, ref_other = rows.ref_logps.unbind(1)
            if self.loss_type == "kto":
                assert rows.good is not None
                kl = (other - ref_other).detach().mean() if kl is None else kl
                weights = (c["desirable_weight"], c["undesirable_weight"])
                return kto_loss(own, ref_own, rows.good, kl, c["beta"], *weights, denominator=denominator)
            kind = (c["beta"], c["label_smoothing"], self.loss_type)
            loss, stats = dpo_loss(own, other, ref_own, ref_other, *kind, denominator=denominator)
        if c["sft_coef"]:
            sft = -(own / own_length).sum()
            loss = loss + c["sft_coef"] * divide(sft, stats["num_pairs"], denominator)
            stats["sft_loss"] = divide(sft.detach(), stats["num_pairs"], None)
        return loss, stats

    @torch.no_grad()
    def measure(self, rows: AnswerLogprobs) -> dict[str, float]:
        """The loss and its statistics over all of ``rows`` at once.

        For KTO `margin` is the good answers' mean reward less the bad ones', `accuracy` the probability that a good
        answer's reward is above a bad one's; not a number where one of the kinds is missing.
        """
        loss, stats = self.loss(rows)
        values = {"loss": loss.item()} | {name: value.item() for name, value in stats.items()}
        if self.loss_type == "kto":
            assert rows.ref_logps is not None and rows.good is not None
            rewards = rows.logps[:, 0] - rows.ref_logps[:, 0]  # beta does not change their order
            both = 0 < values["num_good"] < len(rewards)
            values["margin"] = values["good_reward"] - values["bad_reward"] if both else math.nan
            values["accuracy"] = probability_above(rewards[rows.good], rewards[~rows.good])
        return values


def probability_above(xs: Tensor, ys: Tensor) -> float:
    """(N,), (M,): the share of all pairs in which x is above y, ties by half: Mann and Whitney's U / (N M), the area
    under the ROC curve. Not a number where either is empty."""
    if not len(xs) or not len(ys):
        return math.nan
    ys = ys.sort().values
    below = torch.searchsorted(ys, xs, right=False) + torch.searchsorted(ys, xs, right=True)
    return (below.double().sum() / (2 * len(xs) * len(ys))).item()
