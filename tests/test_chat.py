import importlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from dschat.config import parse_config
from dschat.data.records import to_example
from dschat.data.templates import encode_dialogue, encode_prompt
from dschat.data.tokenizer import train_tokenizer
from dschat.data.votes import Candidate
from dschat.errors import UserError
from dschat.models.load import load_causal_lm, resolve_dtype, save_model
from dschat.rlhf.rollout import Sampling, generate
from inference.chatbot import Chatbot, load_chatbot, resolve_device, short_names, trim_history
from inference.lanes import PlainLanes, SlotLanes
from inference.replies import Reply, ReplyText, TextStream
from inference.session import COMMANDS, Session, Turn
from inference.terminal import PlainScreen, TerminalScreen, history_path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

PROGRAM = Path(__file__).resolve().parents[1] / "chat.py"
sys.path.insert(0, str(PROGRAM.parent))  # chat.py is a program, not part of an installed package
chat = importlib.import_module("chat")

TEXTS = ["\n\nHuman: the quick brown fox\n\nAssistant: jumps over", "naïve café, 日本語", "a fox and a fox"] * 4
HELLO = [{"role": "user", "content": "the quick fox"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


@pytest.fixture(scope="module")
def llama(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes))


def bloom(tokenizer, always=None):
    """``always``: a model that says this one token, because its last layer norm puts out the token's embedding."""
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2))
    if always is not None:
        torch.nn.init.zeros_(model.transformer.ln_f.weight)
        model.transformer.ln_f.bias.data = 1e4 * model.transformer.word_embeddings.weight[always].detach()
    return model


@pytest.fixture(scope="module")
def fox_directory(tokenizer, tmp_path_factory):
    """A policy that says " fox" for ever, saved as the programs save it."""
    path = tmp_path_factory.mktemp("run") / "actor"
    save_model(bloom(tokenizer, tokenizer(" fox")["input_ids"][0]), tokenizer, str(path))
    (path / "run.json").write_text('{"role": "policy"}')
    return path


def only(bots):
    (bot,) = bots.values()
    return bot


def dialogue(num_turns, system=""):
    messages = [{"role": "system", "content": system}] if system else []
    for number in range(num_turns - 1):
        messages += [{"role": "user", "content": f"fox {number}"}, {"role": "assistant", "content": f"a fox {number}"}]
    return [*messages, {"role": "user", "content": "the last fox"}]


def session_of(bot, screen=None, **options):
    return Session({"bot": bot}, screen or PlainScreen(), **options)


