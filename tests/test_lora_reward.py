"""A reward model that is an adapter on the reference: trained by step 2, equal to plain PEFT, and no second trunk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from dschat.data.loader import collate_rankings
from dschat.data.tokenizer import load_tokenizer, train_tokenizer
from dschat.engine.deepspeed_engine import TrainSpec, create_frozen_model, create_train_engine, save_weights
from dschat.engine.distributed import init_runtime
from dschat.engine.micro_batches import MicroBatches
from dschat.errors import UserError
from dschat.models import adapters, lora
from dschat.models.adapted import trained_table
from dschat.models.adapters import add_adapter_reward, load_merged_scorer
from dschat.models.load import load_causal_lm, load_scorer, save_model
from dschat.models.lora import save_adapter
from dschat.models.scorer import Scorer, last_token_values, load_score_stats, save_score_stats
from dschat.rlhf.reward_lora import LoraReward
from dschat.rlhf.rewards import Samples
from tests import programs
from tests.families import FAMILIES, ragged_prompts, tiny_config, tiny_model

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

PAIR = ("gpt2", "llama")  # Conv1D with tied embeddings; linear layers without
FP32 = torch.float32
DIM = 4


def create_lora_scorer(classifier, dim: int, alpha: int | None = None, module_name: str = "auto") -> Scorer:
    lora.add_lora(classifier, lora.LoraSpec(dim, alpha, module_name))
    return Scorer(classifier)


@pytest.fixture(scope="module")
def runtime():
    return init_runtime(0)


@pytest.fixture(scope="module")
def trained(model_dirs, data_file, cache_dir, tmp_path_factory):
    """By family: the output directory of step 2 with adapters."""
    root = tmp_path_factory.mktemp("lora")
    made: dict[str, str] = {}

    def directory(family: str) -> str:
        if family not in made:
            flags = {
                "model_name_or_path": model_dirs(family),
                "learning_rate": 3e-2,
                "lora_learning_rate": 3e-2,
                "lora_dim": DIM,
            }
            made[family] = programs.run("reward", data_file, cache_dir, root / family, **flags)
        return made[family]

    return directory


@pytest.fixture
def copied(trained, tmp_path):
    """An adapter directory that a test may damage."""
    return Path(shutil.copytree(trained("llama"), tmp_path / "copy"))


def reference(family: str, model_dirs, tokenizer) -> transformers.PreTrainedModel:
    return load_causal_lm(model_dirs(family), tokenizer, dtype=FP32, dropout=0.0).eval()


def samples_of(rows: list[list[int]]) -> Samples:
    empty = [""] * len(rows)
    return Samples(empty, empty, [[] for _ in rows], rows, [1] * len(rows), [True] * len(rows), [{} for _ in rows])


def rows_of(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


def logits_of(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask.long()).logits


def plain_peft_scores(base: str, adapter_dir: str, rows: list[list[int]]) -> torch.Tensor:
    """Each row alone, without padding, by PEFT and transformers as they are."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = peft.PeftModel.from_pretrained(model, adapter_dir).eval()
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])


# Step 2


@pytest.mark.parametrize("family", PAIR)
def test_what_step_2_leaves_behind(family, trained, model_dirs):
    out = Path(trained(family))
    names = {path.name for path in out.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "score_stats.safetensors"}
    assert not names & {"config.json", "model.safetensors"}  # by which full models are known
    assert json.loads((out / "run.json").read_text())["role"] == "reward"
    weights = load_file(str(out / "adapter_model.safetensors"))
    head = {name for name in weights if ".lora_" not in name}
    assert head == {"base_model.model.score.weight"}
    assert all(weight.abs().max() > 0 for weight in weights.values())  # B starts at zero: it has moved
    assert all(DIM in weight.shape for name, weight in weights.items() if name not in head)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path(model_dirs(family)).resolve())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (DIM, 2 * DIM, "SEQ_CLS")


