"""Statistics and probe texts beside a reward model: what step 2 stores, and what step 3 refuses to load."""

import json
import shutil
from pathlib import Path

from dschat.data.tokenizer import load_tokenizer, train_tokenizer
from dschat.errors import UserError
from dschat.models.load import load_scorer, load_trained_scorer, save_model
from dschat.models.scorer import (
    STATS_FILE,
    Probes,
    Scorer,
    check_probes,
    load_score_stats,
    make_probes,
    probe_tolerance,
    save_score_stats,
)
from tests import programs

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

FP32, BF16 = torch.float32, torch.bfloat16
WRONG = "does not score its own probe texts as it did when it was trained"


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture(scope="module")
def reward_dir(model_dirs, data_file, cache_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("reward")
    held_out = root / "held_out.jsonl"
    with open(data_file, encoding="utf-8") as file:
        held_out.write_text("".join(line.replace("Human: ", "Human: held out ") for line in file), encoding="utf-8")
    flags = {"model_name_or_path": model_dirs("llama"), "learning_rate": 1e-2, "eval_data_path": held_out}
    return programs.run("reward", data_file, cache_dir, root / "rm", **flags)


@pytest.fixture
def copied(reward_dir, tmp_path) -> Path:
    return Path(shutil.copytree(reward_dir, tmp_path / "copy"))


def load(directory, dtype: torch.dtype = FP32, **options) -> Scorer:
    path = str(directory)
    return load_trained_scorer(path, load_tokenizer(path), dtype=dtype, **{"normalize": True} | options)


def refused(directory, *parts: str, dtype: torch.dtype = FP32) -> None:
    with pytest.raises(UserError) as error:
        load(directory, dtype)
    one_line(error, str(directory), *(parts or (WRONG, "--no-normalize_reward")))
    load(directory, dtype, normalize=False)  # the way out


# --- what step 2 stores


def test_step_2_stores_its_held_out_texts_and_their_scores(reward_dir, tokenizer):
    """Against the scores of plain transformers for the texts, spelled out."""
    stats = load_file(Path(reward_dir) / STATS_FILE)
    mean, std = load_score_stats(reward_dir)
    assert stats["probes"].dtype == torch.uint8 and stats["probe_scores"].shape == (8,)
    probes = json.loads(bytes(stats["probes"].tolist()).decode("utf-8"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward_dir).eval()
    for probe, score in zip(probes, stats["probe_scores"].tolist(), strict=True):
        [turn] = probe["messages"]
        assert turn["role"] == "user" and "Human: held out" in turn["content"] and "<|" not in turn["content"]
        assert probe["response"] and "<|" not in probe["response"]
        content = turn["content"].replace("\n\nHuman:", "\n\n Human:").replace("\n\nAssistant:", "\n\n Assistant:")
        text = f"\n\nHuman: {content}\n\nAssistant: {probe['response']}<|endoftext|>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            assert (model(ids).logits.item() - mean) / std == pytest.approx(score, abs=1e-4)
    prompts = [probe["messages"][0]["content"] for probe in probes]
    assert prompts[::2] == prompts[1::2] and len(set(prompts)) == 4  # chosen and rejected of four pairs
    assert len({probe["response"] for probe in probes}) > 4
    assert stats["probe_scores"].std() > 0.1


def test_a_long_pair_is_cut_and_one_that_the_context_cannot_hold_left_out(tokenizer, model_dirs):
    words = tokenizer(" the cat sat on the mat" * 100, add_special_tokens=False)["input_ids"]
    pairs = [
        {"input_ids": [words[:200], words[:3], [*words[:100], tokenizer.eos_token_id]], "prompt_len": 100},
        {"input_ids": [words[:9], words[:12]], "prompt_len": 5},
    ]
    classifier = load_scorer(model_dirs("llama"), tokenizer, dtype=FP32)
    whole = make_probes(Scorer(classifier), pairs, tokenizer)
    [first, second, *_] = whole.dialogues
    assert first["messages"][0]["content"] == tokenizer.decode(words[36:100]).strip()
    assert first["response"] == tokenizer.decode(words[100:164]).strip() and second["response"] == ""
    assert len(whole.scores) == 4
    classifier.config.max_position_embeddings = 30
    assert make_probes(Scorer(classifier), pairs, tokenizer).dialogues == whole.dialogues[2:]
    classifier.config.max_position_embeddings = 5
    assert len(make_probes(Scorer(classifier), pairs, tokenizer).scores) == 0


# --- what step 3 loads


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_step_2_saved_is_accepted(reward_dir, dtype):
    scorer = load(reward_dir, dtype, device=torch.device("cpu"))
    assert (scorer.mean, scorer.std) == load_score_stats(reward_dir) and scorer.model.dtype == dtype


def test_the_model_is_put_where_it_is_wanted(reward_dir):
    assert load(reward_dir, verify=False, device=torch.device("meta")).model.device.type == "meta"


def test_a_model_of_half_precision_is_accepted_in_either(model_dirs, data_file, cache_dir, tmp_path):
    flags = {"model_name_or_path": model_dirs("gpt2"), "learning_rate": 1e-2, "dtype": "bf16"}
    directory = programs.run("reward", data_file, cache_dir, tmp_path / "rm", **flags)
    assert load_file(Path(directory) / STATS_FILE)["probe_scores"].dtype == BF16
    for dtype in (BF16, FP32):
        load(directory, dtype)


def test_what_rounding_explains():
    scorer = Scorer(transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=1
    )), mean=30.0, std=0.5)  # fmt: skip
    stored = torch.tensor([-2.0, 4.0])  # raw 29 and 32
    assert probe_tolerance(stored, scorer) == pytest.approx(1e-3 + 2 * 2**-23 * 32 / 0.5, rel=1e-6)
    assert probe_tolerance(stored.to(BF16), scorer) == pytest.approx(0.1 + 2 * 2**-7 * 32 / 0.5, rel=1e-6)
    scorer.model.to(torch.float16)
    assert probe_tolerance(stored, scorer) == pytest.approx(0.1 + 2 * 2**-10 * 32 / 0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("changed", ["score.weight", "model.layers.1.mlp.down_proj.weight"])
def test_changed_weights_are_refused(copied, dtype, changed):
    file = copied / "model.safetensors"
    weights = load_file(file)
    weights[changed] = weights[changed] * (1.01 if dtype == FP32 else 2.0)
    save_file(weights, file, metadata={"format": "pt"})
    refused(copied, dtype=dtype)


@pytest.mark.parametrize(("name", "by"), [("mean", 0.01), ("std", 0.01), ("mean", -1.0), ("std", 5.0)])
def test_changed_statistics_are_refused(copied, name, by):
    stats = load_file(copied / STATS_FILE)
    stats[name] = stats[name] + by * stats["std"]
    save_file(stats, copied / STATS_FILE)
    refused(copied)


def test_statistics_of_another_run_are_refused(copied, model_dirs, tokenizer, tmp_path):
    model = load_scorer(model_dirs("llama"), tokenizer, dtype=FP32)
    pairs = [{"input_ids": [[40, 50, 60, 0], [40, 50, 70, 0]], "prompt_len": 2}]
    mean, std = load_score_stats(str(copied))
    save_score_stats(str(copied), mean, std, make_probes(Scorer(model), pairs, tokenizer))
    refused(copied)


@pytest.mark.parametrize("change", ["permuted", "template", "larger", "other"])
def test_a_changed_tokenizer_is_refused(copied, change):
    if change == "permuted":
        backend = json.loads((copied / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = backend["model"]["vocab"]
        vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
        (copied / "tokenizer.json").write_text(json.dumps(backend), encoding="utf-8")
    else:
        tokenizer = load_tokenizer(str(copied))
        if change == "template":
            tokenizer.chat_template = tokenizer.chat_template.replace("Human", "User")
        elif change == "larger":  # ids beyond the model's embeddings
            tokenizer.add_tokens([f"token{i}" for i in range(100)] + ["the", "Human"])
        else:
            tokenizer = train_tokenizer(["quite another text"], 280)
        tokenizer.save_pretrained(copied)
    own = load_tokenizer(str(copied))
    with pytest.raises(UserError) as error:
        check_probes(str(copied), load(copied, verify=False) if change != "larger" else small(copied))
    one_line(error, str(copied), WRONG)
    with pytest.raises(UserError) as error:
        load_trained_scorer(str(copied), own, dtype=FP32, normalize=True)
    one_line(error, str(copied), WRONG)


def small(directory: Path) -> Scorer:
    """Without the embeddings that loading would add for a larger tokenizer."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    return Scorer(model, *load_score_stats(str(directory)))


def test_scores_that_are_not_numbers_are_refused(copied):
    file = copied / "model.safetensors"
    weights = load_file(file)
    weights["score.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    refused(copied, WRONG, "nan")


def test_the_check_can_be_left_to_another_load_of_the_same_directory(copied):
    stats = load_file(copied / STATS_FILE)
    save_file(stats | {"mean": stats["mean"] + 1}, copied / STATS_FILE)
    assert load(copied, verify=False).mean == pytest.approx(stats["mean"].item() + 1)


def test_statistics_without_probes_load_as_those_of_a_critic(copied):
    for probes in (None, Probes([], torch.empty(0))):
        save_score_stats(str(copied), -3.0, 2.0, probes)
        assert load_file(copied / STATS_FILE).keys() == {"mean", "std"}
        scorer = load(copied)
        assert (scorer.mean, scorer.std) == (-3.0, 2.0)


@pytest.mark.parametrize("damage", ["scores missing", "texts missing", "no json", "no dialogues", "fewer", "empty"])
def test_damaged_probes_are_a_users_mistake(copied, damage):
    stats = load_file(copied / STATS_FILE)

    def text(content: str) -> torch.Tensor:
        return torch.tensor(list(content.encode()), dtype=torch.uint8)

    if damage == "scores missing":
        del stats["probe_scores"]
    elif damage == "texts missing":
        del stats["probes"]
    elif damage == "fewer":
        stats["probe_scores"] = stats["probe_scores"][:3].clone()
    elif damage == "empty":
        stats |= {"probes": text("[]"), "probe_scores": torch.empty(0)}
    else:
        stats["probes"] = text("[{" if damage == "no json" else '[{"response": "a"}]')
    save_file(stats, copied / STATS_FILE)
    refused(copied, STATS_FILE, "is damaged", "again")


def test_a_reward_model_that_reads_one_position_only_is_refused(tokenizer, tmp_path):
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=1,
    )  # fmt: skip
    save_model(transformers.BertForSequenceClassification(config), tokenizer, str(tmp_path))
    with pytest.raises(UserError) as error:
        load_trained_scorer(str(tmp_path), tokenizer, dtype=FP32, normalize=False)
    one_line(error, str(tmp_path), "BertForSequenceClassification", "api:URL")
