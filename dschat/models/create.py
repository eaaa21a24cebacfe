"""Make a small untrained model and its tokenizer from text of your own: no hub, no download.

    python -m dschat.models.create --data_path train.jsonl --output_dir output/small

The tokenizer is a byte-level BPE trained on the file's dialogues; the model is a Llama with random weights. The
directory is an ordinary Hugging Face one; give it to step 1 as --model_name_or_path.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from dschat.config import flag, parse_config, require_positive, to_dict
from dschat.errors import UserError, run_before_imports, run_program


@dataclass(kw_only=True)
class Config:
    data_path: list[str] = flag(help="the text that the tokenizer is trained on, in any shape that step 1 reads")
    output_dir: str = flag(help="the model directory to write")
    vocab_size: int = flag(4096, "tokens, at most")
    hidden_size: int = flag(256, "width of the model")
    num_hidden_layers: int = flag(4, "depth")
    num_attention_heads: int = flag(4, "divides hidden_size")
    max_position_embeddings: int = flag(1024, "longest dialogue in tokens")
    skip_bad_records: bool = flag(False, "drop records that cannot be read, instead of stopping at the first")
    data_output_path: str = flag("~/.cache/dschat", "folder of the data cache")
    seed: int = flag(1234, "of the weights")

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        require_positive(self, "max_position_embeddings")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise UserError("--hidden_size must be an even multiple of --num_attention_heads")


if __name__ == "__main__":  # help, and mistakes in flags, need not wait for the libraries below, which take seconds
    run_before_imports(partial(parse_config, Config, doc=__doc__))

from dschat.data.sources import load_examples
from dschat.data.tokenizer import train_tokenizer
from dschat.engine.distributed import quiet_libraries
from dschat.models.load import POLICY, save_model
from dschat.report.metrics import prepare_output_dir, write_run_json

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, doc=__doc__)
    quiet_libraries()
    prepare_output_dir(config.output_dir)
    cache = os.path.expanduser(config.data_output_path)
    examples, _ = load_examples(
        config.data_path, "train", "sft", cache_dir=cache, seed=0, skip_bad_records=config.skip_bad_records
    )
    tokenizer = train_tokenizer(texts(examples), config.vocab_size)
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.hidden_size * 3,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    save_model(model, tokenizer, config.output_dir)
    size = sum(parameter.numel() for parameter in model.parameters())
    write_run_json(
        config.output_dir,
        role=POLICY,
        config=to_dict(config),
        data={"examples": len(examples)},
        metrics={"num_parameters": size},
        seconds=0.0,
    )


def texts(examples: datasets.Dataset) -> Iterator[str]:
    """Every turn, with its role as the plain template writes it, so that the role markers become few tokens."""
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    for example in examples:
        yield from (names[message["role"]] + message["content"] for message in example["prompt"])
        yield from (names["assistant"] + response for response in example["responses"])


if __name__ == "__main__":
    run_program(main)