def test_plain_peft_gives_the_scores_in_a_fresh_process(trained, model_dirs, tokenizer, runtime):
    program = """
import sys, json, torch, peft
rows = json.loads(sys.argv[1])
for path in sys.argv[2:]:
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()
    with torch.no_grad():
        print(json.dumps([model(input_ids=torch.tensor([row])).logits.item() for row in rows]))
"""
    rows = rows_of(*ragged_prompts(tokenizer))
    argv = [sys.executable, "-c", program, json.dumps(rows), *(trained(family) for family in PAIR)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for family, line in zip(PAIR, done.stdout.splitlines()[-2:], strict=True):
        scorer = add_adapter_reward(reference(family, model_dirs, tokenizer), trained(family), normalize=False)
        options = {"micro_batch_size": 3, "device": runtime.device, "verify": False}  # raw scores
        source = LoraReward(scorer, trained(family), tokenizer, **options)
        assert torch.allclose(torch.tensor(source(samples_of(rows)).scores), torch.tensor(json.loads(line)), atol=1e-5)
        assert 0 <= source.padding_gap(samples_of(rows)) < 1e-5


def batches_of(tokenizer, num_steps: int) -> list[list[dict[str, torch.Tensor]]]:
    """Two micro-batches a step, pairs of unequal length."""
    generator = torch.Generator().manual_seed(1)

    def pair() -> dict:
        sizes = torch.randint(4, 14, (2,), generator=generator).tolist()
        ids = [torch.randint(4, len(tokenizer), (size,), generator=generator).tolist() for size in sizes]
        return {"input_ids": ids, "ranks": [1, 2], "prompt_len": 2, "margin": 0.0}

    return [
        [collate_rankings([pair() for _ in range(n)], n, tokenizer.pad_token_id) for n in (3, 2)]
        for _ in range(num_steps)
    ]


def train_steps(family: str, directory: Path, model_dirs, tokenizer, runtime, **options) -> dict[str, torch.Tensor]:
    """Three steps of step 2's own loop on an adapter; the saved weights."""
    torch.manual_seed(0)
    classifier = load_scorer(model_dirs(family), tokenizer, dtype=FP32, dropout=0.0)
    scorer = create_lora_scorer(classifier, DIM)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in scorer.named_parameters()}
    stage = options.pop("stage", 0)
    spec = TrainSpec(1e-2, 0.0, "constant", 0, 3, 0.0, stage, lora_learning_rate=1e-2, **options)
    engine = create_train_engine(scorer, spec, dtype=FP32, runtime=runtime)
    for batches in batches_of(tokenizer, 3):
        programs.program("reward").train_step(engine, batches, {}, MicroBatches(runtime), runtime)

    def save(whole) -> None:
        after = dict(whole.named_parameters())
        assert after.keys() == before.keys()
        for name, (is_trained, weight) in before.items():
            assert is_trained == (".lora_" in name or name == "model.score.weight")
            assert torch.equal(after[name].cpu(), weight) != is_trained, name
        directory.mkdir()
        save_adapter(whole.model, tokenizer, str(directory), model_dirs(family))

    save_weights(engine, save, runtime)
    return load_file(str(directory / "adapter_model.safetensors"))


@pytest.mark.parametrize("family", PAIR)
def test_only_adapters_and_head_move_and_the_same_at_every_zero_stage(
    family, model_dirs, tokenizer, runtime, tmp_path
):
    """With recomputed activations too: a frozen embedding must not cut the gradient off."""
    common = (model_dirs, tokenizer, runtime)
    plain = train_steps(family, tmp_path / "plain", *common)
    runs = {f"stage {stage}": {"stage": stage} for stage in (1, 2, 3)} | {"gc": {"gradient_checkpointing": True}}
    for name, options in runs.items():
        other = train_steps(family, tmp_path / name, *common, **options)
        assert other.keys() == plain.keys()
        for key, weight in plain.items():
            assert torch.allclose(other[key], weight, atol=1e-5), (name, key)


def test_adapters_start_without_effect_and_count_alpha_over_dim(model_dirs, tokenizer):
    ids, mask = ragged_prompts(tokenizer)
    torch.manual_seed(0)
    classifier = load_scorer(model_dirs("llama"), tokenizer, dtype=FP32, dropout=0.0).eval()
    with torch.no_grad():
        before = Scorer(classifier)(ids, mask)
        scorer = create_lora_scorer(classifier, DIM, alpha=12)
        assert torch.equal(scorer(ids, mask), before)
        layer = classifier.get_submodule("model.layers.0.self_attn.q_proj")
        torch.nn.init.ones_(layer.lora_B[lora.NAME].weight)
        x = torch.randn(3, 32)
        expected = x @ layer.base_layer.weight.T + 12 / DIM * (x @ layer.lora_A[lora.NAME].weight.T).sum(-1, True)
        assert torch.allclose(layer(x), expected, atol=1e-5)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
