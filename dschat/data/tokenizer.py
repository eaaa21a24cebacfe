"""Load or train a tokenizer that keeps the project's promises: EOS exists, padding is never EOS, a chat template."""

from collections.abc import Iterable

from dschat import remote_code
from dschat.data.templates import ensure_template
from dschat.errors import UserError

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
TOY_VOCAB_SIZE = 1280  # room for every word of the task


def load_tokenizer(name_or_path: str, chat_template: str = "auto", fast: bool = True) -> PreTrainedTokenizerBase:
    """A local directory, a hub name, or "toy" (trained on the embedded task's text); pads on the right."""
    tokenizer: PreTrainedTokenizerBase
    if name_or_path == "toy":
        from dschat.data import toy  # only those who ask for the embedded task pay for making it

        tokenizer = train_tokenizer(toy.corpus(), TOY_VOCAB_SIZE)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name_or_path, use_fast=fast, trust_remote_code=remote_code.is_trusted()
            )
        except Exception as error:  # missing, damaged, offline, gated: one line is enough for each
            remote_code.refuse_if_asked_for(name_or_path, error)
            problem = " ".join(str(error).split())[:200]
            raise UserError(
                f"{name_or_path}: no tokenizer can be loaded from this directory or hub name ({problem}); "
                "check the path, and the network for a hub name"
            ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name_or_path}: the tokenizer has no eos_token, so no answer could ever end; set one in it")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.padding_side = "right"
    ensure_template(tokenizer, chat_template)
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with EOS and PAD and no BOS; the same texts give the same tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD, padding_side="right")
    ensure_template(tokenizer, "plain")
    return tokenizer
