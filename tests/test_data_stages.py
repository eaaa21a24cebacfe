"""Examples -> rows of token ids for each stage: what is kept, cut, dropped, counted and cached."""

import json
from collections import Counter

from dschat.data import stages
from dschat.data.sources import load_examples, load_stage_data
from dschat.data.stages import (
    drop_first_turn,
    tokenize_feedback,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_rankings,
    tokenize_sft,
    tokenizer_hash,
)
from dschat.data.tables import FEATURES
from dschat.data.tokenizer import train_tokenizer
from dschat.errors import UserError

import datasets
import pytest

TOKENIZER = train_tokenizer([], 258)  # bytes only: a character of ASCII is a token
EOS = "<|endoftext|>"


def turns(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def examples(*rows):
    columns = {name: FEATURES[name] for name in ("prompt", "responses", "ranks", "margin", "metadata", "source")}
    rows = [{"margin": None, "metadata": "", "source": "s", "responses": [], "ranks": []} | row for row in rows]
    return datasets.Dataset.from_list(rows, features=datasets.Features(columns))


def text(ids):
    return TOKENIZER.decode(ids)


def test_sft_rows_are_the_best_ranked_responses():
    table, counter = tokenize_sft(
        examples({"prompt": turns("a", "b", "c"), "responses": ["x", "y", "z"], "ranks": [1, 2, 1]}), TOKENIZER, 100
    )
    dialogue = f"\n\nHuman: a\n\nAssistant: b{EOS}\n\nHuman: c\n\nAssistant:"
    assert [text(ids) for ids in table["input_ids"]] == [f"{dialogue} x{EOS}", f"{dialogue} z{EOS}"]
    learned = [[token for token, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m] for row in table]
    assert [text(ids) for ids in learned] == [f" b{EOS} x{EOS}", f" b{EOS} z{EOS}"]
    assert not counter and table.column_names == ["input_ids", "loss_mask"]


# "\n\nHuman: q\n\nAssistant:" is 22 bytes, " x" + EOS is 3, "\n\nHuman: a\n\nAssistant: b" + EOS is 25.
def test_sft_over_long_loses_whole_turns_then_the_end_of_the_answer():
    row = {"prompt": [{"role": "system", "content": "S"}, *turns("a", "b", "q")], "responses": ["x"], "ranks": [1]}
    fits, counter = tokenize_sft(examples(row), TOKENIZER, 51)
    assert len(fits[0]["input_ids"]) == 51 and not counter
    shorter, counter = tokenize_sft(examples(row), TOKENIZER, 50)
    assert text(shorter[0]["input_ids"]) == f"S\n\nHuman: q\n\nAssistant: x{EOS}"
    assert counter == {"dialogue shortened by whole turns": 1}
    cut, counter = tokenize_sft(examples(row | {"responses": ["xyz"]}), TOKENIZER, 25)
    assert (
        text(cut[0]["input_ids"]) == "S\n\nHuman: q\n\nAssistant: x"
        and cut[0]["loss_mask"] == [False] * 23 + [True] * 2
    )
    assert counter == {"dialogue shortened by whole turns": 1, "answer cut at max_seq_len": 1}


def test_sft_prompt_that_leaves_no_room_is_dropped():
    rows = [
        {"prompt": turns("q"), "responses": ["x"], "ranks": [1]},
        {"prompt": turns("long" * 9), "responses": ["x"], "ranks": [1]},
    ]
    table, counter = tokenize_sft(examples(*rows), TOKENIZER, 30)
    assert len(table) == 1 and counter == {"prompt fills max_seq_len": 1}
    with pytest.raises(UserError, match="no example is left after tokenizing .2 x prompt fills"):
        tokenize_sft(examples(*rows), TOKENIZER, 22)
    assert len(tokenize_sft(examples(*rows), TOKENIZER, 23)[0]) == 1, "one token of the answer is enough"


PROMPT = "\n\nHuman: q\n\nAssistant:"


def test_rankings_hold_every_answer_to_a_prompt_best_first():
    row = {"prompt": turns("a", "b", "q"), "responses": ["c", "a", "b", "d"], "ranks": [3, 1, 2, 2], "margin": 0.5}
    table, counter = tokenize_rankings(examples(row, row | {"margin": None, "prompt": turns("q")}), TOKENIZER, 100)
    before = f"\n\nHuman: a\n\nAssistant: b{EOS}{PROMPT}"
    assert [text(ids) for ids in table[0]["input_ids"]] == [f"{before} {a}{EOS}" for a in "abdc"]
    rest = {name: table[0][name] for name in table.column_names if name != "input_ids"}
    messages = turns("a", "b", "q")
    assert rest == {"ranks": [1, 2, 2, 3], "prompt_len": 47, "messages": messages, "margin": 0.5, "source": "s"}
    assert (table[1]["messages"], table[1]["prompt_len"], table[1]["margin"]) == (turns("q"), 22, 0.0)
    assert not counter


def test_rankings_leave_out_the_same_answer_empty_and_over_long_ones():
    ranked = {"prompt": turns("q"), "responses": ["c", "a", "b", "a", ""], "ranks": [3, 1, 2, 2, 4]}
    rows = [
        ranked,
        {"prompt": turns("q"), "responses": ["x", "x"], "ranks": [1, 2]},
        {"prompt": turns("q"), "responses": ["x", ""], "ranks": [1, 2]},
        {"prompt": turns("q"), "responses": ["x", "y" * 20], "ranks": [1, 2]},
        {"prompt": turns("q"), "responses": ["x", "y", "z" * 20], "ranks": [1, 2, 2]},
        {"prompt": turns("a", "b", "q"), "responses": ["x", "y" * 10], "ranks": [1, 2]},
    ]
    table, counter = tokenize_rankings(examples(*rows), TOKENIZER, 40)
    found = [([text(ids)[len(PROMPT) :] for ids in r["input_ids"]], r["ranks"], r["messages"]) for r in table]
    assert found == [
        ([f" a{EOS}", f" b{EOS}", f" c{EOS}"], [1, 2, 3], turns("q")),
        ([f" x{EOS}", f" y{EOS}"], [1, 2], turns("q")),
        ([f" x{EOS}", f" {'y' * 10}{EOS}"], [1, 2], turns("q")),
    ]
    assert counter == {
        "the same answer twice": 2,
        "empty answer": 2,
        "answer longer than max_seq_len": 2,
        "dialogue shortened by whole turns": 1,
    }


@pytest.mark.parametrize("tokenize", [tokenize_rankings, tokenize_preferences, tokenize_feedback])
def test_a_prompt_that_leaves_no_room_is_counted_as_such(tokenize):
    row = {"prompt": turns("q"), "responses": ["x", "y"], "ranks": [1, 2]}
    table, counter = tokenize(examples(row, row | {"prompt": turns("long" * 9)}), TOKENIZER, 57)
    num_rows = 2 if tokenize is tokenize_feedback else 1
    assert len(table) == num_rows and counter == {"prompt fills max_seq_len": num_rows}


def test_an_answer_that_fits_without_the_giant_beside_it_keeps_its_dialogue():
    row = {"prompt": turns("a", "b", "q"), "responses": ["x", "y", "z" * 99], "ranks": [1, 2, 3]}
    table, counter = tokenize_rankings(examples(row), TOKENIZER, 60)
    assert len(table[0]["messages"]) == 3 and len(table[0]["input_ids"]) == 2
    assert counter == {"answer longer than max_seq_len": 1}


def test_preferences_are_all_pairs_of_different_rank():
    row = {"prompt": turns("q"), "responses": ["c", "a", "b", "d", "a"], "ranks": [3, 1, 2, 2, 2], "margin": 0.5}
    table, counter = tokenize_preferences(examples(row, row | {"margin": None}), TOKENIZER, 100)
    pairs = [(text(r["chosen_ids"]), text(r["rejected_ids"]), r["margin"]) for r in table]
    expected = [("a", "b"), ("a", "d"), ("a", "c"), ("b", "c"), ("d", "c")]
    assert pairs == [(f"{PROMPT} {a}{EOS}", f"{PROMPT} {b}{EOS}", m) for m in (0.5, 0.0) for a, b in expected]
    assert counter == {"the same answer twice": 2}, "told once for each ranking"
    assert set(table["prompt_len"]) == {22} and set(table["source"]) == {"s"}


def test_preference_shares_one_shortened_prompt_or_is_dropped():
    row = {"prompt": turns("a", "b", "q"), "responses": ["x", "y" * 10], "ranks": [1, 2]}
    table, counter = tokenize_preferences(examples(row, row | {"responses": ["x", "y" * 20]}), TOKENIZER, 40)
    assert [text(table[0][key]) for key in ("chosen_ids", "rejected_ids")] == [
        f"\n\nHuman: q\n\nAssistant: x{EOS}",
        f"\n\nHuman: q\n\nAssistant: {'y' * 10}{EOS}",
    ]
    assert counter == {"dialogue shortened by whole turns": 1, "answer longer than max_seq_len": 1} and len(table) == 1


def test_feedback_is_the_best_and_the_worst_answers_one_by_one():
    rows = [
        {"prompt": turns("q"), "responses": ["c", "a", "b", "d"], "ranks": [3, 1, 2, 3]},
        {"prompt": turns("q"), "responses": ["bad"], "ranks": [2]},
        {"prompt": turns("q"), "responses": ["good"], "ranks": [1]},
        {"prompt": turns("q"), "responses": ["y" * 20, ""], "ranks": [1, 2]},
        {"prompt": turns("a", "b", "q"), "responses": ["y" * 10], "ranks": [1]},
    ]
    table, counter = tokenize_feedback(examples(*rows), TOKENIZER, 40)
    assert table.column_names == ["input_ids", "prompt_len", "good"] and set(table["prompt_len"]) == {22}
    answers = [(text(row["input_ids"]), row["good"]) for row in table]
    expected = [("a", True), ("c", False), ("d", False), ("bad", False), ("good", True), ("y" * 10, True)]
    assert answers == [(f"{PROMPT} {answer}{EOS}", good) for answer, good in expected]
    assert counter == {
        "neither the best nor the worst of a ranking": 1,
        "empty answer": 1,
        "answer longer than max_seq_len": 1,
        "dialogue shortened by whole turns": 1,
    }


def test_prompts():
    rows = [
        {"prompt": turns(*texts)} for texts in (["q"], ["a", "b", "q"], ["r"], ["long" * 9], ["r"], ["r", "b", "c"])
    ]
    table, counter = tokenize_prompts(examples(*rows), TOKENIZER, 30)
    assert [text(ids) for ids in table["prompt_ids"]] == [f"\n\nHuman: {q}\n\nAssistant:" for q in "qrc"]
    assert [row["messages"] for row in table] == [turns("q"), turns("r"), turns("c")]
    assert table["record"][:] == ['{"responses":[]}'] * 3
    assert counter == {
        "dialogue shortened by whole turns": 2,
        "prompt longer than max_prompt_seq_len": 1,
        "prompt seen before": 2,
    }


def test_prompts_carry_their_record():
    rows = [
        {"prompt": turns("q"), "responses": ["c", "é", "b", "b2"], "ranks": [3, 1, 2, 2], "metadata": '{"z":[1]}'},
        {"prompt": turns("a", "b", "r"), "metadata": '{"a":"x"}'},
        {"prompt": turns("r"), "responses": ["late"], "ranks": [1], "metadata": '{"a":"y"}'},
        {"prompt": turns("s"), "responses": ["bad"], "ranks": [2]},
    ]
    table, counter = tokenize_prompts(examples(*rows), TOKENIZER, 30)
    expected = ['{"responses":["é","b","b2","c"],"z":[1]}', '{"a":"x","responses":[]}', '{"responses":[]}']
    assert table["record"][:] == expected, "a lone bad answer is no reference"
    assert counter == {"dialogue shortened by whole turns": 1, "prompt seen before": 1}, "the first record counts"


def test_a_file_of_prompts_with_answers_and_metadata_comes_out_as_records(tmp_path):
    records = [
        {"prompt": "2+2?", "answer": " 4 "},
        {"prompt": "f?", "metadata": {"tests": ["f(1) == 2"], "n": None}},
        {"prompt": "a?", "chosen": "x", "rejected": "y", "metadata": {"masked_pattern": "x+"}},
    ]
    tables = []
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
        path, cache = str(tmp_path / name), str(tmp_path / "cache")
        train, held, _ = load_stage_data([path], [], "prompt", "0,0,1", 0.3, 0, cache)
        tables.append([tokenize_prompts(table, TOKENIZER, 40)[0] for table in (train, held)])
        records[1]["metadata"]["n"] = 1
    rows = [{row["messages"][0]["content"]: json.loads(row["record"]) for t in both for row in t} for both in tables]
    assert rows[0] == {
        "2+2?": {"responses": ["4"]},
        "f?": {"responses": [], "tests": ["f(1) == 2"], "n": None},
        "a?": {"responses": ["x", "y"], "masked_pattern": "x+"},
    }
    assert rows[1] == rows[0] | {"f?": {"responses": [], "tests": ["f(1) == 2"], "n": 1}}
    assert [len(both[1]) for both in tables] == [1, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_records_of_different_shapes_have_one_type_in_a_table(workers):
    metadata = ['{"a":1}', "", '{"a":"x","b":{"c":[]}}', '{"a":[1,"x"]}']
    rows = [{"prompt": turns(f"q{n}"), "metadata": text} for n, text in enumerate(metadata)]
    table, _ = tokenize_prompts(examples(*rows), TOKENIZER, 30, workers)
    expected = [json.loads(text or "{}") | {"responses": []} for text in metadata]
    assert [json.loads(text) for text in table["record"]] == expected


@pytest.mark.parametrize(
    "tokenize", [tokenize_sft, tokenize_rankings, tokenize_preferences, tokenize_feedback, tokenize_prompts]
)
def test_nothing_held_out_is_an_empty_table_of_the_same_columns(tokenize):
    row = {"prompt": turns("q"), "responses": ["x", "y"], "ranks": [1, 2]}
    full, _ = tokenize(examples(row), TOKENIZER, 40)
    empty, counter = tokenize(examples(row).select([]), TOKENIZER, 40)
    assert len(empty) == 0 and not counter and empty.features == full.features


@pytest.mark.parametrize(
    "tokenize", [tokenize_sft, tokenize_rankings, tokenize_preferences, tokenize_feedback, tokenize_prompts]
)
def test_many_examples_are_mapped_as_few(tokenize):
    """The map takes 200 at a time; its counts are of all."""
    rows = [
        {"prompt": turns("a", "b", f"q{n}" * (n % 7 + 1)), "responses": ["x", "y" * (n % 30)], "ranks": [1, 2]}
        for n in range(450)
    ]
    whole, counts = tokenize(examples(*rows), TOKENIZER, 60)
    parts = [tokenize(examples(*rows[start : start + 90]), TOKENIZER, 60) for start in range(0, 450, 90)]
    assert whole[:] == datasets.concatenate_datasets([table for table, _ in parts])[:]
    assert counts == sum((counter for _, counter in parts), Counter()) and counts.total() > 100


def test_of_records_with_the_same_prompt_the_first_counts_however_far_apart():
    rows = [{"prompt": turns(f"q{n % 1050}"), "metadata": json.dumps({"n": n})} for n in range(1100)]
    table, counter = tokenize_prompts(examples(*rows), TOKENIZER, 40)
    assert [json.loads(record)["n"] for record in table["record"]] == list(range(1050))
    assert counter == {"prompt seen before": 50}


def test_digests_are_equal_for_equal_ids_alone():
    rows = [[1, 2], [1, 3], [1, 2], [1], [], [2, 1], [1, 2, 0], [], [258]]
    table = datasets.Dataset.from_dict({"ids": rows}, features=datasets.Features({"ids": stages._IDS}))
    digests = list(stages._digests(table))
    assert [digests.index(digest) for digest in digests] == [rows.index(row) for row in rows]
    picked = table.select([8, 2, 0, 4, 4])
    assert list(stages._digests(picked)) == [digests[row] for row in (8, 2, 0, 4, 4)]


def test_drop_first_turn():
    system = {"role": "system", "content": "S"}
    assert drop_first_turn([system, *turns("a", "b", "c", "d", "e")]) == [system, *turns("c", "d", "e")]
    assert drop_first_turn([system, *turns("a")]) == []


def test_counts_and_rows_are_the_same_from_any_number_of_workers(tmp_path):
    rows = [{"prompt": f"q{n}" * (n % 9), "chosen": "a", "rejected": "b" * (n % 3 + 1)} for n in range(1, 60) if n % 9]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = []
    for workers in (1, 2):
        options = {"cache_dir": str(tmp_path / f"cache{workers}"), "seed": 0}
        table, _ = load_examples([str(tmp_path / "a.jsonl")], "train", "preference", **options)
        tokens, counter = tokenize_preferences(table, TOKENIZER, 40, workers)
        results.append((tokens[:], counter))
    assert results[0] == results[1] and results[0][1]["prompt fills max_seq_len"] > 0


def test_cache_depends_on_data_tokenizer_template_length_and_code(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    calls = []
    real = stages._map_batch
    monkeypatch.setattr(stages, "_map_batch", lambda *args: calls.append(1) or real(*args))

    def tokenize(tokenizer=TOKENIZER, length=40):
        calls.clear()
        table, _ = load_examples([str(path)], "train", "sft", cache_dir=str(tmp_path / "cache"), seed=0)
        result, counter = tokenize_sft(table, tokenizer, length)
        return text(result[0]["input_ids"]), counter, bool(calls)

    path.write_text('{"prompt": "a", "response": "too long for forty tokens"}')
    first = tokenize()
    assert first[1] == {"answer cut at max_seq_len": 1} and first[2]
    assert tokenize() == (*first[:2], False), "cached, with its count"
    assert tokenize(length=41)[2]
    path.write_text('{"prompt": "b", "response": "too long for forty tokens"}')
    assert "Human: b" in tokenize()[0]
    other = train_tokenizer([], 258)
    other.chat_template = TOKENIZER.chat_template.replace("Human", "User")
    assert "User: b" in tokenize(other)[0]
    assert not tokenize()[2]
    monkeypatch.setattr(stages, "TOKENIZING_VERSION", "next")
    assert tokenize()[2]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_template_that_does_not_fit_is_a_user_error_from_every_worker(workers):
    tokenizer = train_tokenizer([], 258)
    tokenizer.chat_template = "{{ messages | length }}"
    rows = [{"prompt": turns("a", "b", "c"), "responses": ["x"], "ranks": [1]}] * 4
    with pytest.raises(UserError, match="--chat_template plain"):
        tokenize_sft(examples(*rows), tokenizer, 40, workers)


def test_cache_files_that_were_cut_short_are_built_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"q{n}", "response": "a"}) for n in range(300)))
    results = []
    for _ in range(3):
        table, _ = load_examples([str(path)], "train", "sft", cache_dir=str(tmp_path / "cache"), seed=0)
        tokens, _ = tokenize_sft(table, TOKENIZER, 40)
        results.append((table[:], tokens[:]))
        files = list((tmp_path / "cache").rglob("*.arrow"))
        assert len(files) == 2
        file = files[len(results) % 2]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert results[0] == results[1] == results[2]


