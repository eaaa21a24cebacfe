"""Examples -> token ids of one stage, by parallel `map`, cached by content, with a count of all that is left out.

Each mapped row carries its `reasons` and whether to keep it, so that the counts come with the cached table, from any
number of workers. What does not fit loses its earliest whole turns first; no prompt is ever cut inside a turn.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any

from dschat.data.records import Message, to_json
from dschat.data.templates import encode_answers, encode_prompt
from dschat.errors import UserError

import datasets
import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TOKENIZING_VERSION = "2"  # change it with anything here or in templates that changes a row
SHORTENED = "dialogue shortened by whole turns"
Rows = Iterator[dict[str, Any]]
_IDS = datasets.List(datasets.Value("int32"))
_FLAGS = {"keep": datasets.Value("bool"), "reasons": datasets.List(datasets.Value("string"))}
_MESSAGES = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})


def tokenize_sft(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, num_workers: int = 1
) -> tuple[datasets.Dataset, Counter[str]]:
    """input_ids, loss_mask (T,): a row for each best-ranked response, all assistant turns of the dialogue learned."""
    columns = {"input_ids": _IDS, "loss_mask": datasets.List(datasets.Value("bool"))}
    return _tokenize(dataset, _sft_rows, columns, tokenizer, max_seq_len, num_workers)


def tokenize_preferences(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, num_workers: int = 1
) -> tuple[datasets.Dataset, Counter[str]]:
    """chosen_ids, rejected_ids (T,), prompt_len (ids they share as the prompt), margin (0.0: none), source.

    Every two responses of different rank are a row; both sequences end in EOS.
    """
    columns = {"chosen_ids": _IDS, "rejected_ids": _IDS, "prompt_len": datasets.Value("int32")}
    columns |= {"margin": datasets.Value("float64"), "source": datasets.Value("string")}
    return _tokenize(dataset, _preference_rows, columns, tokenizer, max_seq_len, num_workers)


def tokenize_prompts(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_prompt_seq_len: int, num_workers: int = 1
) -> tuple[datasets.Dataset, Counter[str]]:
    """prompt_ids (P,), messages, record: different prompts, with the generation prompt at the end.

    `record` is JSON text for rewards and loss masks: {"responses": [texts, best first], **metadata of the record}. Of
    records with the same prompt the first counts.
    """
    columns = {"prompt_ids": _IDS, "messages": _MESSAGES, "record": datasets.Value("string")}
    table, counter = _tokenize(dataset, _prompt_rows, columns, tokenizer, max_prompt_seq_len, num_workers)
    seen: set[bytes] = set()
    first = []
    for row, ids in enumerate(table.with_format("numpy", columns=["prompt_ids"])):
        digest = hashlib.sha256(ids["prompt_ids"].tobytes()).digest()[:16]
        if digest not in seen:
            first.append(row)
            seen.add(digest)
    if len(first) < len(table):
        counter["prompt seen before"] = len(table) - len(first)
        table = table.select(first)
    return table, counter


def _sft_rows(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> Rows:
    for text in (text for text, rank in zip(example["responses"], example["ranks"], strict=True) if rank == 1):
        [(ids, mask)], reasons = _fit(tokenizer, example["prompt"], [text], max_seq_len)
        if _prompt_len(mask) >= max_seq_len:
            yield {"keep": False, "reasons": ["prompt fills max_seq_len"]}
            continue
        if len(ids) > max_seq_len:
            ids, mask, reasons = ids[:max_seq_len], mask[:max_seq_len], [*reasons, "answer cut at max_seq_len"]
        yield {"input_ids": ids, "loss_mask": mask, "keep": True, "reasons": reasons}


def _preference_rows(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> Rows:
    for (rank, chosen), (worse_rank, rejected) in combinations(_best_first(example), 2):
        if rank == worse_rank:
            continue
        if chosen == rejected:
            yield {"keep": False, "reasons": ["chosen and rejected are the same"]}
            continue
        encoded, reasons = _fit(tokenizer, example["prompt"], [chosen, rejected], max_seq_len)
        (chosen_ids, mask), (rejected_ids, _) = encoded
        if max(len(chosen_ids), len(rejected_ids)) > max_seq_len:
            yield {"keep": False, "reasons": ["pair longer than max_seq_len"]}
            continue
        yield {
            "chosen_ids": chosen_ids,
            "rejected_ids": rejected_ids,
            "prompt_len": _prompt_len(mask),
            "margin": example["margin"] or 0.0,
            "source": example["source"],
            "keep": True,
            "reasons": reasons,
        }


def _prompt_rows(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_prompt_seq_len: int) -> Rows:
    prompt, reasons = example["prompt"], []
    ids = encode_prompt(tokenizer, prompt)
    while len(ids) > max_prompt_seq_len and (shorter := drop_first_turn(prompt)):
        prompt, reasons = shorter, [SHORTENED]
        ids = encode_prompt(tokenizer, prompt)
    if len(ids) > max_prompt_seq_len:
        yield {"keep": False, "reasons": ["prompt longer than max_prompt_seq_len"]}
    else:
        answers = {"responses": [text for _, text in _best_first(example)]}
        record = to_json(answers | json.loads(example["metadata"] or "{}"))
        yield {"prompt_ids": ids, "messages": prompt, "record": record, "keep": True, "reasons": reasons}


def _best_first(example: dict[str, Any]) -> list[tuple[int, str]]:
    """(rank, response), ties in the order of the record."""
    return sorted(zip(example["ranks"], example["responses"], strict=True), key=lambda answer: answer[0])


def drop_first_turn(prompt: Sequence[Message]) -> list[Message]:
    """The dialogue without its first user turn and the answers to it; the system message stays. []: only one left."""
    users = [number for number, message in enumerate(prompt) if message["role"] == "user"]
    if len(users) < 2:
        return []
    return [m for m in prompt[: users[0]] if m["role"] == "system"] + list(prompt[users[1] :])


def _fit(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], answers: list[str], max_seq_len: int
) -> tuple[list[tuple[list[int], list[bool]]], list[str]]:
    """(ids and mask of prompt + each answer, reasons) after as many turns are dropped as it takes, or can be."""
    reasons: list[str] = []
    while True:
        encoded = encode_answers(tokenizer, prompt, answers)
        shorter = drop_first_turn(prompt)
        if max(len(ids) for ids, _ in encoded) <= max_seq_len or not shorter:
            return encoded, reasons
        prompt, reasons = shorter, [SHORTENED]


def _prompt_len(mask: list[bool]) -> int:
    """The number of ids in front of the last answer, which a dialogue's mask ends with."""
    return len(mask) - mask[::-1].index(False)


