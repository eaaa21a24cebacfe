"""The programs as their user meets them: exit codes, one-line errors, determinism, what a run leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

from dschat.errors import UserError
from tests.conftest import ROOT
from tests.programs import STEPS, arguments, program, run

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def trained(model_dirs, data_file, cache_dir, tmp_path_factory):
    """Directories of a whole small run: sft, reward, ppo."""
    from tests.programs import run_stages

    return run_stages(model_dirs("llama"), data_file, cache_dir, tmp_path_factory.mktemp("trained"))


def lines(directory: str) -> list[dict]:
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def subprocess_run(stage: str, *argv: str) -> subprocess.CompletedProcess:
    path = ROOT / "training" / STEPS[stage] / "main.py"
    return subprocess.run([sys.executable, str(path), *argv], capture_output=True, text=True, timeout=120)


# Records


def test_what_each_stage_leaves_behind(trained):
    assert {p.name for p in Path(trained["sft"]).iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "run.json",
        "metrics.jsonl",
        "tensorboard",
    }
    assert (Path(trained["reward"]) / "score_stats.safetensors").is_file()
    assert {p.name for p in Path(trained["ppo"]).iterdir()} >= {"actor", "critic", "samples.jsonl", "metrics.jsonl"}
    roles = {"sft": "policy", "reward": "reward", "ppo/actor": "policy", "ppo/critic": "critic"}
    for folder, role in roles.items():
        stage, _, inner = folder.partition("/")
        record = json.loads((Path(trained[stage]) / inner / "run.json").read_text())
        assert record["role"] == role
        assert record["seed"] == 7 and record["versions"]["torch"] == torch.__version__
        assert record["config"]["output_dir"] == trained[stage]
        assert record["seconds"] > 0 and record["data"]["train"] > 0 and len(record["data"]["train_fingerprint"]) > 8


def test_the_metric_names_of_the_design(trained):
    names = {stage: set().union(*lines(trained[stage])) for stage in trained}
    assert names["sft"] >= {"step", "stage", "time", "loss", "lr", "grad_norm", "eval/perplexity"}
    assert names["reward"] >= {"loss", "eval/accuracy", "eval/margin", "eval/accuracy_low", "eval/accuracy_high"}
    assert names["ppo"] >= {
        *("objective/kl_per_seq", "objective/kl_per_token", "objective/entropy_per_token", "objective/score_mean"),
        *("objective/score_std", "objective/kl_coef", "policy/loss", "policy/approx_kl", "policy/clip_fraction"),
        *("policy/ratio_max", "policy/grad_norm", "critic/loss", "critic/explained_variance", "critic/grad_norm"),
        *("rollout/response_length", "rollout/finished_fraction", "rollout/distinct_2", "time/rollout_s"),
        *("time/score_s", "time/train_s", "perf/seq_per_s", "perf/tokens_per_s", "lr", "eval/score_mean"),
    }
    assert lines(trained["ppo"])[0]["stage"] == "ppo"


def test_the_logged_learning_rate_is_the_one_of_its_step(model_dirs, data_file, cache_dir, tmp_path):
    """Linear over two steps from a peak of 1e-3: 1e-3, then half of it; 0 is only what would come next."""
    flags = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "data_split": "1,0,0"}
    out = run("sft", data_file, cache_dir, tmp_path, model_name_or_path=model_dirs("llama"), **flags)
    assert [line["lr"] for line in lines(out) if "lr" in line] == pytest.approx([1e-3, 5e-4])


def test_evaluation_before_training_finds_an_untouched_policy(trained):
    first = lines(trained["ppo"])[0]
    assert first["step"] == 0
    assert abs(first["eval/kl_per_seq"]) < 1e-4
    text = (Path(trained["ppo"]) / "samples.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    by_step = {step: [row["prompt"] for row in rows if row["step"] == step] for step in (0, 2)}
    assert by_step[0] == by_step[2] and len(by_step[0]) > 3


def test_outputs_load_in_a_fresh_process_without_network_with_equal_logits(trained, tmp_path):
    program_text = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
out = {}
for path, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    model = {"lm": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}[auto].from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello there"}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        out[path] = [ids.tolist(), model(input_ids=ids).logits.flatten()[:50].tolist()]
print(json.dumps(out))
"""
    folders = {"sft": "lm", "reward": "score", "ppo/actor": "lm", "ppo/critic": "score"}
    argv = [word for f, kind in folders.items() for word in (str(Path(trained["sft"]).parent / f), kind)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run([sys.executable, "-c", program_text, *argv], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])

    from dschat.data.tokenizer import load_tokenizer
    from dschat.models.load import load_causal_lm, load_trained_scorer
    from dschat.models.scorer import last_token_values

    for path, kind in zip(argv[::2], argv[1::2], strict=True):
        tokenizer = load_tokenizer(path)
        ids, logits = torch.tensor(found[path][0]), torch.tensor(found[path][1])
        with torch.no_grad():
            if kind == "lm":
                ours = load_causal_lm(path, tokenizer, dtype=torch.float32).eval()(input_ids=ids).logits
            else:
                scorer = load_trained_scorer(path, tokenizer, dtype=torch.float32, normalize=False).eval()
                mask = torch.ones_like(ids, dtype=torch.bool)
                ours = last_token_values(scorer(ids, mask), mask)
        assert torch.allclose(ours.flatten()[:50], logits, atol=1e-5), path