def test_shares_of_one_file_do_not_take_each_other_s_cache(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"q{n}", "response": "a"}) for n in range(20)))
    seen = []
    for seed, split in [(0, "1,1,0"), (0, "1,0,0"), (1, "1,1,0")]:
        train, held, _ = load_stage_data([str(path)], [], "sft", split, 0.1, seed, str(tmp_path / "cache"))
        for table in (train, held):
            tokens, _ = tokenize_sft(table, TOKENIZER, 40)
            expected = [f"\n\nHuman: {row['prompt'][0]['content']}\n\nAssistant: a{EOS}" for row in table]
            assert [text(ids) for ids in tokens["input_ids"]] == expected
            seen.append(expected)
    assert len({tuple(texts) for texts in seen}) >= 4


def test_tokenizer_hash_follows_content():
    same, merged, special = train_tokenizer([], 258), train_tokenizer(["abab abab"] * 3, 260), train_tokenizer([], 258)
    special.add_special_tokens({"additional_special_tokens": ["<x>"]})
    assert tokenizer_hash(same) == tokenizer_hash(TOKENIZER)
    assert len({tokenizer_hash(tokenizer) for tokenizer in (same, merged, special)}) == 3
    same.eos_token = "<|pad|>"
    assert tokenizer_hash(same) != tokenizer_hash(TOKENIZER)