def _tokenize(
    dataset: datasets.Dataset,
    rows_of: Callable[..., Rows],
    columns: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    num_workers: int,
) -> tuple[datasets.Dataset, Counter[str]]:
    """Map `rows_of` over the examples; keep and count its rows. The cache entry is named by all that shapes a row."""
    features = datasets.Features(columns | _FLAGS)
    if not len(dataset):  # nothing was held out
        empty: dict[str, list] = {name: [] for name in columns}
        return datasets.Dataset.from_dict(empty, features=datasets.Features(columns)), Counter()
    parts = [TOKENIZING_VERSION, dataset._fingerprint, rows_of.__name__, max_len, tokenizer_hash(tokenizer)]
    run = partial(
        dataset.map,
        partial(_map_batch, rows_of, list(features), tokenizer, max_len),
        batched=True,
        batch_size=200,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=num_workers if num_workers > 1 else None,
        new_fingerprint=hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32],
        desc="tokenizing",
    )
    try:
        table = run()
    except OSError:  # a cached file was cut short: build it again
        table = run(load_from_cache_file=False)
    counter = Counter(reason for reasons in table["reasons"][:] for reason in reasons)
    keep = np.asarray(table["keep"][:], dtype=bool)
    if not keep.any():
        raise UserError(
            f"no example is left after tokenizing ({_told(counter)}); raise the length limit or use other data"
        )
    if not keep.all():
        table = table.select(np.flatnonzero(keep))
    return table.select_columns(list(columns)), counter


def _map_batch(
    rows_of: Callable[..., Rows], names: list[str], tokenizer: PreTrainedTokenizerBase, max_len: int, batch: dict
) -> dict[str, list]:
    examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    rows = [row for example in examples for row in rows_of(example, tokenizer, max_len)]
    return {name: [row.get(name) for row in rows] for name in names}


def _told(counter: Counter[str]) -> str:
    return ", ".join(f"{number} x {reason}" for reason, number in counter.items()) or "no rows"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a dialogue becomes: vocabulary, merges, special ids, template."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = tokenizer.backend_tokenizer.to_str()
    else:
        backend = json.dumps([repr(tokenizer), sorted(tokenizer.get_vocab().items())])
    parts = [backend, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id]
    parts += [tokenizer.all_special_tokens, transformers.__version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