# Determinism


@pytest.mark.parametrize("stage", STEPS)
def test_the_same_seed_gives_the_same_weights_bit_for_bit(stage, trained, model_dirs, data_file, cache_dir, tmp_path):
    if stage == "ppo":
        models = {"actor_model_name_or_path": trained["sft"], "critic_model_name_or_path": trained["reward"]}
    else:
        models = {"model_name_or_path": model_dirs("llama")}
    where = "actor" if stage == "ppo" else ""
    saved = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        out = run(stage, data_file, cache_dir, tmp_path / name, seed=seed, **models)
        saved[name] = load_file(str(Path(out) / where / "model.safetensors"))
    assert all(torch.equal(saved["a"][key], saved["b"][key]) for key in saved["a"])
    assert any(not torch.equal(saved["a"][key], saved["c"][key]) for key in saved["a"])


# Bad input: exit code 2, one line that says what, where and how to mend it


@pytest.mark.parametrize(
    ("stage", "argv", "expected"),
    [
        ("sft", ["--data_path", "/no/such.jsonl"], ["/no/such.jsonl"]),
        ("sft", ["--learning_rat", "1"], ["unknown flag --learning_rat", "did you mean --learning_rate?"]),
        ("reward", ["--num_padding_at_beginning", "1"], ["--num_padding_at_beginning is gone"]),
        ("ppo", ["--top_p", "0.9"], ["--top_k and --top_p must stay off"]),
    ],
)
def test_a_mistake_ends_a_real_process_with_exit_code_2_and_one_line(stage, argv, expected, model_dirs, tmp_path):
    known = ["--output_dir", str(tmp_path / "out"), "--data_path", "toy"]
    models = ["--actor_model_name_or_path", "x", "--critic_model_name_or_path", "y"]
    models = models if stage == "ppo" else ["--model_name_or_path", model_dirs("llama")]
    done = subprocess_run(stage, *known, *models, *argv)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for text in expected:
        assert text in line


def bad_file(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    return str(path)


GOOD = b'{"prompt": "a question", "chosen": "an answer", "rejected": "no"}\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "bad.jsonl"),
        (GOOD + b'{"prompt": "a question", "chosen": \n' + GOOD, "bad.jsonl:2"),
        (GOOD + b'{"questoin": "a", "reply": "b"}\n', "bad.jsonl:2"),
        (GOOD + b'{"prompt": "a", "chosen": " ", "rejected": "b"}\n', "bad.jsonl:2"),
        (GOOD + b'{"prompt": "\xff\xfe", "chosen": "a", "rejected": "b"}\n', "bad.jsonl:2"),
    ],
    ids=["empty file", "broken line", "wrong keys", "empty answer", "bad UTF-8"],
)
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_bad_file_is_named_with_its_line(stage, content, expected, model_dirs, cache_dir, tmp_path):
    with pytest.raises(UserError) as error:
        run(stage, bad_file(tmp_path, content), cache_dir, tmp_path / "out", model_name_or_path=model_dirs("llama"))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_split_without_data_for_the_stage(model_dirs, data_file, cache_dir, tmp_path):
    with pytest.raises(UserError, match="--data_split"):
        run("sft", data_file, cache_dir, tmp_path, model_name_or_path=model_dirs("llama"), data_split="0,1,1")


