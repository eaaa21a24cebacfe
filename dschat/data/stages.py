"""Examples -> token ids of one stage, by parallel `map`, cached by content, with a count of all that is left out.

Each mapped row carries its `reasons` and whether to keep it, so that the counts come with the cached table, from any
number of workers. What does not fit loses its earliest whole turns first; no prompt is ever cut inside a turn.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, pairwise
from typing import Any

from dschat.data.records import Message, to_json
from dschat.data.tables import count_values
from dschat.data.templates import encode_answers, encode_prompt
from dschat.errors import UserError

import datasets
import numpy as np
import pyarrow.compute
import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TOKENIZING_VERSION = "3"  # change it with anything here or in templates that changes a row
SHORTENED = "dialogue shortened by whole turns"
NO_ROOM, TOO_LONG = "prompt fills max_seq_len", "answer longer than max_seq_len"
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


def tokenize_rankings(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, num_workers: int = 1
) -> tuple[datasets.Dataset, Counter[str]]:
    """A row for each prompt with answers of different rank: input_ids, K sequences (T,), and their ranks (K,).

    The best come first, 1 is best, equal ranks are ties; each sequence is the prompt, of prompt_len ids, and an answer
    that ends in EOS. margin (0.0: none), source and messages are those of the prompt.
    """
    columns = {"input_ids": datasets.List(_IDS), "ranks": datasets.List(datasets.Value("int32"))}
    columns |= {"prompt_len": datasets.Value("int32"), "margin": datasets.Value("float64")}
    columns |= {"source": datasets.Value("string"), "messages": _MESSAGES}
    return _tokenize(dataset, _ranking_rows, columns, tokenizer, max_seq_len, num_workers)


def tokenize_preferences(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, num_workers: int = 1
) -> tuple[datasets.Dataset, Counter[str]]:
    """chosen_ids, rejected_ids (T,), prompt_len (ids they share as the prompt), margin (0.0: none), source.

    Every two answers of different rank are a row; both sequences end in EOS.
    """
    columns = {"chosen_ids": _IDS, "rejected_ids": _IDS, "prompt_len": datasets.Value("int32")}
    columns |= {"margin": datasets.Value("float64"), "source": datasets.Value("string")}
    return _tokenize(dataset, _preference_rows, columns, tokenizer, max_seq_len, num_workers)


def tokenize_feedback(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, num_workers: int = 1
) -> tuple[datasets.Dataset, Counter[str]]:
    """input_ids (T,), prompt_len, good: single answers, each good (of the best rank) or bad (of the worst).

    Of a ranking of several, what stands between is left out. All sequences end in EOS.
    """
    columns = {"input_ids": _IDS, "prompt_len": datasets.Value("int32"), "good": datasets.Value("bool")}
    return _tokenize(dataset, _feedback_rows, columns, tokenizer, max_seq_len, num_workers)


def tokenize_prompts(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_prompt_seq_len: int, num_workers: int = 1
) -> tuple[datasets.Dataset, Counter[str]]:
    """prompt_ids (P,), messages, record: different prompts, with the generation prompt at the end.

    `record` is JSON text for rewards and loss masks: {"responses": [texts, best first], **metadata of the record}. Of
    records with the same prompt the first counts.
    """
    columns = {"prompt_ids": _IDS, "messages": _MESSAGES, "record": datasets.Value("string")}
    table, counter = _tokenize(dataset, _prompt_rows, columns, tokenizer, max_prompt_seq_len, num_workers)
    digests = np.fromiter(_digests(table.select_columns("prompt_ids")), "S16", len(table))
    first = np.sort(np.unique(digests, return_index=True)[1])
    if len(first) < len(table):
        counter["prompt seen before"] = len(table) - len(first)
        table = table.select(first)
    return table, counter


def _digests(table: datasets.Dataset) -> Iterator[bytes]:
    """16 bytes for each row of the only column, of token ids: equal ones for equal ids."""
    for batch in table.with_format("arrow").iter(1000):
        column = batch.column(0).combine_chunks()
        ids, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        yield from (hashlib.sha256(ids[start:end].tobytes()).digest()[:16] for start, end in pairwise(offsets))


def _sft_rows(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> Rows:
    for text in (text for text, rank in zip(example["responses"], example["ranks"], strict=True) if rank == 1):
        [(ids, mask)], _, reasons = _fit(tokenizer, example["prompt"], [text], max_seq_len)
        if _prompt_len(mask) >= max_seq_len:
            yield {"keep": False, "reasons": [NO_ROOM]}
            continue
        if len(ids) > max_seq_len:
            ids, mask, reasons = ids[:max_seq_len], mask[:max_seq_len], [*reasons, "answer cut at max_seq_len"]
        yield {"input_ids": ids, "loss_mask": mask, "keep": True, "reasons": reasons}


def _ranking_rows(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> Rows:
    answers, reasons = _usable(_best_first(example))
    while len({rank for rank, _ in answers}) > 1:
        texts = [text for _, text in answers]
        fitted, prompt, shortened = _fit(tokenizer, example["prompt"], texts, max_seq_len)
        if _prompt_len(fitted[0][1]) >= max_seq_len:
            reasons.append(NO_ROOM)
            break
        fits = [len(ids) <= max_seq_len for ids, _ in fitted]
        if all(fits):
            yield {
                "input_ids": [ids for ids, _ in fitted],
                "ranks": [rank for rank, _ in answers],
                "prompt_len": _prompt_len(fitted[0][1]),
                "messages": prompt,
                "margin": example["margin"] or 0.0,
                "source": example["source"],
                "keep": True,
                "reasons": reasons + shortened,
            }
            return
        reasons += [TOO_LONG] * fits.count(False)
        answers = [answer for answer, fit in zip(answers, fits, strict=True) if fit]
    yield {"keep": False, "reasons": reasons}


def _preference_rows(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> Rows:
    for ranking in _ranking_rows(example, tokenizer, max_seq_len):
        if not ranking["keep"]:
            yield ranking
            return
        reasons = ranking["reasons"]
        answers = zip(ranking["ranks"], ranking["input_ids"], strict=True)
        for (rank, chosen_ids), (worse_rank, rejected_ids) in combinations(answers, 2):
            if rank < worse_rank:
                yield ranking | {"chosen_ids": chosen_ids, "rejected_ids": rejected_ids, "reasons": reasons}
                reasons = []  # told once for each ranking


def _feedback_rows(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> Rows:
    answers, reasons = _usable(_best_first(example))
    ranks = [rank for rank, _ in answers]
    if reasons:
        yield {"keep": False, "reasons": reasons}
    for rank, text in answers:
        if 1 < rank < max(ranks):
            yield {"keep": False, "reasons": ["neither the best nor the worst of a ranking"]}
            continue
        [(ids, mask)], _, reasons = _fit(tokenizer, example["prompt"], [text], max_seq_len)
        prompt_len = _prompt_len(mask)
        if len(ids) > max_seq_len:
            yield {"keep": False, "reasons": [NO_ROOM if prompt_len >= max_seq_len else TOO_LONG]}
            continue
        yield {"input_ids": ids, "prompt_len": prompt_len, "good": rank == 1, "keep": True, "reasons": reasons}


def _usable(answers: list[tuple[int, str]]) -> tuple[list[tuple[int, str]], list[str]]:
    """The answers that are not empty, each text once at its best rank; and why the others are left out."""
    kept: dict[str, int] = {}
    reasons = []
    for rank, text in answers:
        if not text:
            reasons.append("empty answer")
        elif text in kept:
            reasons.append("the same answer twice")
        else:
            kept[text] = rank
    return [(rank, text) for text, rank in kept.items()], reasons


def _prompt_rows(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_prompt_seq_len: int) -> Rows:
    prompt, reasons = example["prompt"], []
    ids = encode_prompt(tokenizer, prompt)
    while len(ids) > max_prompt_seq_len and (shorter := drop_first_turn(prompt)):
        prompt, reasons = shorter, [SHORTENED]
        ids = encode_prompt(tokenizer, prompt)
    if len(ids) > max_prompt_seq_len:
        yield {"keep": False, "reasons": ["prompt longer than max_prompt_seq_len"]}
    else:
        texts = [text for _, text in _best_first(example)] if 1 in example["ranks"] else []  # not a lone bad one
        record = to_json({"responses": texts} | json.loads(example["metadata"] or "{}"))
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
) -> tuple[list[tuple[list[int], list[bool]]], list[Message], list[str]]:
    """(ids and mask of prompt + each answer, the prompt, reasons) after as many turns are dropped as it takes, or can
    be."""
    reasons: list[str] = []
    while True:
        encoded = encode_answers(tokenizer, prompt, answers)
        shorter = drop_first_turn(prompt)
        if max(len(ids) for ids, _ in encoded) <= max_seq_len or not shorter:
            return encoded, prompt, reasons
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
    counter = count_values(pyarrow.compute.list_flatten(table.data.column("reasons")))
    keep = table.data.column("keep").to_numpy()
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
