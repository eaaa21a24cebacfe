"""The renderer and the tokenizer's promises, on a real BPE tokenizer with the plain and a ChatML-like template."""

from dschat.data import templates
from dschat.data.templates import encode_answers, encode_dialogue, encode_prompt, ensure_template, neutralize
from dschat.data.tokenizer import load_tokenizer, train_tokenizer
from dschat.errors import UserError

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

CORPUS = ["Human: hello there, who are you?", "Assistant: I am a bot. Hello! <|im_start|>user system"] * 3
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "A bot."},
]


def chatml_tokenizer(template=CHATML):
    tokenizer = train_tokenizer(CORPUS, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = template
    return tokenizer


PLAIN = train_tokenizer(CORPUS, 300)
CHAT = chatml_tokenizer()
both = pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chatml"])


def learned(tokenizer, messages):
    """The text of every run of learned tokens."""
    ids, mask = encode_dialogue(tokenizer, messages)
    runs, current = [], []
    for token, flag in [*zip(ids, mask, strict=True), (0, False)]:
        if flag:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def test_plain_text_and_mask():
    ids, mask = encode_dialogue(PLAIN, DIALOGUE)
    assert PLAIN.decode(ids) == (
        "Be kind.\n\nHuman: Hi\n\nAssistant: Hello!<|endoftext|>\n\nHuman: Who?\n\nAssistant: A bot.<|endoftext|>"
    )
    assert learned(PLAIN, DIALOGUE) == [" Hello!<|endoftext|>", " A bot.<|endoftext|>"]
    assert PLAIN.decode(encode_prompt(PLAIN, DIALOGUE[:2])) == "Be kind.\n\nHuman: Hi\n\nAssistant:"


def test_chatml_text_and_mask():
    ids, mask = encode_dialogue(CHAT, DIALOGUE)
    assert CHAT.decode(ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nA bot.<|im_end|>"
    ), "the line break after the last EOS is left out"
    assert learned(CHAT, DIALOGUE) == ["Hello!<|im_end|>", "A bot.<|im_end|>"]
    assert ids[-1] == CHAT.eos_token_id and mask[-1]


def test_answer_whose_template_has_no_eos_gets_one():
    tokenizer = chatml_tokenizer(CHATML.replace("'<|im_end|>'", "''"))
    assert learned(tokenizer, DIALOGUE) == ["Hello!\n<|im_end|>", "A bot.\n<|im_end|>"]


def test_empty_answer_is_the_eos_alone():
    dialogue = [DIALOGUE[1], {"role": "assistant", "content": ""}]
    assert learned(PLAIN, dialogue) == ["<|endoftext|>"]


hostile = st.lists(
    st.sampled_from(
        ["<|endoftext|>", "<|im_end|>", "<|im_start|>assistant\n", "<|pad|>", "\n\nHuman:", "\n\nAssistant:", "\n\n"]
        + ["<", "|", "im_end|>", "\n", " ", "a", "hello", "é", "🙂", "Human:", "<|im_end|"]
    ),
    min_size=1,
    max_size=6,
).map("".join)


@both
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(hostile, min_size=1, max_size=7), system=st.booleans())
def test_generation_starts_from_the_training_ids(tokenizer, texts, system):
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    messages = [{"role": "system", "content": "Be kind."}] * system + messages
    if messages[-1]["role"] == "assistant":
        messages.pop()
    answer = {"role": "assistant", "content": texts[0]}
    prompt = encode_prompt(tokenizer, messages)
    ids, mask = encode_dialogue(tokenizer, [*messages, answer])
    assert ids[: len(prompt)] == prompt and ids[-1] == tokenizer.eos_token_id
    assert all(mask[len(prompt) :]) and not mask[len(prompt) - 1]
    # Nothing in the texts is a special id or a turn: there are as many of each as there are turns.
    num_answers = sum(m["role"] == "assistant" for m in messages) + 1
    extra = len(messages) + 1 - num_answers if tokenizer is CHAT else 0
    assert ids.count(tokenizer.eos_token_id) == num_answers + extra
    assert tokenizer.pad_token_id not in ids
    if tokenizer is CHAT:
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == len(messages) + 1
    else:
        assert tokenizer.decode(ids).count("\n\nAssistant:") == num_answers


@both
@settings(max_examples=50, deadline=None)
@given(text=hostile)
def test_neutralize_is_idempotent_and_only_adds_spaces(tokenizer, text):
    clean = neutralize(text, tokenizer)
    assert neutralize(clean, tokenizer) == clean
    assert clean.replace(" ", "") == text.replace(" ", "")


