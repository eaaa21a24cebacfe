"""Model directories: strict loading, growing vocabularies, saved models that any tool loads, score statistics."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dschat.data.tokenizer import load_tokenizer
from dschat.errors import UserError
from dschat.models import create
from dschat.models.load import (
    check_context,
    disable_dropout,
    load_causal_lm,
    load_scorer,
    load_trained_scorer,
    max_positions,
    model_role,
    save_model,
)
from dschat.models.scorer import STATS_FILE, last_token_values, load_score_stats, save_score_stats
from tests import programs
from tests.families import FAMILIES, ragged_prompts, tiny_config, tiny_model

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

FP32 = torch.float32


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture(scope="module")
def policy_dir(model_dirs):
    return model_dirs("llama")


@pytest.fixture(scope="module")
def reward_dir(policy_dir, data_file, cache_dir, tmp_path_factory):
    flags = {"model_name_or_path": policy_dir, "learning_rate": 1e-2}
    return programs.run("reward", data_file, cache_dir, tmp_path_factory.mktemp("reward") / "rm", **flags)


def copied(directory: str, to: Path) -> Path:
    return Path(shutil.copytree(directory, to / "copy"))


# --- strict loading


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(policy_dir, reward_dir, tokenizer, tmp_path):
    unmarked = copied(reward_dir, tmp_path)  # as from the hub: only the architecture tells
    (unmarked / "run.json").unlink()
    for directory in (reward_dir, str(unmarked)):
        with pytest.raises(UserError) as error:
            load_causal_lm(directory, tokenizer, dtype=FP32)
        one_line(error, directory, "is a reward model", "step 1")
        load_trained_scorer(directory, tokenizer, dtype=FP32, normalize=True)
    with pytest.raises(UserError) as error:
        load_trained_scorer(policy_dir, tokenizer, dtype=FP32, normalize=False)
    one_line(error, policy_dir, "is a language model", "step 2")
    with pytest.raises(UserError, match="toy is not a trained reward model"):
        load_trained_scorer("toy", tokenizer, dtype=FP32, normalize=False)


def test_the_role_is_what_run_json_says(reward_dir, policy_dir, tmp_path):
    config = transformers.AutoConfig.from_pretrained(reward_dir)
    assert model_role(reward_dir, config) == "reward"
    assert model_role(policy_dir, transformers.AutoConfig.from_pretrained(policy_dir)) == "policy"
    copy = copied(reward_dir, tmp_path)
    for text, role in (('{"role": "critic"}', "critic"), ('{"role": "policy"}', "policy")):
        (copy / "run.json").write_text(text)
        assert model_role(str(copy), config) == role
    for damaged in ("{", "{}"):
        (copy / "run.json").write_text(damaged)
        with pytest.raises(UserError) as error:
            model_role(str(copy), config)
        one_line(error, "run.json", "damaged")


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_weight_is_named(policy_dir, reward_dir, tokenizer, tmp_path, lost):
    loaders = {
        policy_dir: [lambda path: load_causal_lm(path, tokenizer, dtype=FP32)],
        reward_dir: [
            lambda path: load_trained_scorer(path, tokenizer, dtype=FP32, normalize=True),
            lambda path: load_scorer(path, tokenizer, dtype=FP32),
        ],
    }
    for i, (directory, load) in enumerate((d, load) for d, ls in loaders.items() for load in ls):
        copy = copied(directory, tmp_path / str(i))
        without(copy, lost)
        with pytest.raises(UserError) as error:
            load(str(copy))
        one_line(error, str(copy), lost, "lacks 1 weights")


def without(directory: Path, name: str) -> None:
    file = directory / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})


def test_a_reward_model_without_its_head_is_refused_in_step_3(reward_dir, tokenizer, tmp_path):
    copy = copied(reward_dir, tmp_path)
    without(copy, "score.weight")
    with pytest.raises(UserError) as error:
        load_trained_scorer(str(copy), tokenizer, dtype=FP32, normalize=True)
    one_line(error, "score.weight")


def test_a_classifier_with_two_labels_is_no_reward_model(tokenizer, tmp_path):
    config = tiny_config("llama", tokenizer)
    config.num_labels = 2
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    save_model(model, tokenizer, str(tmp_path))
    with pytest.raises(UserError) as error:
        load_trained_scorer(str(tmp_path), tokenizer, dtype=FP32, normalize=False)
    one_line(error, str(tmp_path), "has 2 labels", "exactly one")


def test_what_is_no_model_directory_is_refused_in_one_line(policy_dir, tokenizer, tmp_path):
    with pytest.raises(UserError) as error:
        load_causal_lm(str(tmp_path / "absent"), tokenizer, dtype=FP32)
    one_line(error, "neither a model directory nor a reachable hub name")
    with pytest.raises(UserError) as error:
        load_causal_lm(str(tmp_path), tokenizer, dtype=FP32)
    one_line(error, "holds no config.json", "give a Hugging Face model directory")
    (tmp_path / "actor").mkdir()
    with pytest.raises(UserError) as error:
        load_causal_lm(str(tmp_path), tokenizer, dtype=FP32)
    one_line(error, "holds no config.json", f"did you mean {tmp_path / 'actor'}?")
    copy = copied(policy_dir, tmp_path)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        load_causal_lm(str(copy), tokenizer, dtype=FP32)
    one_line(error, str(copy), "cannot be loaded")


def test_a_truncated_weight_file_is_a_users_mistake(policy_dir, tokenizer, tmp_path):
    copy = copied(policy_dir, tmp_path)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError) as error:
        load_causal_lm(str(copy), tokenizer, dtype=FP32)
    one_line(error, str(copy), "cannot be loaded")


# --- vocabulary and dropout


def test_embeddings_grow_with_the_tokenizer_and_never_shrink(policy_dir, reward_dir):
    larger = load_tokenizer(policy_dir)
    size = len(larger)
    larger.add_tokens(["quokka", "wombat", "bilby"])
    before = transformers.AutoModelForCausalLM.from_pretrained(policy_dir)
    rows = before.get_input_embeddings().num_embeddings
    model = load_causal_lm(policy_dir, larger, dtype=FP32)
    scorer = load_trained_scorer(reward_dir, larger, dtype=FP32, normalize=False).model
    for grown in (model, scorer):
        embeddings = grown.get_input_embeddings()
        assert size + 3 <= embeddings.num_embeddings < size + 11 and embeddings.num_embeddings % 8 == 0
        assert grown.config.vocab_size == embeddings.num_embeddings == embeddings.weight.shape[0]
        assert torch.isfinite(embeddings.weight).all()
    assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size
    assert model.get_input_embeddings().weight[:rows].equal(before.get_input_embeddings().weight)
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad():
        assert (model.eval()(ids).logits[..., :rows] - before(ids).logits).abs().max() < 1e-5


def test_a_vocabulary_wider_than_the_tokenizer_is_kept(tokenizer, tmp_path):
    wide = tiny_model("llama", tokenizer)
    rows = len(tokenizer) + 37
    wide.resize_token_embeddings(rows)
    save_model(wide, tokenizer, str(tmp_path))
    model = load_causal_lm(str(tmp_path), tokenizer, dtype=FP32)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == rows
    for name, value in wide.state_dict().items():
        assert model.state_dict()[name].equal(value), name


def test_the_model_takes_its_special_tokens_from_the_tokenizer(policy_dir, tokenizer):
    model = load_causal_lm(policy_dir, tokenizer, dtype=FP32)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    assert load_causal_lm(policy_dir, tokenizer, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_rotary_frequencies_are_loaded_in_float32(model_dirs, tokenizer):
    """Rounded to bfloat16 they would turn every position by another angle."""
    where = model_dirs("llama")
    for load in (load_causal_lm, load_scorer):
        expected, found = (
            {n: b for n, b in load(where, tokenizer, dtype=dtype).named_buffers() if "inv_freq" in n}
            for dtype in (FP32, torch.bfloat16)
        )
        assert expected.keys() == found.keys() and expected
        assert all(found[name].dtype == FP32 and found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_0_turns_every_dropout_off(family, tokenizer, tmp_path):
    """Whatever the config of the family calls them: a forward in train mode is that in eval mode."""
    config = tiny_config(family, tokenizer)
    names = [name for name, value in config.to_dict().items() if ("drop" in name) and isinstance(value, (int, float))]
    names = [name for name in names if name not in ("layerdrop", "classifier_dropout")]
    assert names
    for name in names:
        setattr(config, name, 0.5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    save_model(model, tokenizer, str(tmp_path))
    ids, mask = ragged_prompts(tokenizer)

    def logits(model):
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask.long()).logits[mask]

    noisy = load_causal_lm(str(tmp_path), tokenizer, dtype=FP32).train()
    assert not logits(noisy).equal(logits(noisy))
    exact = load_causal_lm(str(tmp_path), tokenizer, dtype=FP32, dropout=0.0)
    expected = logits(exact.eval())
    exact.train()
    assert (logits(exact) - expected).abs().max() < 1e-5
    scorer = load_scorer(str(tmp_path), tokenizer, dtype=FP32, dropout=0.0)
    save_model(scorer, tokenizer, str(tmp_path))
    trained = load_trained_scorer(str(tmp_path), tokenizer, dtype=FP32, normalize=False).model
    for classifier in (scorer, trained):
        with torch.no_grad():
            one, other = (classifier.train(mode)(ids, attention_mask=mask.long()).logits for mode in (True, False))
        assert (one - other).abs().max() < 1e-5


def test_dropout_can_be_raised(tokenizer):
    model = tiny_model("gpt2", tokenizer)
    disable_dropout(model, 0.25)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.25}


def test_context_limits(tokenizer):
    config = tiny_config("llama", tokenizer)
    check_context(config, 256, "--max_seq_len")
    with pytest.raises(UserError) as error:
        check_context(config, 257, "--max_seq_len")
    one_line(error, "--max_seq_len", "257", "256")
    assert max_positions(tiny_config("bloom", tokenizer)) is None  # ALiBi has no limit
    assert max_positions(tiny_config("gpt2", tokenizer)) == max_positions(tiny_config("opt", tokenizer)) == 256


# --- scorers


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bloom"])
def test_a_new_head_has_the_spread_of_stiennon_and_the_trunk_of_the_model(family, model_dirs, tokenizer):
    """N(0, 1 / (d + 1)), so that first scores are of the order of 1; here d = 32, for OPT 16."""
    torch.manual_seed(0)
    heads = [load_scorer(model_dirs(family), tokenizer, dtype=FP32).score for _ in range(40)]
    width = heads[0].in_features
    assert width == (16 if family == "opt" else 32)
    weights = torch.cat([head.weight.flatten() for head in heads])
    assert heads[0].weight.shape == (1, width) and not heads[0].weight.equal(heads[1].weight)
    assert weights.std().item() == pytest.approx(1 / math.sqrt(width + 1), rel=0.1)
    assert abs(weights.mean().item()) < 0.03
    scorer = load_scorer(model_dirs(family), tokenizer, dtype=FP32)
    policy = load_causal_lm(model_dirs(family), tokenizer, dtype=FP32)
    trunk = policy.base_model.state_dict()
    assert all(value.equal(trunk[name]) for name, value in scorer.base_model.state_dict().items())


def test_a_trained_head_is_kept(reward_dir, tokenizer):
    weight = load_file(Path(reward_dir) / "model.safetensors")["score.weight"]
    assert load_scorer(reward_dir, tokenizer, dtype=FP32).score.weight.equal(weight)
    assert load_trained_scorer(reward_dir, tokenizer, dtype=FP32, normalize=True).model.score.weight.equal(weight)


def test_score_statistics_survive_the_disk(reward_dir, tokenizer, tmp_path):
    save_score_stats(str(tmp_path), -22.6, 0.75)
    assert load_score_stats(str(tmp_path)) == pytest.approx((-22.6, 0.75))
    copy = copied(reward_dir, tmp_path)
    save_score_stats(str(copy), -3.0, 2.0)
    raw = load_trained_scorer(str(copy), tokenizer, dtype=FP32, normalize=False)
    normalized = load_trained_scorer(str(copy), tokenizer, dtype=FP32, normalize=True)
    ids, mask = ragged_prompts(tokenizer)
    with torch.no_grad():
        values, shifted = (scorer.eval()(ids, mask) for scorer in (raw, normalized))
    assert ((values + 3.0) / 2.0 - shifted)[mask].abs().max() < 1e-5
    assert values.dtype == FP32 and values.shape == ids.shape


def test_damaged_score_statistics_are_a_users_mistake(reward_dir, tokenizer, tmp_path):
    copy = copied(reward_dir, tmp_path)
    file = copy / STATS_FILE
    whole = file.read_bytes()

    def cut():
        file.write_bytes(whole[:-3])

    def without_std():
        save_file({"mean": torch.tensor([1.0])}, file)

    for damage in (cut, without_std):
        damage()
        with pytest.raises(UserError) as error:
            load_trained_scorer(str(copy), tokenizer, dtype=FP32, normalize=True)
        one_line(error, STATS_FILE)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan])
def test_scores_without_a_spread_are_refused(reward_dir, tokenizer, tmp_path, std):
    copy = copied(reward_dir, tmp_path)
    save_score_stats(str(copy), 1.0, std)
    with pytest.raises(UserError) as error:
        load_trained_scorer(str(copy), tokenizer, dtype=FP32, normalize=True)
    one_line(error, STATS_FILE, "no spread")


def test_missing_score_statistics_are_named_with_the_way_out(reward_dir, tokenizer, tmp_path):
    copy = copied(reward_dir, tmp_path)
    (copy / STATS_FILE).unlink()
    with pytest.raises(UserError) as error:
        load_trained_scorer(str(copy), tokenizer, dtype=FP32, normalize=True)
    one_line(error, STATS_FILE, "is missing", "--no-normalize_reward")
    scorer = load_trained_scorer(str(copy), tokenizer, dtype=FP32, normalize=False)
    assert (scorer.mean, scorer.std) == (0.0, 1.0)


def test_the_last_real_token_is_found_on_either_side_of_padding():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]])
    assert last_token_values(values, mask).tolist() == [2.0, 4.0, 4.0, 2.0]
    assert last_token_values(values, mask.bool()).tolist() == [2.0, 4.0, 4.0, 2.0]


# --- saved directories elsewhere


def test_saved_directories_load_in_a_fresh_process_with_plain_transformers(
    policy_dir, reward_dir, tokenizer, tmp_path
):
    """No dschat, no network, an empty cache: equal logits and scores, the same chat template, the same end."""
    grown = load_tokenizer(policy_dir)
    grown.add_tokens(["quokka"])
    model = load_causal_lm(policy_dir, grown, dtype=FP32).eval()
    save_model(model, grown, str(tmp_path / "policy"))
    scorer = load_trained_scorer(reward_dir, tokenizer, dtype=FP32, normalize=False).eval()
    save_model(scorer.model, tokenizer, str(tmp_path / "critic"))
    messages = [{"role": "user", "content": "what is the colour of the sky?"}]
    script = f"""
