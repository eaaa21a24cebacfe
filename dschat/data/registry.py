"""Data sets with a name: where they are on the hub and how one of their rows becomes a record. One row per data set.

A row function returns None for a row that has nothing to train on; the reader counts it. Sets whose columns
`records.to_example` knows need no entry here.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from dschat.errors import UserError

Record = dict[str, Any]
ToRecord = Callable[[Record], Record | None]


class HubDataset(NamedTuple):
    """`eval_split` None: the set has none, and `--eval_fraction` of the training rows is held out."""

    hub_name: str
    config_name: str | None
    train_split: str
    eval_split: str | None
    to_record: ToRecord


def find(path: str) -> HubDataset | None:
    """The entry of a name, or of a local copy whose path ends in it (/data/Dahoas/rm-static)."""
    if path == "local/jsonfile":
        raise UserError("--data_path local/jsonfile is gone; pass the path of the file, such as data/train.json")
    clean = path.rstrip("/")
    return next((entry for name, entry in REGISTRY.items() if clean == name or clean.endswith("/" + name)), None)


def _first(values: Any) -> Any:
    return values[0] if values else None


def _answered(prompt: str | None, response: str | None) -> Record | None:
    """A demonstration, or None when either side is missing or blank."""
    if not (prompt or "").strip() or not (response or "").strip():
        return None
    return {"prompt": prompt, "response": response}


def _preferred(prompt: str | None, chosen: str | None, rejected: str | None) -> Record | None:
    """A preference; a demonstration when nothing was rejected; None without prompt or chosen text."""
    record = _answered(prompt, chosen)
    if record is None or rejected is None:
        return record
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _pair_columns(row: Record) -> Record | None:
    return _preferred(row["prompt"], row["chosen"], row["rejected"])


def _hh_rlhf(row: Record) -> Record | None:
    if row["chosen"].rstrip().endswith("\n\nAssistant:"):
        return None
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


def _yitingxie(row: Record) -> Record | None:
    """The prompt is "\\n\\nHuman: …\\n\\n" without its end; each answer begins with "Assistant:"."""
    prompt = row["prompt"].rstrip().removesuffix("Assistant:").rstrip() + "\n\nAssistant:"
    chosen, rejected = (row[key].strip().removeprefix("Assistant:") for key in ("chosen", "rejected"))
    return _preferred(prompt, chosen, rejected)


def _webgpt(row: Record) -> Record | None:
    """Ties are dropped; citations such as [1] or (2, 3) are removed: the model has no browser to cite."""
    scores = float(row["score_0"]), float(row["score_1"])
    if scores[0] == scores[1]:
        return None
    answers = [re.sub(r" ?\[[^\]]*\]| ?\(\d[\d, ]*\)", "", row[key]) for key in ("answer_0", "answer_1")]
    chosen, rejected = answers if scores[0] > scores[1] else answers[::-1]
    return _preferred(row["question"]["full_text"], chosen, rejected)


def _shp(row: Record) -> Record | None:
    answers = [row["human_ref_A"], row["human_ref_B"]]
    chosen, rejected = answers if int(row["labels"]) == 1 else answers[::-1]
    return _preferred(row["history"], chosen, rejected)


def _vicuna(row: Record) -> Record | None:
    """ "USER: … ASSISTANT:" turns in `prompt`, the answer in `label`."""
    pieces = re.split(r"(?:\A|\s)(USER|ASSISTANT):", row["prompt"] or "")
    turns = [(role.lower(), text.strip()) for role, text in zip(pieces[1::2], pieces[2::2], strict=True)]
    if turns and turns[-1] == ("assistant", ""):
        turns.pop()
    if not turns:
        return _answered(row["prompt"], row["label"])
    if not (row["label"] or "").strip() or turns[0][0] != "user" or not all(text for _, text in turns):
        return None
    messages = [{"role": role, "content": text} for role, text in [*turns, ("assistant", row["label"])]]
    return {"messages": messages, "system": pieces[0]}


def _zhihu(row: Record) -> Record | None:
    return _answered(row["INSTRUCTION"], row["RESPONSE"])


def _hc3(row: Record) -> Record | None:
    return _answered(row["question"], _first(row["human_answers"]))


def _mkqa(language: str) -> ToRecord:
    def to_record(row: Record) -> Record | None:
        answer = _first(row["answers"][language])
        return _answered(row["queries"][language], answer and answer["text"])

    return to_record


def _miracl(row: Record) -> Record | None:
    positive, negative = (_first(row[key]) for key in ("positive_passages", "negative_passages"))
    return _preferred(row["query"], positive and positive["text"], negative and negative["text"])


def _qg_jaquad(row: Record) -> Record | None:
    return _answered(row["question"], row["sentence"])


def _qag_jaquad(row: Record) -> Record | None:
    return _answered(_first(row["questions"]), row["paragraph"])


def _ultrafeedback(row: Record) -> Record | None:
    """`chosen` and `rejected` are whole dialogues of one round."""
    answers = [(_first(row[key][-1:]) or {}).get("content") for key in ("chosen", "rejected")]
    return _preferred(row["prompt"], *answers)


REGISTRY: dict[str, HubDataset] = {
    "Anthropic/hh-rlhf": HubDataset("Anthropic/hh-rlhf", None, "train", "test", _hh_rlhf),
    "HuggingFaceH4/ultrafeedback_binarized": HubDataset(
        "HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", "test_prefs", _ultrafeedback
    ),
    "Dahoas/rm-static": HubDataset("Dahoas/rm-static", None, "train", "test", _pair_columns),
    "Dahoas/full-hh-rlhf": HubDataset("Dahoas/full-hh-rlhf", None, "train", "test", _pair_columns),
    "Dahoas/synthetic-instruct-gptj-pairwise": HubDataset(
        "Dahoas/synthetic-instruct-gptj-pairwise", None, "train", None, _pair_columns
    ),
    "yitingxie/rlhf-reward-datasets": HubDataset("yitingxie/rlhf-reward-datasets", None, "train", "test", _yitingxie),
    "openai/webgpt_comparisons": HubDataset("openai/webgpt_comparisons", None, "train", None, _webgpt),
    "stanfordnlp/SHP": HubDataset("stanfordnlp/SHP", None, "train", "validation", _shp),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": HubDataset(
        "pvduy/sharegpt_alpaca_oa_vicuna_format", None, "train", "test", _vicuna
    ),
    "wangrui6/Zhihu-KOL": HubDataset("wangrui6/Zhihu-KOL", None, "train", None, _zhihu),
    "Hello-SimpleAI/HC3-Chinese": HubDataset("Hello-SimpleAI/HC3-Chinese", "all", "train", None, _hc3),
    "mkqa-Chinese": HubDataset("apple/mkqa", "mkqa", "train", None, _mkqa("zh_cn")),
    "mkqa-Japanese": HubDataset("apple/mkqa", "mkqa", "train", None, _mkqa("ja")),
    "Cohere/miracl-zh-queries-22-12": HubDataset("Cohere/miracl-zh-queries-22-12", None, "train", "dev", _miracl),
    "Cohere/miracl-ja-queries-22-12": HubDataset("Cohere/miracl-ja-queries-22-12", None, "train", "dev", _miracl),
    "lmqg/qg_jaquad": HubDataset("lmqg/qg_jaquad", None, "train", "validation", _qg_jaquad),
    "lmqg/qag_jaquad": HubDataset("lmqg/qag_jaquad", None, "train", "validation", _qag_jaquad),
}
