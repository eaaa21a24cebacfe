"""prompt_eval.py as a whole: models of two families and tokenizers side by side, each way to answer, every mistake."""

import importlib.util
import json
import os
import subprocess
import sys

from dschat.data import toy
from dschat.data.templates import encode_prompt
from dschat.data.tokenizer import load_tokenizer, train_tokenizer
from dschat.errors import UserError
from dschat.models.load import save_model
from dschat.models.scorer import STATS_FILE, save_score_stats
from dschat.report.summary import win_rate
from dschat.rlhf.answers import prompt_rows, sample_answers
from dschat.rlhf.rollout import Sampling, banned_token_ids
from tests.conftest import ROOT, SENTENCES
from tests.dialogues import user
from tests.families import tiny_model
from tests.ppo_parts import tiny_scorer

import pytest
import torch
import transformers

FOLDER = ROOT / "training" / "step1_supervised_finetuning"
SCRIPTS = sorted((FOLDER / "evaluation_scripts").glob("*.sh"))
STEPS = 6
SCORE = """
def letters(responses):
    return [float(sum(c.isalpha() for c in text)) for text in responses]
def vowels(prompts, responses):
    return [None if prompt.startswith("tell") else float(sum(c in "aeiou" for c in text))
            for prompt, text in zip(prompts, responses)]
"""


def load_program():
    spec = importlib.util.spec_from_file_location("prompt_eval", FOLDER / "prompt_eval.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


program = load_program()


def lively(family, tokenizer, directory):
    """A tiny model whose answers are pieces of words, differ from prompt to prompt and sometimes end."""
    model = tiny_model(family, tokenizer)
    model.config.tie_word_embeddings = False
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    for token, number in tokenizer.get_vocab().items():
        if len(token) == 1:
            head[number] *= 0.1
    head[tokenizer.eos_token_id] *= 2
    model.lm_head.weight = torch.nn.Parameter(head)
    save_model(model, tokenizer, str(directory))
    return str(directory)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """first/model and second/model, of different families and tokenizers; reward; questions.jsonl; mine.py."""
    root = tmp_path_factory.mktemp("place")
    lively("llama", tokenizer, root / "first" / "model")
    other = train_tokenizer([f"Human and Assistant talk about {sentence}" for sentence in SENTENCES], 330)
    lively("gpt2", other, root / "second" / "model")
    save_model(tiny_scorer("llama", tokenizer, seed=2).model, tokenizer, str(root / "reward"))
    records = [{"prompt": text} for text in SENTENCES] + [{"messages": user("hello", "yes?", SENTENCES[0])}]
    (root / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "mine.py").write_text(SCORE)
    return root


@pytest.fixture(scope="module")
def both(place):
    return [str(place / "first/model"), str(place / "second/model")]


def flags_of(place, cache_dir, **changes):
    given = {"data_path": place / "questions.jsonl", "num_prompts": 0, "max_new_tokens": STEPS, "dtype": "fp32"}
    given |= {"data_output_path": cache_dir} | changes
    words = []
    for name, value in given.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


@pytest.fixture
def run(place, cache_dir, tmp_path):
    """Call the program; the lines of answers.jsonl by model and decoding, and summary.json."""

    def call(models, **flags):
        out = tmp_path / "out"
        program.main(flags_of(place, cache_dir, model_name_or_path=models, output_dir=out, **flags))
        lines: dict = {}
        for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            lines.setdefault((row["model"], row["decoding"]), []).append(row)
        return lines, json.loads((out / "summary.json").read_text(encoding="utf-8"))

    return call


def by_transformers(directory, dialogue, **options):
    """The answer of a directory as a user of transformers alone would get it."""
    tokenizer = load_tokenizer(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.tensor([encode_prompt(tokenizer, dialogue)])
    options |= {"do_sample": False, "max_new_tokens": STEPS, "pad_token_id": tokenizer.pad_token_id}
    options |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    banned = list(banned_token_ids(tokenizer, model.config.vocab_size))
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), suppress_tokens=banned, **options)
    response = whole[0, ids.shape[1] :].tolist()
    return tokenizer.decode(response, skip_special_tokens=True).strip(), len(response)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_two_models_side_by_side(run, both, place, capsys):
    lines, summary = run(both, decoding=["greedy", "sample", "beam"])
    names = ["first/model", "second/model"]
    assert list(lines) == [(name, decoding) for name in names for decoding in ("greedy", "sample", "beam")]
    dialogues = [user(text) for text in SENTENCES] + [user("hello", "yes?", SENTENCES[0])]
    for (name, decoding), rows in lines.items():
        assert [row["messages"] for row in rows] == dialogues
        assert [row["prompt"] for row in rows][:8] == SENTENCES and rows[8]["prompt"].startswith("user: hello\nassist")
        assert all(row["score"] is row["judge"] is row["correct"] is None for row in rows)
        assert all(row["finished"] or row["num_tokens"] == STEPS for row in rows)
        if decoding != "sample":
            options = {"num_beams": 4} if decoding == "beam" else {}
            expected = [by_transformers(str(place / name), dialogue, **options) for dialogue in dialogues]
            assert [(row["response"], row["num_tokens"]) for row in rows] == expected
    assert len({row["finished"] for rows in lines.values() for row in rows}) == 2
    assert lines["first/model", "greedy"] != lines["first/model", "beam"]
    assert summary["models"] == dict(zip(names, both, strict=True)) and summary["num_prompts"] == 9
    assert [(row["model"], row["decoding"]) for row in summary["answers"]] == list(lines)
    assert [row["win_rate"] for row in summary["answers"]] == [None] * 6 and summary["judge"] is None
    assert summary["max_new_tokens"] == STEPS and summary["config"]["decoding"] == ["greedy", "sample", "beam"]
    assert summary["seconds"] > 0 and summary["peak_rss_gb"] > 0 and summary["notes"] == {}
    shown = capsys.readouterr().out
    assert "asked 9 of 9 prompts" in shown and "9. user: hello" in shown and "answers by" in shown
    assert all(" ".join(row["response"].split()[:1]) in shown for row in lines["second/model", "sample"])