import json, sys
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
root = {str(tmp_path)!r}
tokenizer = AutoTokenizer.from_pretrained(root + "/policy")
text = tokenizer.apply_chat_template({messages!r}, tokenize=False, add_generation_prompt=True)
ids = tokenizer(text + " quokka", return_tensors="pt", add_special_tokens=False).input_ids
model, info = AutoModelForCausalLM.from_pretrained(root + "/policy", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
other, info = AutoModelForSequenceClassification.from_pretrained(root + "/critic", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and other.config.num_labels == 1, info
defaults = model.generation_config
print(json.dumps({{
    "text": text, "ids": ids[0].tolist(), "logits": model.eval()(ids).logits[0, -1].tolist(),
    "score": other.eval()(ids[:, :-1]).logits[0, 0].item(), "template": tokenizer.chat_template,
    "ends": [tokenizer.eos_token_id, tokenizer.pad_token_id, defaults.eos_token_id, defaults.pad_token_id],
    "dschat": "dschat" in sys.modules,
}}))
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["dschat"]
    text = grown.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([grown(text + " quokka", add_special_tokens=False).input_ids])
    assert (found["text"], found["ids"], found["template"]) == (text, ids[0].tolist(), grown.chat_template)
    assert len(grown) - 1 in found["ids"]  # the token that was added
    eos, pad = grown.eos_token_id, grown.pad_token_id
    assert found["ends"] == [eos, pad, eos, pad]
    with torch.no_grad():
        assert found["logits"] == pytest.approx(model(ids).logits[0, -1].tolist(), abs=1e-5)
        shorter = ids[:, :-1]
        assert found["score"] == pytest.approx(scorer(shorter, torch.ones_like(shorter))[0, -1].item(), abs=1e-5)


def test_bfloat16_weights_are_saved_and_loaded_as_they_are(policy_dir, tokenizer, tmp_path):
    model = load_causal_lm(policy_dir, tokenizer, dtype=torch.bfloat16)
    save_model(model, tokenizer, str(tmp_path))
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    again = load_causal_lm(str(tmp_path), tokenizer, dtype=torch.bfloat16)
    assert all(value.equal(model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_created_model_is_one_that_step_1_accepts(data_file, cache_dir, tmp_path):
    made = tmp_path / "made"
    argv = ["--data_path", data_file, "--data_output_path", cache_dir, "--output_dir", str(made)]
    argv += ["--vocab_size", "400", "--hidden_size", "32", "--num_hidden_layers", "2", "--seed", "3"]
    create.main([*argv, "--max_position_embeddings", "128"])
    record = json.loads((made / "run.json").read_text())
    tokenizer = load_tokenizer(str(made))
    model = load_causal_lm(str(made), tokenizer, dtype=FP32)
    assert record["role"] == "policy" and record["metrics"]["num_parameters"] == model.num_parameters()
    assert model.config.vocab_size == len(tokenizer) <= 400 and model.config.num_hidden_layers == 2
    assert (model.config.hidden_size, model.config.max_position_embeddings) == (32, 128)
    assert tokenizer.chat_template and tokenizer.pad_token_id != tokenizer.eos_token_id
    trained = programs.run("sft", data_file, cache_dir, tmp_path / "sft", model_name_or_path=made)
    assert load_tokenizer(trained).get_vocab() == tokenizer.get_vocab()
    weights = [load_file(Path(d) / "model.safetensors")["model.norm.weight"] for d in (made, trained)]
    assert not weights[0].equal(weights[1])

    again = tmp_path / "again"
    create.main([*argv[:4], "--output_dir", str(again), *argv[6:], "--max_position_embeddings", "128"])
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--hidden_size must be an even multiple"):
        create.main([*argv, "--num_attention_heads", "32"])