def test_an_output_folder_that_cannot_be_written(model_dirs, data_file, cache_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run("sft", data_file, cache_dir, tmp_path / "file" / "out", model_name_or_path=model_dirs("llama"))


def test_a_reward_model_is_no_actor_and_the_reverse(trained, data_file, cache_dir, tmp_path):
    pairs = [("reward", "reward", "is a reward model"), ("sft", "sft", "is a language model")]
    for actor, critic, expected in pairs:
        models = {"actor_model_name_or_path": trained[actor], "critic_model_name_or_path": trained[critic]}
        with pytest.raises(UserError, match=expected):
            run("ppo", data_file, cache_dir, tmp_path, **models)


def test_a_missing_model_and_one_that_is_too_short(model_dirs, data_file, cache_dir, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        run("sft", data_file, cache_dir, tmp_path, model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="256 positions"):
        run("sft", data_file, cache_dir, tmp_path, model_name_or_path=model_dirs("llama"), max_seq_len=300)


@pytest.mark.parametrize("stage", STEPS)
def test_a_run_with_nothing_to_evaluate_on_is_refused(stage, trained, cache_dir, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a?", "chosen": "b", "rejected": "c"}')
    models = {"model_name_or_path": trained["sft"]}
    if stage == "ppo":
        models = {"actor_model_name_or_path": trained["sft"], "critic_model_name_or_path": trained["reward"]}
    split = {"sft": "1,0,0", "ppo": "0,0,1"}.get(stage, "0,1,0")
    with pytest.raises(UserError, match="left .*to evaluate on; give more --data_path, or --eval_data_path"):
        run(stage, str(tmp_path / "one.jsonl"), cache_dir, tmp_path / "out", data_split=split, **models)


@pytest.mark.parametrize("flags", [{}, {"loss_type": "kto"}], ids=["pairs", "answers"])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_micro_batches_by_length_make_the_same_steps(
    stage, flags, trained, data_file, cache_dir, tmp_path, monkeypatch
):
    if flags and stage != "dpo":
        flags = {"weight_decay": 0.1}
    lines, split = [], {"sft": "1,0,0"}.get(stage, "0,1,0")
    given = {"model_name_or_path": trained["sft"], "per_device_train_batch_size": 8, "data_split": split, **flags}
    backward, number = program(stage).backward, [0]

    def counted(*args):
        number[-1] += 1
        backward(*args)

    monkeypatch.setattr(program(stage), "backward", counted)
    for tokens in (0, 100):
        number.append(0)
        out = run(stage, data_file, cache_dir, tmp_path / str(tokens), max_tokens_per_batch=tokens, **given)
        log = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
        lines.append([line for line in log if "loss" in line])
    assert number[1] == 2 and number[2] >= 4, "two steps, in more micro-batches"
    for one, other in zip(*lines, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


# Flags


def test_the_flags_are_frozen():
    """A new flag is a decision: change this test with it."""
    counts = {stage: len(program(stage).Config.__dataclass_fields__) for stage in STEPS}
    assert counts == {"sft": 52, "reward": 56, "dpo": 60, "ppo": 116}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("learning_rate", 1e-4),
        ("weight_decay", 0.5),
        ("max_grad_norm", 0.01),
        ("num_warmup_steps", 2),
        ("lr_scheduler_type", "constant"),
        ("per_device_train_batch_size", 2),
        ("gradient_accumulation_steps", 2),
        ("prompt_loss_weight", 0.5),
        ("max_seq_len", 24),
        ("data_split", "1,0,0"),
        ("eval_fraction", 0.5),
        ("dtype", "bf16"),
        ("seed", 8),
        ("max_steps", 1),
    ],
)
def test_a_flag_of_step_1_changes_the_weights(flag, value, trained, model_dirs, data_file, cache_dir, tmp_path):
    out = run("sft", data_file, cache_dir, tmp_path, model_name_or_path=model_dirs("llama"), **{flag: value})
    before = load_file(str(Path(trained["sft"]) / "model.safetensors"))
    after = load_file(str(Path(out) / "model.safetensors"))
    assert any(not torch.equal(before[key].float(), after[key].float()) for key in before)


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "num_workers", "per_device_eval_batch_size"])
def test_a_flag_of_speed_or_memory_changes_no_weight(flag, trained, model_dirs, data_file, cache_dir, tmp_path):
    value = True if flag == "gradient_checkpointing" else 2
    out = run("sft", data_file, cache_dir, tmp_path, model_name_or_path=model_dirs("llama"), **{flag: value})
    before = load_file(str(Path(trained["sft"]) / "model.safetensors"))
    after = load_file(str(Path(out) / "model.safetensors"))
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


def test_dropout_is_a_flag_of_step_1(model_dirs, data_file, cache_dir, tmp_path):
    """Two forwards of one batch differ in training exactly when dropout is on."""
    weights = []
    for name, dropout in (("off", 0.0), ("on", 0.3)):
        out = run("sft", data_file, cache_dir, tmp_path / name, model_name_or_path=model_dirs("gpt2"), dropout=dropout)
        weights.append(load_file(str(Path(out) / "model.safetensors")))
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_show_batch_and_evaluation_flags(model_dirs, data_file, cache_dir, tmp_path, capsys):
    out = run(
        "sft",
        data_file,
        cache_dir,
        tmp_path,
        model_name_or_path=model_dirs("llama"),
        show_batch=True,
        eval_interval=1,
        log_interval=2,
        max_eval_samples=3,
    )
    text = capsys.readouterr().out
    assert "in the loss" in text and "3 held out" in text
    assert [line["step"] for line in lines(out) if "eval/perplexity" in line] == [0, 1, 2]
    assert [line["step"] for line in lines(out) if "loss" in line] == [2]


def test_arguments_helper_makes_flags_the_programs_know():
    assert "--output_dir" in arguments("ppo", "toy", "c", Path("o"))