LAYERS = {
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "gpt_neox": FUSED,
    "bloom": FUSED,
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
} | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), ATTENTION + ["gate_proj", "up_proj", "down_proj"])


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_is_every_linear_layer_of_the_blocks_and_a_reference_of_every_family_scores(family, tokenizer, tmp_path):
    """The scores on the reference, on either padding side, are those that the scorer of step 2 gave."""
    base, out = str(tmp_path / "base"), str(tmp_path / "adapter")
    save_model(tiny_model(family, tokenizer), tokenizer, base)
    classifier = load_scorer(base, tokenizer, dtype=FP32, dropout=0.0).eval()
    found = [name.rsplit(".", 1)[-1] for name in lora.adapted_layers(classifier, "auto")]
    assert sorted(found) == sorted(2 * LAYERS[family])
    scorer = create_lora_scorer(classifier, DIM)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    Path(out).mkdir()
    save_adapter(scorer.model, tokenizer, out, base)
    save_score_stats(out, 0.3, 1.7)
    reward = add_adapter_reward(load_causal_lm(base, tokenizer, dtype=FP32), out)
    ids, mask = ragged_prompts(tokenizer)
    right = torch.stack([torch.cat([row[keep], row[~keep]]) for row, keep in zip(ids, mask, strict=True)])
    with torch.no_grad():
        expected = (last_token_values(scorer(ids, mask), mask) - 0.3) / 1.7
    assert (last_token_values(reward(ids, mask), mask) - expected).abs().max() < 1e-5
    assert (last_token_values(reward(right, mask.flip(1)), mask.flip(1)) - expected).abs().max() < 1e-5


def sequence_classifier(family: str, tokenizer) -> transformers.PreTrainedModel:
    config = tiny_config(family, tokenizer)
    config.num_labels = 1
    return transformers.AutoModelForSequenceClassification.from_config(config)


def test_the_recorded_base_does_not_depend_on_the_working_directory(model_dirs, tokenizer, tmp_path, monkeypatch):
    base = Path(model_dirs("gpt2"))
    monkeypatch.chdir(base.parent)
    scorer = create_lora_scorer(sequence_classifier("gpt2", tokenizer), DIM)
    for given, recorded in ((base.name, str(base.resolve())), ("some/hub-name", "some/hub-name")):
        save_adapter(scorer.model, tokenizer, str(tmp_path), given)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == recorded


def test_lora_module_name_picks_layers_by_parts_of_their_names(tokenizer):
    model = tiny_model("opt", tokenizer)
    picked = {name: lora.adapted_layers(model, name) for name in ("q_proj, v_proj", "decoder.layers.", "auto")}
    assert picked["decoder.layers."] == picked["auto"]  # DeepSpeed-Chat's default, made for OPT
    assert len(picked["q_proj, v_proj"]) == 4 and all(
        name.endswith(("q_proj", "v_proj")) for name in picked["q_proj, v_proj"]
    )
    gpt2 = create_lora_scorer(sequence_classifier("gpt2", tokenizer), DIM, module_name="attn.c_proj")
    names = {name.split(".lora_")[0] for name, p in gpt2.named_parameters() if ".lora_" in name}
    assert names == {f"model.transformer.h.{layer}.attn.c_proj" for layer in (0, 1)}  # not the c_proj of the MLP
    for wrong in ("q_proj,attn_qkv", "lm_head", "", "q_proj,"):
        with pytest.raises(UserError, match="fc1, fc2, k_proj, out_proj, q_proj, v_proj"):
            lora.adapted_layers(model, wrong)


