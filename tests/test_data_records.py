"""Every record shape against a typed-in example, and what is refused with which words."""

import json

from dschat.data.records import RecordError, parse_transcript, to_example

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who are you?\n\nAssistant:"
HH_MESSAGES = [user("Hi"), assistant("Hello."), user("Who are you?")]
Q = [user("Who are you?")]
GPT = [
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello."},
    {"from": "human", "value": "Who are you?"},
]

GOLDEN = {
    "pair, plain prompt": (
        {"prompt": " Who are you?\n", "chosen": " A bot. ", "rejected": "No."},
        Q,
        ["A bot.", "No."],
        [1, 2],
    ),
    "pair, HH prompt": (
        {"prompt": HH, "chosen": " A bot.", "rejected": " No."},
        HH_MESSAGES,
        ["A bot.", "No."],
        [1, 2],
    ),
    "pair, message prompt": (
        {"prompt": HH_MESSAGES, "chosen": "A bot.", "rejected": ""},
        HH_MESSAGES,
        ["A bot.", ""],
        [1, 2],
    ),
    "pair, answers as message lists": (
        {"prompt": HH_MESSAGES, "chosen": [assistant("A bot.")], "rejected": [assistant("No.")]},
        HH_MESSAGES,
        ["A bot.", "No."],
        [1, 2],
    ),
    "pair, whole message lists repeat the prompt": (
        {"prompt": "Who are you?", "chosen": [*Q, assistant("A bot.")], "rejected": [*Q, assistant("No.")]},
        Q,
        ["A bot.", "No."],
        [1, 2],
    ),
    "pair, whole message lists alone": (
        {
            "chosen": [system("Be brief."), *Q, assistant("A bot.")],
            "rejected": [system("Be brief."), *Q, assistant("No.")],
        },
        [system("Be brief."), *Q],
        ["A bot.", "No."],
        [1, 2],
    ),
    "pair, transcripts repeat the prompt": (
        {"prompt": HH, "chosen": HH + " A bot.", "rejected": HH + " No."},
        HH_MESSAGES,
        ["A bot.", "No."],
        [1, 2],
    ),
    "transcripts alone": ({"chosen": HH + " A bot.", "rejected": HH}, HH_MESSAGES, ["A bot.", ""], [1, 2]),
    "transcripts with a system text": (
        {"chosen": "Be brief.\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "Be brief.\n\nHuman: Hi\n\nAssistant: No"},
        [system("Be brief."), user("Hi")],
        ["Yo", "No"],
        [1, 2],
    ),
    "transcript with two assistant turns in a row": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a\n\nAssistant: b", "rejected": "\n\nHuman: Hi\n\nAssistant: c"},
        [user("Hi")],
        ["a\n\nb", "c"],
        [1, 2],
    ),
    "rm-static keeps response beside chosen": (
        {"prompt": HH, "response": " A bot.", "chosen": " A bot.", "rejected": " No."},
        HH_MESSAGES,
        ["A bot.", "No."],
        [1, 2],
    ),
    "DeepSpeed-Chat one-line prompt": (
        {"prompt": " Human: Who are you? Assistant:", "chosen": "A bot."},
        Q,
        ["A bot."],
        [1],
    ),
    "DeepSpeed-Chat one-line dialogue": (
        {"prompt": " Human: Hi Assistant: Hello. Human: Who are you?\n Assistant: ", "chosen": "A bot."},
        HH_MESSAGES,
        ["A bot."],
        [1],
    ),
    "DeepSpeed-Chat one-line prompt alone": ({"prompt": " Human: Who are you? Assistant:"}, Q, [], []),
    "prompt/response": ({"prompt": "Who are you?", "response": "A bot."}, Q, ["A bot."], [1]),
    "prompt/response/label, a good one": ({"prompt": "Who are you?", "response": "A.", "label": True}, Q, ["A."], [1]),
    "prompt/response/label, a bad one": (
        {"prompt": "Who are you?", "response": "No.", "label": False},
        Q,
        ["No."],
        [2],
    ),
    "prompt/completion/label out of a .csv": (
        {"prompt": "Who are you?", "completion": "No.", "label": "False"},
        Q,
        ["No."],
        [2],
    ),
    "messages/label": ({"messages": [*Q, assistant("No.")], "label": False}, Q, ["No."], [2]),
    "a label that is neither true nor false": (
        {"prompt": "Who are you?", "response": "A.", "label": 0},
        Q,
        ["A."],
        [1],
    ),
    "a label beside a pair": (
        {"prompt": "Who are you?", "chosen": "A bot.", "rejected": "No.", "label": False},
        Q,
        ["A bot.", "No."],
        [1, 2],
    ),
    "prompt/completion as messages": ({"prompt": Q, "completion": [assistant("A bot.")]}, Q, ["A bot."], [1]),
    "question/answer": ({"question": "Who are you?", "answer": "A bot."}, Q, ["A bot."], [1]),
    "prompt/responses": ({"prompt": "Who are you?", "responses": ["A bot.", "Me."]}, Q, ["A bot.", "Me."], [1, 1]),
    "K ranked": (
        {"prompt": "Who are you?", "responses": ["x", "A bot.", "y"], "ranks": [2, 1, 2]},
        Q,
        ["x", "A bot.", "y"],
        [2, 1, 2],
    ),
    "K scored": (
        {"prompt": "Who are you?", "responses": ["a", "b", "c", "d"], "scores": [0.5, 2, -1, 2.0]},
        Q,
        ["a", "b", "c", "d"],
        [2, 1, 3, 1],
    ),
    "OpenAI messages": (
        {"messages": [system("Be kind."), *Q, assistant("A bot.")]},
        [system("Be kind."), *Q],
        ["A bot."],
        [1],
    ),
    "OpenAI messages, prompt only": ({"messages": Q}, Q, [], []),
    "messages with the pair": (
        {"messages": HH_MESSAGES, "chosen": "A bot.", "rejected": "No."},
        HH_MESSAGES,
        ["A bot.", "No."],
        [1, 2],
    ),
    "UltraFeedback layout": (
        {
            "prompt": "Who are you?",
            "messages": [*Q, assistant("A bot.")],
            "chosen": [*Q, assistant("A bot.")],
            "rejected": [*Q, assistant("No.")],
        },
        Q,
        ["A bot.", "No."],
        [1, 2],
    ),
    "Alpaca": ({"instruction": "Add.", "input": "1+1", "output": "2"}, [user("Add.\n1+1")], ["2"], [1]),
    "Alpaca, empty input, history, system": (
        {
            "instruction": "Who are you?",
            "input": "",
            "output": "A bot.",
            "history": [["Hi", "Hello."]],
            "system": "Be kind.",
        },
        [system("Be kind."), *HH_MESSAGES],
        ["A bot."],
        [1],
    ),
    "ShareGPT": ({"conversations": [*GPT, {"from": "gpt", "value": "A bot."}]}, HH_MESSAGES, ["A bot."], [1]),
    "ShareGPT pair as dicts": (
        {
            "conversations": GPT,
            "chosen": {"from": "gpt", "value": "A bot."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        HH_MESSAGES,
        ["A bot.", "No."],
        [1, 2],
    ),
    "ShareGPT pair as text": (
        {"conversations": GPT, "chosen": "A bot.", "rejected": "No."},
        HH_MESSAGES,
        ["A bot.", "No."],
        [1, 2],
    ),
    "prompt only": ({"prompt": HH}, HH_MESSAGES, [], []),
    "null columns are absent": (
        {"prompt": "Who are you?", "chosen": None, "response": "A bot.", "margin": None},
        Q,
        ["A bot."],
        [1],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    record, prompt, responses, ranks = GOLDEN[name]
    expected = {"prompt": prompt, "responses": responses, "ranks": ranks, "margin": None, "metadata": ""}
    assert to_example(record) == expected
    kept = to_example(record | {"metadata": {"b": [1, None], "a": "é"}})
    assert kept == expected | {"metadata": '{"a":"é","b":[1,null]}'}


def test_margin_is_a_number_or_not_given():
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert to_example(pair | {"margin": "0.5"})["margin"] == 0.5
    assert to_example(pair | {"margin": ""})["margin"] is None
    with pytest.raises(RecordError, match='"margin" must be a number'):
        to_example(pair | {"margin": float("nan")})


METADATA = {
    "none": (None, ""),
    "no keys": ({}, ""),
    "every JSON type, keys sorted inside too": (
        {"z": {"d": 1, "c": [True, None, 1.5, "x"]}, "a": ""},
        '{"a":"","z":{"c":[true,null,1.5,"x"],"d":1}}',
    ),
    "a cell of a .csv": (' {"b": 1,\n"a": 2} ', '{"a":2,"b":1}'),
    "an empty cell": ("", ""),
    "an empty object in a cell": ("{}", ""),
    "a pattern": ({"masked_pattern": r"(?s)<think>.*?</think>"}, r'{"masked_pattern":"(?s)<think>.*?</think>"}'),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_is_compact_json_with_sorted_keys(name):
    value, expected = METADATA[name]
    assert to_example({"prompt": "a", "metadata": value})["metadata"] == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(value=st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_metadata_comes_back_as_it_was(value):
    text = to_example({"prompt": "a", "metadata": value})["metadata"]
    assert json.loads(text or "{}") == value
    shuffled = dict(reversed(value.items()))
    assert to_example({"prompt": "a", "metadata": json.dumps(shuffled)})["metadata"] == text


REFUSED = {
    "unknown keys": (
        {"text": "a", "label": 1},
        r"no known keys: found text, label; expected prompt\+chosen\+rejected",
    ),
    "no keys": ({}, "no known keys: found none"),
    "answers without a prompt": ({"chosen": "a", "rejected": "b"}, "no prompt: found chosen, rejected; expected"),
    "response without a prompt": ({"response": "a"}, "no prompt"),
    "empty chosen": ({"prompt": "a", "chosen": " \n", "rejected": "b"}, "the answer is empty"),
    "empty response": ({"prompt": "a", "response": ""}, "the answer is empty"),
    "empty chosen transcript": ({"chosen": HH, "rejected": HH + " b"}, "the answer is empty"),
    "empty last message": ({"messages": [*Q, assistant("")]}, "the answer is empty"),
    "empty turn": ({"messages": [user("a"), assistant(" "), user("b")]}, 'message 2 of "messages" is empty'),
    "empty prompt": ({"prompt": "", "response": "b"}, "turn 1 of the prompt .user. is empty"),
    "rejected alone": ({"prompt": "a", "rejected": "b"}, '"rejected" without "chosen"'),
    "different prompts": (
        {"chosen": HH + " a", "rejected": HH.replace("Hi", "Ho") + " b"},
        "prompts of this record differ",
    ),
    "prompt differs from the dialogue": (
        {"prompt": "x", "chosen": [*Q, assistant("a")], "rejected": "b"},
        "prompts of this record differ",
    ),
    "two answers": ({"prompt": "a", "response": "b", "output": "c"}, "several answers: response, output"),
    "two last answers": ({"messages": [*Q, assistant("a")], "response": "b"}, "ends with an answer of its own"),
    "number as answer": ({"prompt": "a", "response": 4}, '"response" must be text or a list of messages, found int'),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'; known roles"),
    "messages as text": ({"messages": "x"}, '"messages" must be a list of messages, found str'),
    "not a message": ({"messages": ["x"]}, 'message 1 of "messages" must be an object'),
    "late system": ({"messages": [*Q, system("x"), assistant("a")]}, "system message may only come first"),
    "starts with the assistant": ({"messages": [assistant("a"), *Q]}, "begin and end with a user turn"),
    "prompt ends with the assistant": ({"prompt": HH + " Sure", "chosen": "b", "rejected": "c"}, "answer of its own"),
    "ranks of another length": ({"prompt": "a", "responses": ["b"], "ranks": [1, 2]}, "list of 1 numbers"),
    "ranks from 0": ({"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1]}, "1 for the best"),
    "ranks of text": ({"prompt": "a", "responses": ["b"], "ranks": ["1"]}, "numbers only"),
    "score not a number": ({"prompt": "a", "responses": ["b"], "scores": [float("nan")]}, "numbers only"),
    "no responses": ({"prompt": "a", "responses": []}, "must be a list of answers"),
    "best ranked is empty": ({"prompt": "a", "responses": ["", "b"], "ranks": [1, 2]}, "the answer is empty"),
    "history not pairs": ({"instruction": "a", "output": "b", "history": [["x"]]}, "question, answer"),
    "two systems": ({"messages": [system("a"), *Q], "system": "b"}, "two system messages"),
    "lone surrogate": ({"prompt": "a\ud800", "response": "b"}, "not UTF-8"),
    "metadata as a list": (
        {"prompt": "a", "metadata": [1]},
        '"metadata" must be an object with keys, found list; mend',
    ),
    "metadata as an empty list": ({"prompt": "a", "metadata": []}, "an object with keys, found list"),
    "metadata as a number": ({"prompt": "a", "metadata": 0}, "an object with keys, found int"),
    "metadata as text": ({"prompt": "a", "metadata": "fast"}, "an object that JSON can hold .Expecting value"),
    "metadata as JSON text of a list": ({"prompt": "a", "metadata": "[1]"}, "an object with keys, found list"),
    "NaN in metadata": ({"prompt": "a", "metadata": {"x": [float("nan")]}}, "JSON can hold .*mend it or remove the"),
    "NaN in metadata as text": ({"prompt": "a", "metadata": '{"x": NaN}'}, "that JSON can hold"),
    "infinity in metadata": ({"prompt": "a", "metadata": {"x": float("-inf")}}, "that JSON can hold"),
    "bytes in metadata": ({"prompt": "a", "metadata": {"x": b"a"}}, "JSON can hold .*bytes is not JSON serializable"),
    "metadata nested without end": ({"prompt": "a", "metadata": "[" * 100_000}, "that JSON can hold .*recursion"),
    "lone surrogate in metadata": ({"prompt": "a", "metadata": {"x": "\ud800"}}, '"metadata" holds bytes .*not UTF-8'),
    "responses in metadata": (
        {"prompt": "a", "metadata": {"responses": []}},
        '"metadata" must not hold "responses".*rename that key',
    ),
    "open group in a pattern": (
        {"prompt": "a", "metadata": {"masked_pattern": "<think>(\n"}},
        r'"masked_pattern" of "metadata" is not a regular expression \(missing \).*mend it',
    ),
    "pattern of too many repetitions": (
        {"prompt": "a", "metadata": {"masked_pattern": "a{99999999999999999999}"}},
        "not a regular expression .the repetition number is too large",
    ),
    "pattern nested without end": (
        {"prompt": "a", "metadata": {"masked_pattern": "(" * 5000}},
        "not a regular expression .*recursion",
    ),
    "pattern as a list": ({"prompt": "a", "metadata": {"masked_pattern": ["a"]}}, "must be text, found list"),
    "pattern of none": ({"prompt": "a", "metadata": {"masked_pattern": None}}, "must be text, found NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_that_says_why(name):
    record, message = REFUSED[name]
    with pytest.raises(RecordError, match=message) as caught:
        to_example(record)
    assert "\n" not in str(caught.value)


word = st.text("abc :.\n", min_size=1, max_size=12).map(str.strip).filter(lambda text: text and "\n\n" not in text)


@settings(max_examples=60, deadline=None)
@given(first=st.one_of(st.none(), word), turns=st.lists(word, min_size=1, max_size=6))
def test_messages_survive_a_transcript(first, turns):
    messages = [system(first)] if first else []
    messages += [(user, assistant)[n % 2](text) for n, text in enumerate(turns)]
    names = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    transcript = "".join(names[m["role"]] + m["content"] for m in messages)
    assert parse_transcript(transcript) == messages
    if len(turns) % 2:
        assert to_example({"prompt": transcript + "\n\nAssistant:"})["prompt"] == messages
    else:
        example = to_example({"chosen": transcript, "rejected": transcript + "!"})
        assert (example["prompt"], example["responses"]) == (messages[:-1], [turns[-1], turns[-1] + "!"])
