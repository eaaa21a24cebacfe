"""ZeRO 3 while a model is read: each weight is a share at once, and together they are the model."""

from dschat.data.tokenizer import load_tokenizer
from dschat.engine.distributed import init_runtime
from dschat.engine.sharded_loading import sharded_loading, whole_loading, whole_weights
from dschat.models.load import load_causal_lm, load_scorer, save_model
from dschat.models.lora import LoraSpec, add_lora
from dschat.rlhf.reference_logprobs import weights_hash
from tests.families import FAMILIES

import pytest
import torch

FP32 = torch.float32


@pytest.fixture(autouse=True)
def runtime():
    return init_runtime(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_every_family_are_the_weights_of_a_plain_load(family, model_dirs, tokenizer):
    larger = load_tokenizer(model_dirs(family))
    larger.add_tokens([f"<{i}>" for i in range(40)])  # the embeddings grow
    for load, given in ((load_causal_lm, tokenizer), (load_causal_lm, larger), (load_scorer, tokenizer)):
        torch.manual_seed(0)
        plain = load(model_dirs(family), given, dtype=FP32, dropout=0.0)
        torch.manual_seed(0)
        with sharded_loading(3, FP32):
            model = load(model_dirs(family), given, dtype=FP32, dropout=0.0)
        expected, found = dict(plain.named_parameters()), dict(model.named_parameters())
        assert expected.keys() == found.keys()
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        grown = {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}
        for name, share in found.items():
            if given is larger and id(share) in grown:  # made anew, and cut up with what is added to the model
                assert share.shape[0] >= len(larger)
            else:
                assert share.numel() == 0 and share.ds_numel == expected[name].numel(), name
            with whole_weights([share]):
                is_new = name.startswith("score.")
                assert share.shape == expected[name].shape
                assert is_new or torch.equal(share, expected[name]), name
        buffers = dict(model.named_buffers())
        assert all(torch.equal(buffers[name], value) for name, value in plain.named_buffers())
        if load is load_causal_lm:
            assert weights_hash(model) == weights_hash(plain)
        else:  # random numbers of its own
            with whole_weights(model.score.parameters()):
                assert 0 < model.score.weight.std() < 3 * model.score.in_features**-0.5


def test_adapters_are_merged_into_a_whole_model_at_stage_3_too(model_dirs, tokenizer, tmp_path):
    model = load_causal_lm(model_dirs("llama"), tokenizer, dtype=FP32)
    add_lora(model, LoraSpec(4))
    save_model(model, tokenizer, str(tmp_path), model_dirs("llama"))
    with sharded_loading(3, FP32):
        merged = load_causal_lm(str(tmp_path), tokenizer, dtype=FP32)
        with whole_loading():
            whole = load_causal_lm(model_dirs("llama"), tokenizer, dtype=FP32)
        again = load_causal_lm(model_dirs("llama"), tokenizer, dtype=FP32)
    assert not any(hasattr(p, "ds_id") for model in (merged, whole) for p in model.parameters())
    assert all(hasattr(p, "ds_id") for p in again.parameters())
    for stage in (0, 2):
        with sharded_loading(stage, FP32):
            plain = load_causal_lm(model_dirs("llama"), tokenizer, dtype=FP32)
        assert not any(hasattr(p, "ds_id") for p in plain.parameters())