def test_the_table_says_how_many_parameters_are_trained(tokenizer):
    """By hand: 2 blocks x (4 x 32 -> 96, 32 -> 32, 32 -> 128, 128 -> 32), rank 4, of a GPT-2 of width 32."""
    model = sequence_classifier("gpt2", tokenizer)
    trunk = sum(p.numel() for p in model.transformer.parameters())
    text = trained_table(create_lora_scorer(model, 4))
    num_adapters = 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    numbers = {line.split("  ")[0].strip(): line.split()[-3:] for line in text.splitlines()[2:]}
    assert numbers["adapters"][:2] == [f"{num_adapters:,}"] * 2
    assert numbers["score head"][:2] == ["32", "32"]
    assert numbers["trunk"][:2] == ["0", f"{trunk:,}"]
    assert numbers["together"][:2] == [f"{num_adapters + 32:,}", f"{num_adapters + 32 + trunk:,}"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"lora_alpha": 8}, "--lora_dim"),
        ({"lora_module_name": "q_proj"}, "--lora_dim"),
        ({"lora_dim": -1}, "--lora_dim -1"),
        ({"lora_dim": 4, "lora_alpha": 0}, "--lora_alpha 0"),
        ({"lora_dim": 4, "model_name_or_path": "toy"}, "toy"),
        ({"lora_dim": 4, "lora_module_name": "c_attn"}, "q_proj"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, expected, model_dirs, data_file, cache_dir, tmp_path):
    flags = {"model_name_or_path": model_dirs("llama")} | flags
    with pytest.raises(UserError, match=expected):
        programs.run("reward", data_file, cache_dir, tmp_path, **flags)


