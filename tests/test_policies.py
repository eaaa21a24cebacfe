"""Several models side by side: their names and contexts, and the prompts that all of them can be asked."""

import json

from dschat.data import toy
from dschat.data.sources import load_stage_data
from dschat.data.templates import encode_prompt
from dschat.data.tokenizer import train_tokenizer
from dschat.errors import UserError
from dschat.models.load import save_model
from dschat.rlhf.policies import Policy, answer_room, distinct_names, fit_prompts, load_prompts, open_policies, spread
from tests.conftest import SENTENCES
from tests.dialogues import user
from tests.ppo_parts import tiny_scorer

import pytest
import torch


@pytest.fixture(scope="module")
def other_tokenizer():
    return train_tokenizer([f"Human and Assistant talk about {sentence}" for sentence in SENTENCES], 330)


@pytest.fixture(scope="module")
def reward_dir(tokenizer, tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("reward"))
    save_model(tiny_scorer("llama", tokenizer, seed=2).model, tokenizer, directory)
    return directory


def test_names_are_as_short_as_they_can_be(tmp_path, monkeypatch):
    assert distinct_names(["a/sft", "b/dpo/"]) == ["sft", "dpo"]
    assert distinct_names(["a/sft", "b/actor", "c/actor"]) == ["sft", "b/actor", "c/actor"]
    assert distinct_names(["x/a/m", "y/a/m", "y/b/m"]) == ["x/a/m", "y/a/m", "b/m"]
    assert distinct_names(["m", "x/m"]) == ["m", "x/m"]
    assert distinct_names(["a/m", "a/m", "a/m"]) == ["m", "m#2", "m#3"]
    (tmp_path / "run" / "actor").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "actor")
    assert distinct_names([".", "elsewhere"]) == ["actor", "elsewhere"]
    assert distinct_names([".", str(tmp_path / "run" / "actor")]) == ["actor", "actor#2"]


def test_models_are_opened_without_their_weights_and_loaded_with_them(model_dirs, reward_dir):
    opened = open_policies([model_dirs("llama"), model_dirs("bloom")], "auto")
    assert [(policy.name, policy.num_positions) for policy in opened] == [("llama", 256), ("bloom", None)]
    model = opened[0].load(torch.bfloat16, torch.device("cpu"))
    assert model.dtype == torch.bfloat16 and not model.training
    for path, told in {
        "toy": "the embedded model has no trained weights",
        reward_dir: "is a reward model, not a language model; give it as --reward or --judge",
        "no/such/model": "no/such/model is neither a model directory nor a reachable hub name",
    }.items():
        with pytest.raises(UserError, match=told):
            open_policies([model_dirs("llama"), path], "auto")


def policy(tokenizer, num_positions, name="m"):
    return Policy(name, f"path/{name}", tokenizer, num_positions)


def test_the_longest_answer_leaves_room_for_prompts(tokenizer):
    several = [policy(tokenizer, size) for size in (1000, None, 300)]
    assert answer_room(several, 0) == 150
    assert answer_room([policy(tokenizer, None)], 0) == answer_room([policy(tokenizer, 4096)], 0) == 256
    assert answer_room(several, 299) == 299
    with pytest.raises(UserError, match="--max_new_tokens 300 leaves no room for a prompt: .* has 300 positions"):
        answer_room(several, 300)


def test_prompts_are_spread_evenly():
    assert spread(10, 0) == spread(10, 10) == spread(10, 99) == list(range(10))
    assert spread(10, 1) == [0] and spread(10, 4) == [0, 2, 5, 7] and spread(300, 3) == [0, 100, 200]


def row(*texts, **record):
    return {"messages": user(*texts), "record": json.dumps(record)}