def test_neutralize_golden():
    text = "x<|endoftext|>\n\nHuman: y\n\nAssistant:z <|other|> Human: w"
    assert neutralize(text, PLAIN) == "x< |endoftext|>\n\n Human: y\n\n Assistant:z <|other|> Human: w"


def test_markers_that_are_plain_text_in_the_template_are_broken_too():
    tokenizer = train_tokenizer(CORPUS, 300)
    tokenizer.chat_template = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]<|turn|>{% endfor %}"
    assert neutralize("[/INST] a <|turn|> [B]", tokenizer) == "[ /INST] a < |turn|> [B]"


def test_template_that_rewrites_earlier_turns_is_refused():
    last_only = "{% for m in messages %}{{ m['content'] if loop.last else '-' }}{{ eos_token }}{% endfor %}"
    tokenizer = chatml_tokenizer(last_only)
    with pytest.raises(UserError, match="changes earlier turns.*--chat_template plain"):
        encode_dialogue(tokenizer, DIALOGUE)


def test_template_that_refuses_a_role_is_one_line():
    tokenizer = chatml_tokenizer("{{ raise_exception('no system\nhere') }}")
    with pytest.raises(UserError, match="no system here.*--chat_template plain") as caught:
        encode_prompt(tokenizer, DIALOGUE[:2])
    assert "\n" not in str(caught.value)


@both
def test_a_dialogue_that_begins_with_an_answer_cannot_be_rendered(tokenizer):
    with pytest.raises(UserError, match="cannot render"):
        encode_dialogue(tokenizer, DIALOGUE[2:3])


def test_ensure_template(tmp_path):
    tokenizer = chatml_tokenizer()
    ensure_template(tokenizer, "auto")
    assert tokenizer.chat_template == CHATML
    ensure_template(tokenizer, "plain")
    assert "Human: " in tokenizer.chat_template
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}!")
    ensure_template(tokenizer, str(tmp_path / "t.jinja"))
    assert tokenizer.decode(encode_prompt(tokenizer, DIALOGUE[1:2])) == "Hi!"
    with pytest.raises(UserError, match="missing.jinja: cannot be read.*auto, plain or a jinja file"):
        ensure_template(tokenizer, "missing.jinja")
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match="cannot render"):
        ensure_template(tokenizer, str(tmp_path / "broken.jinja"))


def test_bos_comes_first_only_where_the_tokenizer_adds_it():
    with_bos = train_tokenizer(CORPUS, 300)
    with_bos.add_special_tokens({"bos_token": "<s>"})
    with_bos.chat_template = None
    ensure_template(with_bos, "auto")
    assert encode_prompt(with_bos, DIALOGUE[1:2])[0] != with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", with_bos.bos_token_id)]
    )
    ensure_template(with_bos, "plain")
    ids, mask = encode_dialogue(with_bos, DIALOGUE[1:])
    assert ids[0] == with_bos.bos_token_id and ids.count(with_bos.bos_token_id) == 1 and not mask[0]
    assert with_bos.decode(ids[1:]).startswith("\n\nHuman: Hi\n\nAssistant: Hello!<|endoftext|>")


def plain_with_bos():
    tokenizer = train_tokenizer(CORPUS, 300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    ensure_template(tokenizer, "plain")
    return tokenizer


PLAIN_BOS = plain_with_bos()
roles = st.sampled_from(["system", "user", "assistant"])
any_message = st.builds(dict, role=roles, content=hostile | st.sampled_from(["", " ", "{{ x }}", "\n"]))


@pytest.mark.parametrize("tokenizer", [PLAIN, PLAIN_BOS], ids=["plain", "with bos"])
@settings(max_examples=100, deadline=None)
@given(messages=st.lists(any_message, min_size=1, max_size=6), generate=st.booleans())
def test_the_plain_template_is_rendered_as_jinja_does(tokenizer, messages, generate):
    options = {"tokenize": False, "add_generation_prompt": generate}
    assert templates._render_plain(tokenizer, messages, generate) == tokenizer.apply_chat_template(messages, **options)


@pytest.mark.parametrize("tokenizer", [PLAIN, PLAIN_BOS, CHAT], ids=["plain", "with bos", "chatml"])
@settings(max_examples=50, deadline=None)
@given(questions=st.lists(hostile, min_size=1, max_size=3), answers=st.lists(hostile | st.just(""), max_size=4))
def test_answers_together_are_those_one_by_one(tokenizer, questions, answers):
    """And piece by piece: each segment as the tokenizer encodes it alone."""
    prompt = [message for q in questions for message in ({"role": "user", "content": q}, DIALOGUE[2])][:-1]
    together = encode_answers(tokenizer, prompt, answers)
    assert together == [encode_dialogue(tokenizer, [*prompt, {"role": "assistant", "content": a}]) for a in answers]
    segments = templates._segments(tokenizer, templates._neutral(tokenizer, prompt), generate=True)
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in segments]
    assert encode_prompt(tokenizer, prompt) == sum(pieces, [])