def test_the_flags_have_an_effect_and_the_table_is_printed(
    trained, model_dirs, data_file, cache_dir, tmp_path, capsys
):
    flags = {
        "model_name_or_path": model_dirs("llama"),
        "learning_rate": 3e-2,
        "lora_learning_rate": 3e-2,
        "lora_dim": DIM,
        "max_steps": 2,
    }
    out = programs.run("reward", data_file, cache_dir, tmp_path / "a", **flags, lora_alpha=32, zero_stage=3)
    text = capsys.readouterr().out
    assert "score head" in text and "together" in text
    with pytest.raises(UserError, match="adapter_config.json: a model of another kind"):
        programs.run("reward", data_file, cache_dir, Path(out), model_name_or_path=model_dirs("llama"))
    some = programs.run("reward", data_file, cache_dir, tmp_path / "b", **flags, lora_module_name="q_proj")
    assert json.loads(Path(out, "adapter_config.json").read_text())["lora_alpha"] == 32
    weights = {d: load_file(f"{d}/adapter_model.safetensors") for d in (trained("llama"), out, some)}
    assert any(not torch.allclose(weights[out][k], w, atol=1e-3) for k, w in weights[trained("llama")].items())
    assert {key.split(".")[-3] for key in weights[some] if ".lora_" in key} == {"q_proj"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json: a model of another kind"):
        programs.run("reward", data_file, cache_dir, tmp_path / "full", **flags)


# Step 3


@pytest.mark.parametrize("family", PAIR)
def test_scores_are_those_of_plain_peft_and_of_the_merged_classifier(family, trained, model_dirs, tokenizer, runtime):
    out = trained(family)
    ids, mask = ragged_prompts(tokenizer, (3, 9, 6, 1, 12))
    rows = rows_of(ids, mask)
    mean, std = load_score_stats(out)
    expected = (plain_peft_scores(model_dirs(family), out, rows) - mean) / std
    assert expected.std() > 0.1
    reward = add_adapter_reward(reference(family, model_dirs, tokenizer), out)
    source = LoraReward(reward, out, tokenizer, micro_batch_size=2, device=runtime.device)
    assert source.name == "lora"
    judged = source(samples_of(rows))
    assert all(isinstance(score, float) for score in judged.scores) and judged.masks == []
    assert (torch.tensor(judged.scores) - expected).abs().max() < 1e-5
    merged = load_merged_scorer(out, model_dirs(family), tokenizer, dtype=FP32)
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in merged.modules())
    assert all(parameter.requires_grad for parameter in merged.parameters())  # the critic starts from it
    with torch.no_grad():
        for side_ids, side_mask in ((ids, mask), (ids.flip(1), mask.flip(1))):
            values, wanted = reward(side_ids, side_mask), Scorer(merged, mean, std)(side_ids, side_mask)
            assert values.dtype == FP32 and values.shape == ids.shape
            assert (values - wanted)[side_mask].abs().max() < 1e-5
        alone = torch.stack([merged(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
    assert ((alone - mean) / std - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", PAIR)
def test_the_reference_keeps_its_logits_bit_for_bit_and_its_memory(family, trained, model_dirs, tokenizer, runtime):
    ids, mask = ragged_prompts(tokenizer)
    model = reference(family, model_dirs, tokenizer)
    before = logits_of(model, ids, mask)
    places = {p.data_ptr() for p in model.parameters()}
    size = sum(p.numel() for p in model.parameters())
    reward = add_adapter_reward(model.train(), trained(family))
    assert not any(module.training for module in reward.modules())  # scores without dropout
    assert torch.equal(logits_of(model, ids, mask), before)
    source = LoraReward(reward, trained(family), tokenizer, micro_batch_size=2, device=runtime.device)
    source(samples_of(rows_of(ids, mask)))
    assert torch.equal(logits_of(model, ids, mask), before)

    assert places <= {p.data_ptr() for p in model.parameters()}
    weights = load_file(f"{trained(family)}/adapter_model.safetensors")
    assert sum(p.numel() for p in reward.parameters()) == size + sum(weight.numel() for weight in weights.values())
    assert not any(p.requires_grad for p in reward.parameters())
    assert not any(module.training for module in model.modules())


def test_only_one_position_pays_for_the_vocabulary(trained, model_dirs, tokenizer):
    model, sizes = reference("gpt2", model_dirs, tokenizer), []
    reward = add_adapter_reward(model, trained("gpt2"))
    model.lm_head.register_forward_hook(lambda module, args, logits: sizes.append(logits.shape))
    ids, mask = ragged_prompts(tokenizer)
    reward(ids, mask)
    assert [size[:2] for size in sizes] == [(1, 1)]


def test_the_adapter_is_off_again_after_an_error(trained, model_dirs, tokenizer):
    ids, mask = ragged_prompts(tokenizer)
    model = reference("llama", model_dirs, tokenizer)
    before = logits_of(model, ids, mask)
    reward = add_adapter_reward(model, trained("llama"))
    seen = []

    def fail(*_) -> None:
        seen.append(model.get_submodule("model.layers.0.self_attn.q_proj").active_adapters)
        raise RuntimeError("out of memory")

    handle = model.base_model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        reward(ids, mask)
    handle.remove()
    assert seen == [[adapters.NAME]]
    assert torch.equal(logits_of(model, ids, mask), before)


@pytest.mark.parametrize("family", PAIR)
def test_a_sharded_reference_scores_the_same(family, trained, model_dirs, tokenizer, runtime):
    """ZeRO 3 records the order of modules, which differs with the adapter on: the two kinds of calls alternate."""
    ids, mask = ragged_prompts(tokenizer)
    model = reference(family, model_dirs, tokenizer)
    reward = add_adapter_reward(model, trained(family))
    expected, logits = reward(ids, mask), logits_of(model, ids, mask)
    engine = create_frozen_model(model, zero_stage=3, dtype=FP32, device=runtime.device)
    for _ in range(3):
        assert torch.allclose(reward(ids, mask)[mask], expected[mask], atol=1e-6)
        assert torch.equal(logits_of(engine, ids, mask), logits)


def test_bf16(trained, model_dirs, tokenizer):
    ids, mask = ragged_prompts(tokenizer)
    model = load_causal_lm(model_dirs("llama"), tokenizer, dtype=torch.bfloat16, dropout=0.0)
    reward = add_adapter_reward(model, trained("llama"))
    assert {p.dtype for p in reward.parameters()} == {torch.bfloat16}
    exact = add_adapter_reward(reference("llama", model_dirs, tokenizer), trained("llama"))(ids, mask)
    values = reward(ids, mask)
    assert values.dtype == FP32
    assert (values - exact)[mask].abs().max() < 0.1 * exact[mask].std()


def test_the_base_directory_may_be_gone(copied, model_dirs, tokenizer):
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/model"}))
    ids, mask = ragged_prompts(tokenizer)
    values = add_adapter_reward(reference("llama", model_dirs, tokenizer), str(copied))(ids, mask)
    merged = load_merged_scorer(str(copied), model_dirs("llama"), tokenizer, dtype=FP32)
    with torch.no_grad():
        wanted = Scorer(merged, *load_score_stats(str(copied)))(ids, mask)
    assert (values - wanted)[mask].abs().max() < 1e-5


# Directories that do not fit


def damage(copied: Path, kind: str) -> None:
    path = copied / "adapter_model.safetensors"
    weights = load_file(str(path))
    name = next(iter(weights))
    if kind == "no adapter":
        (copied / "adapter_config.json").unlink()
    elif kind == "no weights":
        path.unlink()
    elif kind == "broken weights":
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "broken config":
        (copied / "adapter_config.json").write_text("{")
    elif kind == "no LoRA":
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]).save_pretrained(str(copied))
    elif kind == "weight missing":
        save_file({key: weights[key] for key in weights if key != name}, str(path))
    elif kind == "weight too many":
        save_file(weights | {f"{name}.other": torch.zeros(2)}, str(path))
    elif kind == "no head":
        save_file({key: weights[key] for key in weights if ".lora_" in key}, str(path))
    elif kind == "head of another size":
        save_file(weights | {"base_model.model.score.weight": torch.zeros(1, 16)}, str(path))
    elif kind == "no statistics":
        (copied / "score_stats.safetensors").unlink()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("no adapter", "holds no adapter_config.json"),
        ("no weights", "cannot be read"),
        ("broken weights", "cannot be read"),
        ("broken config", "cannot be read"),
        ("no LoRA", "only LoRA"),
        ("weight missing", "1 weights are missing and 0 unexpected"),
        ("weight too many", "0 weights are missing and 1 unexpected"),
        ("no head", r"for instance score.weight \(1, 32\)"),
        ("head of another size", "score.weight"),
        ("no statistics", "score_stats.safetensors is missing"),
    ],
)
def test_a_damaged_directory(kind, expected, copied, model_dirs, tokenizer):
    damage(copied, kind)
    with pytest.raises(UserError, match=expected) as error:
        add_adapter_reward(reference("llama", model_dirs, tokenizer), str(copied))
    assert "\n" not in str(error.value) and str(copied) in str(error.value)
    if kind != "no statistics":
        with pytest.raises(UserError, match=expected):
            load_merged_scorer(str(copied), model_dirs("llama"), tokenizer, dtype=FP32)