def test_all_models_are_asked_the_same_dialogue_that_all_can_hold(tokenizer, other_tokenizer):
    long = row("one one one", "two two two", "three three three", "four four four", "five", number=1)
    rows = [row("short"), long, row("far " * 60), row("end")]
    sizes = {
        name: [len(encode_prompt(t, long["messages"][cut:])) for cut in (0, 2, 4)]
        for name, t in (("a", tokenizer), ("b", other_tokenizer))
    }
    assert sizes["a"][0] > sizes["a"][1] > sizes["a"][2]
    # The second model has room for the last two of three questions, the first for all; 7 tokens are the answer's.
    both = [policy(tokenizer, 200, "a"), policy(other_tokenizer, sizes["b"][1] + 7, "b")]
    fitted, counter = fit_prompts(rows, both, 0, 7)
    assert [x["messages"] for x in fitted] == [user("short"), long["messages"][2:], user("end")]
    assert json.loads(fitted[1]["record"]) == {"number": 1}
    assert counter == {"dialogue shortened by whole turns": 1, "prompt too long for a model": 1}
    assert fit_prompts(rows, both, 0, 8)[0][1]["messages"] == long["messages"][4:], "one token more for the answer"
    fitted, counter = fit_prompts(rows, both[:1], 0, 7)
    assert [x["messages"] for x in fitted] == [x["messages"] for x in rows] and not counter
    fitted, _ = fit_prompts([long], [policy(tokenizer, None)], sizes["a"][1], 7)
    assert fitted[0]["messages"] == long["messages"][2:], "--max_prompt_seq_len where there is no context"
    assert fit_prompts([long], [policy(tokenizer, None)], sizes["a"][0], 7)[0][0]["messages"] == long["messages"]


def test_prompts_that_no_model_can_be_asked_are_refused(tokenizer, other_tokenizer):
    with pytest.raises(UserError, match="none of the 1 prompts fits; give a larger --max_prompt_seq_len"):
        fit_prompts([row("hello")], [policy(tokenizer, 300)], 1, 10)
    picky = train_tokenizer(SENTENCES, 300)
    picky.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="path/b: the chat template cannot render this .no system role."):
        fit_prompts([row("hello")], [policy(tokenizer, 300), policy(picky, 300, "b")], 0, 10)


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def prompts_of(*paths, tokenizer, cache_dir, eval_fraction=0.0, seed=7, skip=False):
    options = {"eval_fraction": eval_fraction, "seed": seed, "cache_dir": cache_dir, "skip_bad_records": skip}
    return load_prompts(paths, tokenizer, **options)


def test_every_different_prompt_of_a_file_is_asked(tmp_path, tokenizer, cache_dir):
    first = write_lines(tmp_path / "a.jsonl", *({"prompt": f"why {i % 5}?"} for i in range(8)))
    second = write_lines(tmp_path / "b.jsonl", {"prompt": "x " * 400, "response": "good", "level": 3})
    rows, left_out = prompts_of(first, f"{second}:0.5", tokenizer=tokenizer, cache_dir=cache_dir)
    asked = [x["messages"][0]["content"] for x in rows]
    assert asked == [f"why {i}?" for i in range(5)] + [("x " * 400).strip()]
    assert left_out == {"prompt seen before": 3}
    assert json.loads(rows[5]["record"])["responses"] == ["good"]


def test_of_data_that_was_trained_on_only_what_the_stages_hold_out(data_file, tokenizer, cache_dir):
    options = {"tokenizer": tokenizer, "cache_dir": cache_dir}
    everything, _ = prompts_of(data_file, **options)
    rows, _ = prompts_of(data_file, eval_fraction=0.2, seed=7, **options)
    _, held_out, _ = load_stage_data([data_file], [], "sft", "1,0,0", 0.2, 7, cache_dir)
    assert [x["messages"] for x in rows] == [x["prompt"] for x in held_out]
    assert len(everything) == 40 and len(rows) == 8
    with pytest.raises(UserError, match="--eval_fraction 1.5"):
        prompts_of(data_file, eval_fraction=1.5, **options)


def test_a_source_with_a_test_split_gives_that(tokenizer, cache_dir):
    rows, _ = prompts_of("toy", tokenizer=tokenizer, cache_dir=cache_dir, eval_fraction=0.5)
    assert {x["messages"][0]["content"] for x in rows} == {question for _, question in toy.questions("eval")}
    assert len(rows) == 300


def test_bad_files_and_records(tmp_path, tokenizer, cache_dir):
    options = {"tokenizer": tokenizer, "cache_dir": cache_dir}
    with pytest.raises(UserError, match="no such file"):
        prompts_of(str(tmp_path / "none.jsonl"), **options)
    bad = write_lines(tmp_path / "bad.jsonl", {"prompt": "a"}, {"nothing": 1})
    with pytest.raises(UserError, match="bad.jsonl:2"):
        prompts_of(bad, **options)
    rows, left_out = prompts_of(bad, skip=True, **options)
    assert len(rows) == 1 and left_out == {"bad record": 1}
