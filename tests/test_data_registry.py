"""Each named data set on a row in its published layout; no network: the hub is played by a local stand-in."""

from dschat.data import tables
from dschat.data.records import to_example
from dschat.data.registry import REGISTRY, find
from dschat.data.sources import load_examples, load_stage_data
from dschat.errors import UserError

import datasets
import pytest

MKQA = {"queries": {"zh_cn": "谁?", "ja": "誰?"}, "answers": {"zh_cn": [{"text": "他"}], "ja": [{"text": "彼"}]}}
MIRACL = {
    "query": "q",
    "positive_passages": [{"docid": "1", "text": "good"}],
    "negative_passages": [{"docid": "2", "text": "bad"}],
}
ROWS = {
    "Anthropic/hh-rlhf": (
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        "q",
        ["good", "bad"],
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {
            "prompt": "q",
            "prompt_id": "0",
            "score_chosen": 8.0,
            "messages": [],
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
        },
        "q",
        ["good", "bad"],
    ),
    "Dahoas/rm-static": (
        {"prompt": "\n\nHuman: q\n\nAssistant:", "response": " good", "chosen": " good", "rejected": " bad"},
        "q",
        ["good", "bad"],
    ),
    "Dahoas/full-hh-rlhf": (
        {"prompt": "\n\nHuman: q\n\nAssistant:", "response": " good", "chosen": " good", "rejected": " bad"},
        "q",
        ["good", "bad"],
    ),
    "Dahoas/synthetic-instruct-gptj-pairwise": (
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        "q",
        ["good", "bad"],
    ),
    "yitingxie/rlhf-reward-datasets": (
        {"prompt": "\n\nHuman: q\n\n", "chosen": "Assistant: good Assistant: x", "rejected": "Assistant: bad"},
        "q",
        ["good Assistant: x", "bad"],
    ),
    "openai/webgpt_comparisons": (
        {
            "question": {"full_text": "q", "id": "1"},
            "answer_0": "bad [1]",
            "answer_1": "good [1][2] (really) (3)",
            "score_0": -0.5,
            "score_1": 0.5,
        },
        "q",
        ["good (really)", "bad"],
    ),
    "stanfordnlp/SHP": (
        {"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0},
        "q",
        ["good", "bad"],
    ),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": ({"prompt": "USER: q\nASSISTANT:", "label": "good"}, "q", ["good"]),
    "wangrui6/Zhihu-KOL": ({"INSTRUCTION": "q", "RESPONSE": "good", "SOURCE": "z", "METADATA": "{}"}, "q", ["good"]),
    "Hello-SimpleAI/HC3-Chinese": (
        {"question": "q", "human_answers": ["good", "x"], "chatgpt_answers": ["y"]},
        "q",
        ["good"],
    ),
    "mkqa-Chinese": (MKQA, "谁?", ["他"]),
    "mkqa-Japanese": (MKQA, "誰?", ["彼"]),
    "Cohere/miracl-zh-queries-22-12": (MIRACL, "q", ["good", "bad"]),
    "Cohere/miracl-ja-queries-22-12": (MIRACL | {"negative_passages": []}, "q", ["good"]),
    "lmqg/qg_jaquad": ({"question": "q", "sentence": "good", "paragraph": "x", "answer": "y"}, "q", ["good"]),
    "lmqg/qag_jaquad": ({"questions": ["q", "r"], "paragraph": "good", "answers": ["x", "y"]}, "q", ["good"]),
}


def test_every_entry_has_a_row_here():
    assert set(ROWS) == set(REGISTRY)


@pytest.mark.parametrize("name", ROWS)
def test_row_becomes_an_example(name):
    row, question, responses = ROWS[name]
    example = to_example(REGISTRY[name].to_record(row))
    assert example["prompt"] == [{"role": "user", "content": question}]
    assert example["responses"] == responses
    assert example["ranks"] == [1, 2][: len(responses)]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("openai/webgpt_comparisons", {"score_0": 0.5}),
        ("Hello-SimpleAI/HC3-Chinese", {"human_answers": []}),
        ("mkqa-Chinese", {"answers": {"zh_cn": []}}),
        ("mkqa-Japanese", {"answers": {"ja": [{"text": None}]}}),
        ("Cohere/miracl-zh-queries-22-12", {"positive_passages": []}),
        ("lmqg/qag_jaquad", {"questions": []}),
        ("wangrui6/Zhihu-KOL", {"RESPONSE": None}),
        ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"prompt": "ASSISTANT: x USER: q ASSISTANT:"}),
        ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"label": ""}),
        ("Anthropic/hh-rlhf", {"chosen": "\n\nHuman: q\n\nAssistant:"}),
        ("HuggingFaceH4/ultrafeedback_binarized", {"chosen": []}),
        ("Dahoas/rm-static", {"chosen": " "}),
    ],
)
def test_row_with_nothing_to_train_on_is_dropped(name, change):
    assert REGISTRY[name].to_record(ROWS[name][0] | change) is None