def test_answers_depend_on_the_seed_and_on_nothing_beside_the_model(run, both):
    flags = {"decoding": ["sample", "beam"]}
    alone = {name: run(path, **flags)[0] for name, path in zip(("first", "second"), both, strict=True)}
    together, _ = run(both, batch_size=3, **flags)
    reverse, _ = run(both[::-1], **flags)
    for name in ("first", "second"):
        for decoding in ("sample", "beam"):
            for lines in (together, reverse):
                found = [row | {"model": "model"} for row in lines[f"{name}/model", decoding]]
                assert found == alone[name]["model", decoding]
    other, _ = run(both[0], decoding="sample", seed=5)
    assert other["model", "sample"] != alone["first"]["model", "sample"]


def test_sampling_flags_reach_the_sampler(run, both, tokenizer):
    greedy = run(both[0])[0]["model", "greedy"]

    def sampled(**flags):
        rows = run(both[0], decoding="sample", **flags)[0]["model", "sample"]
        return [row["response"] for row in rows]

    expected = [row["response"] for row in greedy]
    assert sampled(top_k=1) == sampled(top_p=1e-6) == sampled(temperature=0.01) == expected
    assert len({tuple(sampled(**flags)) for flags in ({}, {"temperature": 3.0}, {"top_k": 3}, {"top_p": 0.3})}) == 4
    model = transformers.AutoModelForCausalLM.from_pretrained(both[0])
    rows = prompt_rows(tokenizer, [row["messages"] for row in greedy])
    assert sampled(temperature=2.0, top_k=9, top_p=0.8) == (
        sample_answers(model, tokenizer, rows, Sampling(STEPS, 2.0, 9, 0.8), 1234).responses
    )


# ---- scores ---------------------------------------------------------------------------------------------------------


def letters(text):
    return float(sum(c.isalpha() for c in text))


def vowels(prompt, text):
    return None if prompt.startswith("tell") else float(sum(c in "aeiou" for c in text))