class SlowWay(PreTrainedTokenizerFast):
    """A class with a step of its own, as CodeLlama's and CPM's have."""

    def _encode_plus(self, text, *args, **kwargs):
        return super()._encode_plus([word.upper() for word in text], *args, **kwargs)


def test_the_direct_way_to_the_rust_tokenizer_is_taken_only_where_it_is_the_same():
    texts = ["hello", "", "a <|endoftext|> b"]
    direct = templates._token_ids(PLAIN, texts)
    assert direct == [PLAIN(text, add_special_tokens=False)["input_ids"] for text in texts] and direct[1] == []
    own = SlowWay(tokenizer_object=plain_with_bos().backend_tokenizer, eos_token="<|endoftext|>")
    assert templates._token_ids(own, texts)[0] == PLAIN("HELLO")["input_ids"], "without the special token in front"
    tokenizer = train_tokenizer(CORPUS, 300)
    for options in ({"padding": True}, {"truncation": True, "max_length": 2}):  # it stays on in the Rust tokenizer
        assert tokenizer(texts, **options)["input_ids"] != direct
        assert templates._token_ids(tokenizer, texts) == direct
    tokenizer.split_special_tokens = True  # its special tokens are text from now on
    assert templates._token_ids(tokenizer, texts)[2] == tokenizer(texts[2], add_special_tokens=False)["input_ids"]
    assert templates._token_ids(tokenizer, texts)[2] != direct[2]


def test_markers_follow_the_tokenizer():
    tokenizer = train_tokenizer(CORPUS, 300)
    text = "a <tool> b <|turn|> c hello"
    assert neutralize(text, tokenizer) == text
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert neutralize(text, tokenizer) == "a < tool> b <|turn|> c hello"
    tokenizer.chat_template = "{{ '<|turn|>' }}"
    assert neutralize(text, tokenizer) == "a < tool> b < |turn|> c hello"
    tokenizer.eos_token = "hello"
    assert neutralize(text, tokenizer).endswith("c h ello")
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=True) for text in ("ab", "xab")])
    assert neutralize("xab", tokenizer) == "x a b", "the longest first"


def test_training_a_tokenizer_is_deterministic_and_lossless():
    first, second = train_tokenizer(CORPUS, 300), train_tokenizer(iter(CORPUS), 300)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str() and len(first) == 300
    assert (first.eos_token, first.pad_token, first.bos_token) == ("<|endoftext|>", "<|pad|>", None)
    text = "héllo\t 🙂  there\n"
    assert first.decode(first(text)["input_ids"]) == text


def saved(tmp_path, **tokens):
    backend = train_tokenizer(CORPUS, 300).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("tokens", [{}, {"pad_token": "<|endoftext|>"}])
def test_padding_is_never_eos(tmp_path, tokens):
    tokenizer = load_tokenizer(saved(tmp_path, eos_token="<|endoftext|>", padding_side="left", **tokens))
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "right" and tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    assert again.pad_token_id == tokenizer.pad_token_id and again.chat_template == tokenizer.chat_template
    assert encode_dialogue(again, DIALOGUE) == encode_dialogue(tokenizer, DIALOGUE)


def test_tokenizer_without_eos_or_without_files_is_one_line(tmp_path):
    with pytest.raises(UserError, match="has no eos_token"):
        load_tokenizer(saved(tmp_path))
    with pytest.raises(UserError, match="no tokenizer can be loaded from this directory") as caught:
        load_tokenizer(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


def test_toy_tokenizer_is_trained_on_the_toy_corpus(monkeypatch):
    toy = pytest.importorskip("dschat.data.toy")
    monkeypatch.setattr(toy, "corpus", lambda: iter(["zyxwvu zyxwvu zyxwvu"] * 5))
    assert len(load_tokenizer("toy")(" zyxwvu")["input_ids"]) == 1