def test_sharegpt_turns_and_system_text():
    row = {"prompt": "Be kind. USER: a ASSISTANT: b USER: c ASSISTANT:", "label": "d"}
    prompt = to_example(REGISTRY["pvduy/sharegpt_alpaca_oa_vicuna_format"].to_record(row))["prompt"]
    assert [(m["role"], m["content"]) for m in prompt] == [
        ("system", "Be kind."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]


def test_local_copy_of_a_named_set_is_found_by_its_tail():
    assert find("/data/stanfordnlp/SHP/") is REGISTRY["stanfordnlp/SHP"]
    assert find("/data/notstanfordnlp/SHP") is None


def test_local_jsonfile_names_its_replacement():
    with pytest.raises(UserError, match="pass the path of the file"):
        find("local/jsonfile")


@pytest.fixture
def hub(monkeypatch):
    """A hub with SHP (train and validation), a set without an eval split, and nothing else."""
    shp = [ROWS["stanfordnlp/SHP"][0] | {"history": f"q{n}"} for n in range(6)]
    webgpt = [ROWS["openai/webgpt_comparisons"][0] | {"score_0": n / 10} for n in range(10)]
    calls = []

    def load_dataset(name, config):
        calls.append((name, config))
        if name == "stanfordnlp/SHP":
            return datasets.DatasetDict(
                train=datasets.Dataset.from_list(shp), validation=datasets.Dataset.from_list(shp[:2])
            )
        if name == "openai/webgpt_comparisons":
            return datasets.DatasetDict(train=datasets.Dataset.from_list(webgpt))
        raise ConnectionError(f"cannot reach\nthe hub for {name}")

    monkeypatch.setattr(tables.datasets, "load_dataset", load_dataset)
    return calls


def test_hub_set_through_its_row_function_and_eval_split(hub, tmp_path):
    options = {"cache_dir": str(tmp_path), "seed": 0}
    train, _ = load_examples(["stanfordnlp/SHP"], "train", "preference", **options)
    evaluation, _ = load_examples(["stanfordnlp/SHP"], "eval", "preference", **options)
    assert (len(train), len(evaluation)) == (6, 2)
    assert train[0]["responses"] == ["good", "bad"]
    assert hub[0] == ("stanfordnlp/SHP", None)
    ties, counter = load_examples(["openai/webgpt_comparisons"], "train", "preference", **options)
    assert len(ties) == 9 and counter == {"nothing to train on in the row": 1}


def test_hub_set_without_eval_split_holds_rows_out(hub, tmp_path):
    train, evaluation, _ = load_stage_data(
        ["openai/webgpt_comparisons"], [], "preference", "0,1,0", 0.3, 0, str(tmp_path)
    )
    assert (len(train), len(evaluation)) == (6, 3)


def test_unknown_name_is_one_line(hub, tmp_path):
    with pytest.raises(UserError, match=r"nobody/nothing: neither a file nor .*cannot reach the hub") as caught:
        load_examples(["nobody/nothing"], "train", "sft", cache_dir=str(tmp_path), seed=0)
    assert "\n" not in str(caught.value)