def run(*flags, stdin="", cwd=None):
    command = [sys.executable, str(PROGRAM), *map(str, flags)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.mark.parametrize(("family", "seed"), [("llama", 0), ("llama", 1), ("bloom", 2), ("bloom", 3)])
def test_the_streamed_text_is_the_text_of_the_whole_response(tokenizer, llama, family, seed):
    model = llama if family == "llama" else bloom(tokenizer)
    bot = Chatbot(model, tokenizer, Sampling(100), seed=seed)
    pieces = list(bot.reply(HELLO))
    prompt = torch.tensor([encode_prompt(tokenizer, HELLO)])
    uniforms = torch.rand(1, 100, generator=torch.Generator().manual_seed(seed))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    whole = generate(model, prompt, torch.ones_like(prompt), bot.sampling, uniforms, **ends)
    text = tokenizer.decode(whole.response_ids[0], skip_special_tokens=True).strip()
    assert "".join(pieces) == text and len(pieces) > 10


def sentencepiece_like():
    """Bytes as tokens of their own and a leading space that only the beginning of a text loses, as Llama 2 has it."""
    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    vocab |= {piece: 300 + number for number, piece in enumerate(["▁", "▁a", "▁fox", "a", "é", "▁▁"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_characters_split_over_tokens_come_out_whole(tokenizer, kind):
    if kind == "byte level":
        ids = tokenizer(" \n naïve 日本語 🙂🙂  café é \n")["input_ids"]
    else:
        tokenizer = sentencepiece_like()
        ids = [300, 302, *(2 + byte for byte in "日本🙂é".encode()), 300, 301, 304, 305, 302, 300]
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
    assert "🙂" in "".join(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) >= 6


def test_the_same_seed_gives_the_same_replies_and_each_reply_is_new(tokenizer, llama):
    def talk(seed):
        bot = Chatbot(llama, tokenizer, Sampling(20), seed=seed)
        return ["".join(bot.reply(HELLO)) for _ in range(2)]

    assert talk(7) == talk(7)
    assert talk(7)[0] != talk(7)[1] and talk(7) != talk(8) and talk(None) != talk(None)


def test_the_reply_ends_at_eos_and_says_whether_it_did(tokenizer):
    ended = Chatbot(bloom(tokenizer, tokenizer.eos_token_id), tokenizer, Sampling(5)).reply(HELLO)
    assert list(ended) == [] and ended.finished
    cut = Chatbot(bloom(tokenizer, tokenizer(" fox")["input_ids"][0]), tokenizer, Sampling(5)).reply(HELLO)
    assert list(cut) == ["fox", *[" fox"] * 4] and not cut.finished and cut.text == "fox fox fox fox fox"


def test_tokens_without_text_cannot_be_drawn(tokenizer):
    model = bloom(tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 1)
    assert Chatbot(model, tokenizer, Sampling(5)).sampling.banned_ids == (tokenizer.pad_token_id, len(tokenizer))


@pytest.mark.parametrize("system", ["", "be a fox"])
def test_history_loses_whole_turns_from_the_oldest_and_no_more_than_needed(tokenizer, system):
    messages = dialogue(30, system)
    head = messages[: bool(system)]
    lengths = {kept: len(encode_prompt(tokenizer, [*head, *messages[-2 * kept + 1 :]])) for kept in range(1, 31)}
    for kept in (1, 2, 3, 8, 17, 29):
        for budget in (lengths[kept], lengths[kept + 1] - 1):
            ids, num_dropped = trim_history(tokenizer, messages, budget)
            assert num_dropped == 30 - kept
            assert ids == encode_prompt(tokenizer, [*head, *messages[-2 * kept + 1 :]])
    assert trim_history(tokenizer, messages, lengths[30])[1] == 0


def test_the_prompt_is_what_training_put_in_front_of_the_answer(tokenizer):
    messages = dialogue(3, "be a fox")
    ids, _ = trim_history(tokenizer, messages, 10**6)
    learned, mask = encode_dialogue(tokenizer, [*messages, {"role": "assistant", "content": "yes"}])
    assert ids == learned[: len(ids)] and all(mask[len(ids) :])


def test_a_chat_of_200_turns_never_leaves_the_context(tokenizer, llama, capsys):
    bot = Chatbot(llama, tokenizer, Sampling(16), seed=0)
    lengths = []
    spy = lambda _, __, given: lengths.append(int(given["position_ids"].max()) + 1)  # noqa: E731
    session = session_of(bot, system="be a fox")
    told = Candidate("bot", "the quick brown fox " * 3)
    session.turns = [Turn(f"fox {number}", [told]) for number in range(199)]
    with llama.register_forward_pre_hook(spy, with_kwargs=True):
        assert session.handle("the last fox")
    assert 256 - 60 < max(lengths) <= 256
    assert len(session.turns) == 200 and session.turns[-1].answers[0].content
    assert "oldest turns left out because the context is full: 19" in capsys.readouterr().err


def test_a_message_beyond_the_context_is_refused_and_the_chat_goes_on(tokenizer, llama, capsys):
    session = session_of(Chatbot(llama, tokenizer, Sampling(16), seed=0))
    assert session.handle("fox " * 300) and session.turns == [] and session.num_refused == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: the message takes ") and "room for 240 beside the answer" in err
    assert session.handle("fox") and len(session.turns) == 1
    with pytest.raises(UserError, match="--max_new_tokens 256 leaves no room"):
        Chatbot(llama, tokenizer, Sampling(256))


class Parrot:
    """A bot that repeats what it is given and may be interrupted after so many tokens."""

    def __init__(self, tokenizer, stop_after=None):
        self.tokenizer, self.stop_after, self.seen, self.sampling = tokenizer, stop_after, [], Sampling(8)
        self.samplings = []

    def replies(self, messages, count, sampling=None):
        self.seen.append(messages)
        self.samplings.append(sampling)
        if count == 1:
            return [Reply(self.tokens(messages[-1]["content"]), self.tokenizer)]
        return [Reply(self.tokens(f"{messages[-1]['content']} {n % 3}"), self.tokenizer) for n in range(count)]

    def tokens(self, text):
        for number, token in enumerate([*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield token


def test_the_commands_shape_what_the_model_sees(tokenizer, capsys):
    bot = Parrot(tokenizer)
    session = session_of(bot)
    for line in ["a\n", "/system s\n", " /b\n", "\n", "/regen\n", "/clear\n", "/regen\n", "c\n", "/system\n", "d\n"]:
        assert session.handle(line)
    a, b, c = ([{"role": role, "content": text} for role in ("user", "assistant")] for text in ("a", "/b", "c"))
    s = [{"role": "system", "content": "s"}]
    assert bot.seen == [a[:1], s + a + b[:1], s + a + b[:1], s + c[:1], [*c, {"role": "user", "content": "d"}]]
    assert capsys.readouterr().out == "a\n/b\n/b\nc\nd\n"
    assert not session.handle("/quit\n")


def test_what_is_saved_is_a_record_for_training_and_no_file_of_others_is_touched(tokenizer, tmp_path, capsys):
    session, file = session_of(Parrot(tokenizer), system="être"), tmp_path / "a b.json"
    session.handle(f"/save {file}")
    assert not file.exists() and "nothing to save" in capsys.readouterr().err
    for line in ["un", f"/save {file}", "deux", f"/save {file}"]:
        session.handle(line)
    record = json.loads(file.read_text(encoding="utf-8"))
    assert [m["content"] for m in record["messages"]] == ["être", "un", "un", "deux", "deux"]
    assert to_example(record)["responses"] == ["deux"] and len(file.read_text(encoding="utf-8").splitlines()) == 1
    (other := tmp_path / "other.json").write_text("mine")
    for line in (f"/save {other}", "/save", f"/save {tmp_path}/no/where.json"):
        session.handle(line)
    err = capsys.readouterr().err
    assert other.read_text() == "mine" and "exists" in err and "give a file name" in err and "No such file" in err


def test_an_interrupted_answer_keeps_what_was_said(tokenizer):
    session = session_of(Parrot(tokenizer, stop_after=2), TerminalScreen())
    session.handle("the quick brown fox")
    assert session.turns == [Turn("the quick brown fox", [Candidate("bot", "the quick")])]
    session.bots["bot"] = silent = Parrot(tokenizer, stop_after=0)
    assert session.handle("a") and session.handle("b")
    assert [m["content"] for m in silent.seen[-1]] == ["the quick brown fox", "the quick", "b"]  # no empty answer
    with pytest.raises(KeyboardInterrupt):  # without a terminal there is no second prompt: the program ends
        session_of(silent).handle("a")


def test_through_a_pipe_answers_alone_are_on_stdout(fox_directory, tmp_path):
    lines = "Hi\n\n/nope\nfox fox fox\n/regen\n/save s.json\n/quit\nHi\n"
    done = run("--path", fox_directory, "--max_new_tokens", "3", "--system", "be a fox", stdin=lines, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "fox fox fox\n" * 3)
    assert done.stderr.count("cut off after 3 tokens") == 3 and "unknown command /nope" in done.stderr
    assert len(done.stderr.splitlines()) == 5  # and nothing from the libraries
    saved = json.loads((tmp_path / "s.json").read_text())["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant", "user", "assistant"]


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(fox_directory, tmp_path):
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell inherits that it is ignored
        os.environ |= {"PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(tmp_path)}
        os.execv(sys.executable, [sys.executable, str(PROGRAM), f"--path={fox_directory}", "--max_new_tokens=99999"])
    seen = ""
    for awaited, keys in [("you>", b"Hi\r"), ("fox fox", b"\x03"), ("stopped", b""), ("you>", b"\x04")]:
        while awaited not in seen:
            assert select.select([terminal], [], [], 60)[0], f"no {awaited!r} in {seen[-500:]!r}"
            seen += os.read(terminal, 4096).decode(errors="replace")
        seen = seen.split(awaited, 1)[1]
        os.write(terminal, keys)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(terminal)
    assert "+Hi" in (tmp_path / "dschat" / "chat_history").read_text()


def test_a_mistake_is_one_line_and_exit_code_2(tokenizer, llama, tmp_path):
    done = run(stdin="Hi\n")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: missing --path; see --help\n")
    save_model(llama, tokenizer, str(tmp_path))
    (tmp_path / "run.json").write_text('{"role": "critic"}')
    done = run("--path", tmp_path, stdin="Hi\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "is a reward model, not a language model" in done.stderr


def test_a_wrong_place_is_named(fox_directory, tmp_path):
    wrong = {fox_directory.parent: f"did you mean {fox_directory}", fox_directory / "config.json": "is a file"}
    wrong |= {tmp_path: "holds no config.json", tmp_path / "x": "no such directory", "toy": "no trained weights"}
    for path, expected in wrong.items():
        with pytest.raises(UserError, match=expected):
            load_chatbot(str(path), Sampling(5))
    for device in ("tpu", "cuda:x", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {device}"):
            resolve_device(device)
    with pytest.raises(UserError, match="needs a GPU"):
        resolve_dtype("fp16", torch.device("cpu"))


def test_by_default_half_of_a_small_context_is_for_the_answer(tokenizer, llama, fox_directory, tmp_path):
    """The embedded model has 256 positions, BLOOM no limit: `chat.py --path` without a flag works with either."""
    config = parse_config(chat.Config, ["--path", str(fox_directory)])
    assert only(chat.open_chatbots(config)).sampling.max_new_tokens == 256
    toy = load_causal_lm("toy", tokenizer, dtype=torch.float32)
    save_model(toy, tokenizer, str(tmp_path))
    (tmp_path / "run.json").write_text('{"role": "policy"}')
    bot = only(chat.open_chatbots(parse_config(chat.Config, ["--path", str(tmp_path)])))
    assert bot.sampling.max_new_tokens == 128 and bot.context == 256 and isinstance(bot.lanes, SlotLanes)


def test_every_flag_reaches_the_model(fox_directory, monkeypatch):
    assert load_chatbot(str(fox_directory), Sampling(5), dtype="bf16").model.dtype == torch.bfloat16
    given = []
    monkeypatch.setattr("inference.chatbot.load_chatbot", lambda *args, **options: given.append((args, options)))
    flags = "--path p q --max_new_tokens 7 --temperature 0.5 --top_k 3 --top_p 0.9"
    options = {"seed": 5, "dtype": "bf16", "device": "cpu", "chat_template": "plain", "num_slots": 3, "max_waiting": 4}
    flags += "".join(f" --{name} {value}" for name, value in options.items())
    assert list(chat.open_chatbots(parse_config(chat.Config, flags.split()))) == ["p", "q"]
    assert given == [((path, Sampling(7, 0.5, 3, 0.9)), options) for path in "pq"]


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "max_new_tokens"])
def test_bad_sampling_flags_are_named(name):
    bad = {"temperature": "-1 nan inf 1e-9", "top_p": "0 1.1 nan", "top_k": "-1", "max_new_tokens": "-1"}
    for value in bad[name].split():
        with pytest.raises(UserError, match=f"--{name} .*: expected"):
            parse_config(chat.Config, ["--path", "x", f"--{name}", value])


def test_flags_of_the_server_and_of_several_models():
    for flags, expected in (
        ("--path a b ./a", "stands there twice"),
        ("--path a --port 70000", "--port 70000: expected a number from 0"),
        ("--path a --num_slots 0", "--num_slots 0"),
        ("--path a --max_waiting -1", "--max_waiting -1"),
    ):
        with pytest.raises(UserError, match=expected):
            parse_config(chat.Config, flags.split())
    assert short_names(["out/a/actor", "out/b"]) == ["a/actor", "b"] and short_names(["out/a"]) == ["out/a"]
    assert short_names(["out", "out/a"]) == ["out", "a"]


# Several models, scores, votes


class Judge:
    """The longer the better."""

    def score(self, prompt, text):
        return float(len(text))


def two(tokenizer, tmp_path, screen=None, scorer=None):
    bots = {"one": Parrot(tokenizer), "other": Parrot(tokenizer)}
    bots["other"].replies = lambda *_: [Reply(iter(tokenizer("a fox")["input_ids"]), tokenizer)]
    return Session(bots, screen or PlainScreen(), votes=tmp_path / "votes.jsonl", scorer=scorer)


def votes_in(tmp_path):
    return [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]


def test_two_models_answer_and_the_conversation_goes_on_with_the_choice(tokenizer, tmp_path, capsys):
    session = two(tokenizer, tmp_path, scorer=Judge())
    for line in ("the quick brown fox", "/vote 3", "/vote", "/vote 2", "and a fox"):
        assert session.handle(line)
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == ["one (+19.00): the quick brown fox", "other (+5.00): a fox"]
    assert err.count("/vote 1 to 2") == 2 and "which has 1 votes" in err
    (record,) = votes_in(tmp_path)
    assert (record["chosen"], record["rejected"]) == ("a fox", "the quick brown fox")
    assert record["metadata"]["sampling"]["temperature"] == 1.0 and not record["metadata"]["blind"]
    said = [m["content"] for m in session.bots["one"].seen[-1]]
    assert said == ["the quick brown fox", "a fox", "and a fox"]
    session.handle("/vote tie")
    assert to_example(votes_in(tmp_path)[1])["ranks"] == [1, 1]


def test_best_of_n_is_ordered_and_can_be_voted_on(tokenizer, tmp_path, capsys):
    session = session_of(Parrot(tokenizer), scorer=Judge(), votes=tmp_path / "votes.jsonl")
    session.scorer.score = lambda prompt, text: float(text[-1] if text[-1].isdecimal() else 0)
    for line in ("/best 2", "fox", "/vote 1", "/best x", "/best 1", "/best 6", "/vote 2", "more"):
        session.handle(line)
    out, err = capsys.readouterr()
    ranked = ["1 bot (+2.00): fox 2", "2 bot (+1.00): fox 1", "3 bot (+0.00): fox 0"]
    assert [line for line in out.splitlines() if " bot " in line] == ranked
    assert "nothing to choose from" in err and err.count("give a number from 2 to 64") == 2
    (record,) = votes_in(tmp_path)
    assert record["responses"] == ["fox 2", "fox 1", "fox 0"] and record["ranks"] == [2, 1, 2]
    assert session.bots["bot"].seen[-1][1]["content"] == "fox 1"


def test_when_one_model_cannot_answer_the_others_are_stopped(tokenizer, tmp_path, llama, capsys):
    session = two(tokenizer, tmp_path)
    session.bots["other"] = full = Chatbot(llama, tokenizer, Sampling(16), num_slots=1, max_waiting=0)
    stopped = []
    session.bots["one"].replies = lambda *_: [Reply(iter([]), tokenizer, stop=lambda: stopped.append(1))]
    session.handle("/best 4")
    assert session.handle("fox " * 300) and stopped == [1] and session.num_refused == 1 and session.turns == []
    session.turns = [Turn("fox", [Candidate("one", "a fox")])]
    session.handle("/best 4")
    assert stopped == [1, 1] and "requests are waiting already" in capsys.readouterr().err
    while full.decoder.load != (0, 0):
        time.sleep(0.01)


def test_temperature_undo_and_load(tokenizer, tmp_path, capsys):
    session = session_of(bot := Parrot(tokenizer))
    for line in ("a", "/temp x", "/temp -1", "/temp 0.2", "b", "/undo", "c", f"/save {tmp_path}/s.jsonl", "/clear"):
        session.handle(line)
    assert [s.temperature for s in bot.samplings] == [1.0, 0.2, 0.2]
    assert [m["content"] for m in bot.seen[-1]] == ["a", "a", "c"]
    fresh = session_of(other := Parrot(tokenizer))
    for line in ("/undo", "/load", "/load nowhere", f"/load {PROGRAM}", f"/load {tmp_path}/s.jsonl", "d"):
        fresh.handle(line)
    assert [m["content"] for m in other.seen[-1]] == ["a", "a", "c", "c", "d"]
    err = capsys.readouterr().err
    for text in (
        "give a number: /temp 0.7",
        "/temp -1.0: expected 0",
        "nothing to take back",
        "no such file: nowhere",
        "unknown kind of file",
        "2 turns from",
    ):
        assert text in err
    assert set(COMMANDS) == {*session._commands, "/quit"}


def test_columns_show_all_answers_and_obey_no_model(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    screen = TerminalScreen()
    texts = ["the quick brown fox " * 5, "a \x1b[31mfox"]
    replies = [Reply(iter(tokenizer(text)["input_ids"]), tokenizer) for text in texts]
    assert screen.show(["one", "other"], replies, lambda text: 1.5)
    out = capsys.readouterr().out
    assert "1 one (+1.50)" in out and "2 other (+1.50)" in out and "\x1b[31m" not in out and "\ufffd" in out
    row = next(line for line in out.splitlines() if "the quick" in line and "fox" in line.split("the quick")[-1])
    assert max(map(len, out.splitlines())) <= 60 and row


@pytest.mark.parametrize("stop", [["brown"], ["own f", "zzz"], ["fox"]])
def test_a_stop_text_ends_the_answer_however_it_is_cut_into_tokens(tokenizer, stop):
    whole = "the quick brown fox"
    said, pieces = ReplyText(tokenizer, stop), []
    for token in tokenizer(whole)["input_ids"]:
        pieces.append(said.push(token))
    pieces.append(said.end())
    assert "".join(pieces) == said.text == whole.partition(stop[0])[0] and said.finished
    held = ReplyText(tokenizer, ["fox and more"])
    pieces = [held.push(token) for token in tokenizer(whole)["input_ids"]]
    assert "".join(pieces) == "the quick brown " or "".join(pieces) == "the quick brown"
    assert "".join(pieces) + held.end() == whole and not held.finished


def test_what_was_typed_is_kept_for_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = history_path()
    assert path.parent.parent == tmp_path / "state" and path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert history_path() is None


def test_a_family_without_slots_says_so(fox_directory):
    bot = load_chatbot(str(fox_directory), Sampling(5))
    assert isinstance(bot.lanes, PlainLanes) and "a loop of its own: its attention is eager" in bot.note
