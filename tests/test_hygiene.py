"""What SECURITY.md promises: no code of strangers, no pickle, no shell, exact weights, a private cache."""

import ast
import json
import os
import pickle
import shutil
import stat
from pathlib import Path

from dschat import remote_code
from dschat.config import flag, parse_config
from dschat.data.cache import open_cache
from dschat.data.tokenizer import load_tokenizer
from dschat.errors import UserError
from dschat.models.load import load_causal_lm, load_config, load_scorer, load_trained_scorer
from tests import programs
from tests.conftest import ROOT

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

FP32 = torch.float32
OURS = [ROOT / "chat.py", ROOT / "e2e_rlhf.py"]
OURS += [path for folder in ("dschat", "training", "inference") for path in (ROOT / folder).rglob("*.py")]


@pytest.fixture(scope="module")
def policy(model_dirs):
    return model_dirs("llama")


@pytest.fixture(scope="module")
def reward(policy, data_file, cache_dir, tmp_path_factory):
    return programs.run("reward", data_file, cache_dir, tmp_path_factory.mktemp("rm"), model_name_or_path=policy)


# Code that comes with a model


@pytest.fixture
def stranger(policy, tmp_path, monkeypatch):
    """A model and tokenizer directory whose code leaves a file behind when it runs."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    directory = Path(shutil.copytree(policy, tmp_path / "stranger"))
    (directory / "strange.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        f"Path({str(tmp_path / 'it ran')!r}).touch()\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
        "class StrangeModel(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
        "class StrangeTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    maps = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeModel"}
    for file, entry in (
        ("config.json", {"model_type": "strange", "auto_map": maps}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "strange.StrangeTokenizer"]}}),
    ):
        content = json.loads((directory / file).read_text()) | entry
        content.pop("tokenizer_class", None)
        (directory / file).write_text(json.dumps(content))
    yield str(directory)
    remote_code.trust(False)


def test_the_code_of_a_model_runs_only_when_it_is_trusted(stranger, tokenizer, tmp_path):
    for load in (load_config, load_tokenizer, lambda path: load_causal_lm(path, tokenizer, dtype=FP32)):
        with pytest.raises(UserError, match="brings Python code of its own.*--trust_remote_code") as error:
            load(stranger)
        assert "\n" not in str(error.value) and not (tmp_path / "it ran").exists()
    remote_code.trust(True)
    assert type(load_tokenizer(stranger)).__name__ == "StrangeTokenizer"
    assert type(load_causal_lm(stranger, tokenizer, dtype=FP32)).__name__ == "StrangeModel"
    assert (tmp_path / "it ran").exists()


def test_every_program_that_loads_a_model_has_the_flag():
    for path in [*sorted((ROOT / "training").glob("step*/*.py")), ROOT / "chat.py"]:
        config = programs.load(os.path.relpath(path, ROOT / "training")).Config
        assert config.__dataclass_fields__["trust_remote_code"].default is False, path


def test_the_flag_takes_effect_where_flags_are_read():
    from dataclasses import dataclass

    @dataclass(kw_only=True)
    class Config:
        trust_remote_code: bool = flag(False, "")

    for argv in (["--trust_remote_code"], []):
        parse_config(Config, argv)
        assert remote_code.is_trusted() == bool(argv)


# Weights


class Bomb:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickled_checkpoint_is_read_as_tensors_only(policy, tokenizer, tmp_path):
    weights = load_file(f"{policy}/model.safetensors")
    directory = Path(shutil.copytree(policy, tmp_path / "bin"))
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    assert load_causal_lm(str(directory), tokenizer, dtype=FP32).num_parameters() > 0
    torch.save(weights | {"model.norm.weight": Bomb(tmp_path / "it ran")}, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_causal_lm(str(directory), tokenizer, dtype=FP32)
    assert "\n" not in str(error.value) and not (tmp_path / "it ran").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "it ran"))).close()
    assert (tmp_path / "it ran").exists(), "as a plain load would have"


def changed(directory: str, to: Path, **weights: torch.Tensor) -> str:
    shutil.copytree(directory, to)
    file = to / "model.safetensors"
    named = {name.replace("__", "."): weight for name, weight in weights.items()}
    save_file(load_file(file) | named, file, metadata={"format": "pt"})
    return str(to)


def test_weights_beyond_the_model_are_refused(policy, reward, tokenizer, tmp_path):
    def reward_model(path):
        load_trained_scorer(path, tokenizer, dtype=FP32, normalize=False)

    extra = {"model__layers__7__mlp__up_proj__weight": torch.zeros(2, 2)}
    head = {"v_head__summary__weight": torch.zeros(1, 2)}
    for number, (load, directory, weights) in enumerate(
        [
            (load_causal_lm, policy, extra),
            (load_causal_lm, policy, head),
            (load_scorer, policy, extra),
            (reward_model, reward, extra),
            (reward_model, reward, head),
        ]
    ):
        path = changed(directory, tmp_path / str(number), **weights)
        options = {} if load is reward_model else {"tokenizer": tokenizer, "dtype": FP32}
        name = next(iter(weights)).replace("__", ".")
        with pytest.raises(UserError, match=f"has, beyond its model, 1 weights .{name}"):
            load(path, **options)
    load_scorer(changed(policy, tmp_path / "lm", lm_head__weight=torch.zeros(2, 2)), tokenizer, dtype=FP32)


# The code


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "tempfile.mktemp", "yaml.load", "subprocess.getoutput"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def faults(source: str) -> list[str]:
    tree, found = ast.parse(source), []
    for name, options in calls(tree):
        found += [name] if name in FORBIDDEN else []
        found += ["shell"] if options.get("shell", "False") != "False" else []
        found += ["torch.load"] if name == "torch.load" and options.get("weights_only") != "True" else []
        is_auto = name.startswith("Auto") or name == "auto_class.from_pretrained"
        if name.endswith(".from_pretrained") and is_auto and not {"trust_remote_code", None} & set(options):
            found.append(name)
        found += ["data"] if name.endswith("load_dataset") and "trust_remote_code" in options else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in PICKLES]
        elif isinstance(node, ast.ImportFrom) and node.module in PICKLES:
            found += [alias.name for alias in node.names if not alias.name.endswith("Error")]
    return found


@pytest.mark.parametrize(
    "source",
    [
        *(
            "eval('1')",
            "import pickle",
            "from pickle import loads",
            "subprocess.run('ls', shell=True)",
            "torch.load(f)",
        ),
        *("torch.load(f, weights_only=False)", "yaml.load(f)", "tempfile.mktemp()", "AutoModel.from_pretrained(p)"),
        *("os.system('ls')", "datasets.load_dataset(p, trust_remote_code=True)"),
    ],
)
def test_the_search_finds(source):
    assert faults(source)


def test_no_pickle_no_shell_no_evaluation_of_text():
    assert len(OURS) > 80
    assert {str(path): found for path in OURS if (found := faults(path.read_text(encoding="utf-8")))} == {}


# The cache


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_data_cache_is_its_users_alone(data_file, tmp_path):
    from dschat.data.sources import load_examples

    cache = tmp_path / "new" / "cache"
    load_examples([data_file], "train", "sft", cache_dir=str(cache), seed=0)
    assert mode(cache) == 0o700
    cache.chmod(0o755)  # made by an earlier version
    load_examples([data_file], "train", "sft", cache_dir=str(cache), seed=0)
    assert mode(cache) == 0o700


def test_a_folder_of_others_is_no_cache(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir(mode=0o755)
    (project / "thesis.tex").touch()
    with pytest.raises(UserError, match="open to other users and more than a data cache .thesis.tex.; give a folder"):
        open_cache(str(project))
    assert mode(project) == 0o755, "whose rights are not ours to take"
    project.chmod(0o700)
    open_cache(str(project))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match="belongs to another user.*--data_output_path"):
        open_cache(str(project))


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the data cache cannot be opened .*; give a folder of its own"):
        open_cache(str(tmp_path / "file" / "cache"))
