"""An answer token by token: how likely it was, how far another model is from this one there, what the reward says."""

from collections.abc import Sequence
from dataclasses import dataclass

from dschat.data.records import Message
from dschat.data.templates import encode_answers
from dschat.functional import full_kl, token_logprobs
from inference.chatbot import Chatbot
from inference.scores import AnswerScorer

import torch
from torch import Tensor


@dataclass
class TokenNumbers:
    """Of each token of an answer, its end token included; nats. None where there is nothing to say it with."""

    model: str
    texts: list[str]
    logprobs: list[float]  # at temperature 1
    other: str | None
    kl: list[float] | None  # KL(model || other) over the vocabulary, of the choice of this token
    values: list[float] | None  # the reward model's score of the dialogue up to and with this token


def token_numbers(
    bots: dict[str, Chatbot],
    name: str,
    others: Sequence[str],
    scorer: AnswerScorer | None,
    prompt: Sequence[Message],
    answer: str,
) -> TokenNumbers:
    """``others``: a model to compare with, or none; it must read the dialogue as the same tokens. The answer is
    tokenised anew from its text."""
    bot = bots[name]
    ((ids, mask),) = encode_answers(bot.tokenizer, prompt, [answer])
    size = mask[::-1].index(False) if False in mask else len(mask)
    start = max(0, len(ids) - int(min(len(ids), bot.context)))
    ids, size = ids[start:], min(size, len(ids) - start - 1)
    logits = _logits(bot, ids, size)
    tokens = torch.tensor([ids[-size:]])
    banned = bot.sampling.banned_ids  # of both: infinite where only the other bans
    found = TokenNumbers(
        name,
        [bot.tokenizer.decode([token]) for token in ids[-size:]],
        token_logprobs(logits, tokens, banned_ids=banned)[0].tolist(),
        None,
        None,
        None,
    )
    for other in others:
        same = encode_answers(bots[other].tokenizer, prompt, [answer])[0][0][start:] == ids
        other_logits = _logits(bots[other], ids, size) if same else logits[..., :0]
        if other_logits.shape == logits.shape:
            found.other, found.kl = other, full_kl(logits, other_logits, banned_ids=banned)[0].tolist()
    if scorer is not None:
        values = scorer.values(prompt, answer)
        if [token for token, _ in values[-size:]] == ids[-size:]:
            found.values = [value for _, value in values[-size:]]
    return found


def _logits(bot: Chatbot, ids: list[int], size: int) -> Tensor:
    """(1, size, V) float32 on the CPU: what predicts the last ``size`` of ``ids``; computed between two steps."""

    @torch.no_grad()
    def compute() -> Tensor:
        given = torch.tensor([ids], device=bot.model.device)
        return bot.model(input_ids=given, use_cache=False, logits_to_keep=size + 1).logits[:, :-1].float().cpu()

    return bot.decoder.call(compute).result()