@pytest.mark.parametrize("change", ["family", "hidden_size", "num_hidden_layers", "fewer layers"])
def test_an_adapter_of_another_model(change, trained, model_dirs, tokenizer):
    if change == "family":
        model = reference("gpt2", model_dirs, tokenizer)
    else:
        config = tiny_config("llama", tokenizer)
        size = {"hidden_size": 64, "num_hidden_layers": 3}.get(change, 1)
        setattr(config, "num_hidden_layers" if change == "fewer layers" else change, size)
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="was trained on another model") as error:
        add_adapter_reward(model, trained("llama"))
    assert "\n" not in str(error.value)


def test_another_tokenizer(copied, model_dirs, tokenizer, runtime):
    train_tokenizer(["entirely different text"], 300).save_pretrained(str(copied))
    scorer = add_adapter_reward(reference("llama", model_dirs, tokenizer), str(copied))
    actor = load_tokenizer(model_dirs("llama"))
    with pytest.raises(UserError, match="different tokenizers"):
        LoraReward(scorer, str(copied), actor, micro_batch_size=2, device=runtime.device)


def test_an_adapter_on_another_trunk_of_the_same_shape(trained, model_dirs, tokenizer, runtime):
    """Nothing but the probes can tell; the sharded reference answers them too."""
    options = {"micro_batch_size": 2, "device": runtime.device}
    for stage in (0, 3):
        for is_other in (False, True):
            model = reference("llama", model_dirs, tokenizer)
            if is_other:
                torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight, std=0.1)
            scorer = add_adapter_reward(model, trained("llama"))
            create_frozen_model(model, zero_stage=stage, dtype=FP32, device=runtime.device)
            if not is_other:
                LoraReward(scorer, trained("llama"), tokenizer, **options)
                continue
            with pytest.raises(UserError, match="the trunk that it was trained on") as error:
                LoraReward(scorer, trained("llama"), tokenizer, **options)
            assert "\n" not in str(error.value)
            LoraReward(scorer, trained("llama"), tokenizer, verify=False, **options)
