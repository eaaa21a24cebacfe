"""Every supported family goes through the three stages and chat, and its log-probabilities are exact under padding."""

import json
from pathlib import Path

from dschat.functional import token_logprobs
from dschat.models.forward import response_logits
from dschat.models.scorer import Scorer, last_token_values
from dschat.rlhf.rollout import Sampling, banned_token_ids, generate, row_uniforms
from tests.families import FAMILIES, ragged_prompts, tiny_config, tiny_model
from tests.programs import run_stages

import pytest
import torch
import transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_and_the_trainer_agree_with_ragged_prompts(family, tokenizer):
    model = tiny_model(family, tokenizer)
    ids, mask = ragged_prompts(tokenizer)
    sampling = Sampling(20, temperature=0.7, banned_ids=banned_token_ids(tokenizer, model.config.vocab_size))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rollout = generate(model, ids, mask, sampling, row_uniforms(4, 20, 1), **ends)
    both = torch.cat([rollout.input_ids, rollout.response_ids], 1)
    both_mask = torch.cat([rollout.attention_mask, rollout.response_mask], 1)
    with torch.no_grad():
        logits = response_logits(model, model, both, both_mask, rollout.response_ids.shape[1])
        trained = token_logprobs(logits, rollout.response_ids, **sampling.scored)
    assert rollout.response_mask.sum() > 40
    assert (trained - rollout.logprobs)[rollout.response_mask].abs().max() < 1e-4

    # An independent reference: each row alone, without padding, one plain forward of transformers, in float64.
    exact = model.double()
    for row in range(4):
        response = rollout.response_ids[row, rollout.response_mask[row]]
        alone = torch.cat([ids[row, mask[row]], response])[None]
        with torch.no_grad():
            logits = exact(input_ids=alone).logits[0, -len(response) - 1 : -1] / 0.7
        logits[:, list(sampling.banned_ids)] = float("-inf")
        expected = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        assert (expected - rollout.logprobs[row, : len(response)]).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_what_plain_transformers_says_on_either_padding_side(family, tokenizer):
    torch.manual_seed(0)
    config = tiny_config(family, tokenizer)
    config.num_labels = 1
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    ids, mask = ragged_prompts(tokenizer)
    with torch.no_grad():
        left = last_token_values(Scorer(model)(ids, mask), mask)
        rows = [torch.cat([ids[r, mask[r]], ids[r, ~mask[r]]]) for r in range(4)]
        right_mask = mask.flip(1)
        right = last_token_values(Scorer(model)(torch.stack(rows), right_mask), right_mask)
        alone = torch.stack([model(input_ids=ids[r, mask[r]][None]).logits[0, 0] for r in range(4)])
        plain = model(input_ids=torch.stack(rows), attention_mask=right_mask.long()).logits[:, 0]
    for score in (left, right, plain):
        assert (score - alone).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_three_stages_and_chat(family, model_dirs, data_file, cache_dir, tmp_path):
    from inference.chatbot import load_chatbot

    out = run_stages(model_dirs(family), data_file, cache_dir, tmp_path)
    text = (Path(out["ppo"]) / "metrics.jsonl").read_text(encoding="utf-8")
    assert any("policy/loss" in json.loads(line) for line in text.splitlines())
    bot = load_chatbot(str(Path(out["ppo"]) / "actor"), Sampling(5, temperature=0.0))
    assert isinstance("".join(bot.reply([{"role": "user", "content": "hello"}])), str)