def test_the_best_of_n_is_the_one_with_the_highest_reward(run, both, place, tokenizer, capsys):
    reward, judge = (f"function:{place}/mine.py:{name}" for name in ("letters", "vowels"))
    decodings = ["sample", "best_of_n"]
    lines, summary = run(both, decoding=decodings, best_of_n=5, reward=reward, judge=judge)
    for name, path in (("first/model", both[0]), ("second/model", both[1])):
        own = load_tokenizer(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        rows = lines[name, "best_of_n"]
        drawn = sample_answers(
            model, own, prompt_rows(own, [row["messages"] for row in rows]), Sampling(STEPS), 1234, num_samples=5
        )
        for i, row in enumerate(rows):
            choice = drawn.responses[5 * i : 5 * i + 5]
            best = max(choice, key=letters)
            assert row["response"] == best and row["score"] == max(map(letters, choice))
            assert row["num_tokens"] <= STEPS
        for row in rows + lines[name, "sample"]:
            assert row["score"] == letters(row["response"])
            assert row["judge"] == vowels(row["prompt"], row["response"]) and row["correct"] is None
    groups = {(row["model"], row["decoding"]): row for row in summary["answers"]}
    for key, rows in lines.items():
        given = [row["judge"] for row in rows if row["judge"] is not None]
        assert groups[key]["judge"] == pytest.approx(sum(given) / 8, abs=1e-4) and len(given) == 8
        assert groups[key]["score"] == pytest.approx(sum(row["score"] for row in rows) / 9, abs=1e-4)
        assert groups[key]["num_tokens"] == pytest.approx(sum(row["num_tokens"] for row in rows) / 9, abs=1e-4)
        assert groups[key]["finished"] == pytest.approx(sum(row["finished"] for row in rows) / 9, abs=1e-4)
        assert groups[key]["correct"] is None
    for decoding in decodings:
        judged = [[row["judge"] for row in lines[name, decoding]] for name in ("second/model", "first/model")]
        assert groups["second/model", decoding]["win_rate"] == win_rate(*judged) | {"by": "judge"}
        assert groups["first/model", decoding]["win_rate"] is None
    shown = capsys.readouterr().out
    assert "better than first/model (95 %)" in shown and "judge none, reward" in shown
    assert summary["notes"] == {"answer without a score by the judge": 4} and "4 × answer without a score" in shown


def test_a_reward_model_scores_every_answer_and_decides_where_there_is_no_judge(run, both, place):
    lines, summary = run(both, reward=place / "reward")
    own = load_tokenizer(str(place / "reward"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place / "reward").eval()
    for row in lines["first/model", "greedy"]:
        # The ids as they were sampled; greedy ones are those of the text but for where an answer is cut off.
        ids = torch.tensor([encode_prompt(own, row["messages"])])
        answer = by_ids(both[0], ids)
        with torch.no_grad():
            assert row["score"] == pytest.approx(model(torch.cat([ids, answer], 1)).logits.item(), abs=1e-4)
    scores = [[row["score"] for row in lines[name, "greedy"]] for name in ("second/model", "first/model")]
    assert summary["answers"][1]["win_rate"] == win_rate(*scores) | {"by": "reward"}
    again, _ = run(both, reward=f"full:{place / 'reward'}", batch_size=2)
    for key, rows in lines.items():
        assert [row["score"] for row in again[key]] == pytest.approx([row["score"] for row in rows], abs=1e-5)
    save_score_stats(str(place / "reward"), 3.0, 0.5)
    for flags, expected in (({}, lambda raw: (raw - 3) / 0.5), ({"normalize_reward": False}, lambda raw: raw)):
        new, _ = run(both, reward=place / "reward", **flags)
        for key, rows in lines.items():
            assert [row["score"] for row in new[key]] == pytest.approx([expected(row["score"]) for row in rows])
    (place / "reward" / STATS_FILE).unlink()
    halved, _ = run(both, reward=[f"0.5*full:{place / 'reward'}", f"function:{place}/mine.py:letters"])
    for row, old in zip(halved["second/model", "greedy"], lines["second/model", "greedy"], strict=True):
        assert row["score"] == pytest.approx(old["score"] / 2 + letters(row["response"]), abs=1e-4)


def by_ids(directory, ids):
    tokenizer = load_tokenizer(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = {"do_sample": False, "max_new_tokens": STEPS, "suppress_tokens": [tokenizer.pad_token_id]} | ends
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]


def test_the_embedded_task_is_judged_by_its_own_judge(run, both, place):
    lines, summary = run(both[0], data_path="toy", num_prompts=5)
    rows = lines["model", "greedy"]
    held_out = {question for _, question in toy.questions("eval")}
    assert len({row["prompt"] for row in rows} & held_out) == 5 and summary["judge"] == "toy"
    for row in rows:
        verdict = toy.judge(row["prompt"], row["response"])
        assert (row["judge"], row["correct"]) == (verdict.score, verdict.correct)
    assert summary["answers"][0]["correct"] == 0.0
    # What is asked counts, not what stands beside it.
    assert run(both[0], eval_data_path="toy", num_prompts=2)[1]["judge"] == "toy"
    assert run(both[0], data_path="toy", eval_data_path=place / "questions.jsonl")[1]["judge"] is None


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_which_prompts_are_asked(run, both, place, data_file):
    asked = [row["prompt"] for row in run(both[0], num_prompts=3)[0]["model", "greedy"]]
    assert asked == [SENTENCES[0], SENTENCES[3], SENTENCES[6]]
    lines, summary = run(both[0], data_path=data_file, eval_fraction=0.2, seed=7)
    assert summary["num_prompts"] == 8
    # Held-out data given apart are asked whole, as the stages evaluate on them.
    lines, summary = run(both[0], data_path=data_file, eval_data_path=place / "questions.jsonl", eval_fraction=0.2)
    assert [row["prompt"] for row in lines["model", "greedy"]][:8] == SENTENCES


def test_a_dialogue_too_long_for_one_model_is_shortened_for_both(run, both, tmp_path):
    questions = tmp_path / "long.jsonl"
    turns = user("story" + " story" * 119, "yes", "park" + " park" * 99, "no", "the cat sat")
    records = [{"messages": turns}, {"prompt": "far " * 300}, {"prompt": "hello"}]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines, summary = run(both, data_path=questions)
    assert [row["messages"] for row in lines["first/model", "greedy"]] == [turns[4:], user("hello")]
    assert [row["messages"] for row in lines["second/model", "greedy"]] == [turns[4:], user("hello")]
    assert summary["notes"] == {"dialogue shortened by whole turns": 1, "prompt too long for a model": 1}
    alone, _ = run(both[0], data_path=questions)
    assert alone["model", "greedy"][0]["messages"] == turns[2:]
    bounded, _ = run(both[0], data_path=questions, max_prompt_seq_len=60)
    assert bounded["model", "greedy"][0]["messages"] == turns[4:]


def test_only_the_first_answers_are_printed_and_files_only_where_asked_for(both, place, cache_dir, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    program.main(flags_of(place, cache_dir, model_name_or_path=both[0], num_shown=2))
    shown = capsys.readouterr().out
    assert f"2. {SENTENCES[1]}" in shown and "3. " not in shown and "written to" not in shown
    assert sorted(tmp_path.iterdir()) == before


def test_bad_records_can_be_left_out(run, both, tmp_path):
    questions = tmp_path / "bad.jsonl"
    questions.write_text('{"prompt": "hello"}\n{"nothing": 1}\n{"prompt": "hello"}\n')
    with pytest.raises(UserError, match="bad.jsonl:2"):
        run(both[0], data_path=questions)
    lines, summary = run(both[0], data_path=questions, skip_bad_records=True)
    assert len(lines["model", "greedy"]) == 1
    assert summary["notes"] == {"bad record": 1, "prompt seen before": 1}


def test_how_models_are_loaded_and_rendered(run, both, tmp_path, monkeypatch):
    loaded, load = [], program.Policy.load

    def spy(policy, dtype, device):
        loaded.append((policy.name, dtype))
        return load(policy, dtype, device)

    monkeypatch.setattr(program.Policy, "load", spy)
    own, _ = run(both, decoding=["greedy", "greedy", "sample"], dtype="bf16", num_prompts=2)
    assert loaded == [("first/model", torch.bfloat16), ("second/model", torch.bfloat16)]  # once for all decodings
    assert [(*key, len(rows)) for key, rows in own.items()] == [
        (name, decoding, 2) for name in ("first/model", "second/model") for decoding in ("greedy", "sample")
    ]
    template = tmp_path / "shout.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}> {{ m['content'] }}{{ eos_token }}"
        "{% else %}{{ m['content'] }}!!!\n{% endif %}{% endfor %}{% if add_generation_prompt %}> {% endif %}"
    )
    shouted, summary = run(both[0], chat_template=template)
    plain, _ = run(both[0], chat_template="plain")
    assert shouted != plain == run(both[0])[0] and summary["config"]["chat_template"] == str(template)


def test_the_longest_answer_by_default_is_half_of_the_smallest_context(run, both):
    _, summary = run(both, max_new_tokens=None, num_prompts=1)
    assert summary["max_new_tokens"] == 128


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"model_name_or_path": None}, "missing --model_name_or_path"),
        ({"model_name_or_path": "no/such/model"}, "no/such/model is neither a model directory nor a reachable hub"),
        ({"model_name_or_path": "toy"}, "the embedded model has no trained weights"),
        ({"model_name_or_path": "PLACE/reward"}, "is a reward model, not a language model; give it as --reward"),
        ({"data_path": None}, "no prompts: give --data_path"),
        ({"data_path": "PLACE/none.jsonl"}, "none.jsonl:1: no such file"),
        ({"decoding": "magic"}, "argument --decoding: invalid choice: 'magic'"),
        ({"decoding": "best_of_n"}, "--decoding best_of_n needs --reward to choose by"),
        ({"num_beams": 1}, "--num_beams 1: expected 2 or more; one beam is --decoding greedy"),
        ({"num_beams": 2}, "--num_beams is of no use without --decoding beam"),
        ({"best_of_n": 4, "decoding": "sample"}, "--best_of_n is of no use without --decoding best_of_n"),
        ({"temperature": 0.5}, "--temperature is of no use without --decoding sample or best_of_n"),
        ({"top_k": 5, "decoding": "beam"}, "--top_k is of no use without --decoding sample or best_of_n"),
        ({"top_p": 0.5}, "--top_p is of no use"),
        ({"temperature": 0, "decoding": "sample"}, "use --decoding greedy for 0"),
        ({"temperature": "nan", "decoding": "sample"}, "--temperature nan"),
        ({"top_p": 0, "decoding": "sample"}, "--top_p 0.0: expected a probability above 0"),
        ({"best_of_n": 0}, "--best_of_n 0: expected a number above 0"),
        ({"num_prompts": -1}, "--num_prompts -1: expected 0 or more"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"max_new_tokens": 256}, "--max_new_tokens 256 leaves no room for a prompt"),
        ({"max_prompt_seq_len": 3}, "none of the 9 prompts fits"),
        ({"reward": "PLACE/first/model"}, "is a language model, not a reward model"),
        ({"reward": "function:PLACE/mine.py:no"}, "has no function no; its functions: letters, vowels"),
        ({"judge": "toy"}, "--judge toy: not a question of the toy task"),
        ({"judge": "PLACE/nothing"}, "nothing is neither a model directory"),
        ({"output_dir": "PLACE/mine.py"}, "cannot be written"),
        ({"dtype": "fp16"}, "--dtype fp16 needs a GPU"),
        (
            {"model_name_or_path_baseline": "x"},
            "--model_name_or_path_baseline is gone: give both models to",
        ),
        ({"model_name_or_path_finetune": "x"}, "--model_name_or_path_finetune is gone: give both models"),
        ({"num_beam_groups": 2}, "--num_beam_groups is gone"),
        ({"penalty_alpha": 0.6}, "--penalty_alpha is gone: contrastive search"),
        ({"num_return_sequences": 2}, "--num_return_sequences is gone: use --decoding best_of_n"),
        ({"language": "English"}, "--language is gone: prompts come from --data_path"),
        ({"add_eot_token": True}, "--add_eot_token is gone"),
        ({"num_beam": 2}, "unknown flag --num_beam; did you mean --num_beams"),
    ],
)
def test_a_mistake_is_one_line_before_any_model_answers(flags, told, both, place, cache_dir, monkeypatch):
    def refuse(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(program.Policy, "load", refuse)
    if torch.cuda.is_available() and flags == {"dtype": "fp16"}:
        pytest.skip("fp16 is fine here")
    given = {"model_name_or_path": both[0]} | flags
    given = {name: x.replace("PLACE", str(place)) if isinstance(x, str) else x for name, x in given.items()}
    with pytest.raises(UserError) as error:
        program.main(flags_of(place, cache_dir, **given))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_one_process_only(both, place, cache_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process; start it with python, without a launcher"):
        program.main(flags_of(place, cache_dir, model_name_or_path=both))


def test_an_empty_list_in_a_yaml_file_is_refused(both, place, cache_dir, tmp_path):
    config = tmp_path / "flags.yaml"
    config.write_text("decoding: []\n")
    with pytest.raises(UserError, match="--decoding: nothing given"):
        program.main(flags_of(place, cache_dir, model_name_or_path=both, config=config))


# ---- scripts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_short_and_passes_flags_on(script, tmp_path):
    lines = script.read_text().splitlines()
    assert len(lines) <= 15 and os.access(script, os.X_OK) and lines[0] == "#!/usr/bin/env bash"
    stub = tmp_path / "python"
    stub.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    stub.chmod(0o755)
    flags = ["--model_name_or_path", "a b", "--data_path", "c d", "--reward", "r", "--seed", "5"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run([str(script), *flags], env={"PATH": path}, capture_output=True, text=True, check=True)
    called, *words = result.stdout.split("\0")[:-1]
    assert os.path.samefile(called, FOLDER / "prompt_eval.py")
    config = program.parse_config(program.Config, words)
    assert (config.model_name_or_path, config.data_path, config.seed) == (["a b"], ["c d"], 5)
    assert config.decoding != ["greedy"]


def test_there_are_scripts():
    assert [script.name for script in SCRIPTS] == ["run_best_of_n.sh", "run_prompt_eval.sh", "run_toy.sh"]
