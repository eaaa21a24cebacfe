"""What models answer: any number of them side by side on the same prompts, scored by a reward and by a judge.

    python training/step1_supervised_finetuning/prompt_eval.py --model_name_or_path output/sft output/ppo/actor \\
        --data_path toy --decoding greedy sample --output_dir output/prompt_eval

One process. Each model answers through its own tokenizer and template, and is in memory only while it does. All are
asked the same dialogues and draw with the same random numbers, so that their answers differ by the models alone.
"""

import gc
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from dschat.config import flag, parse_config, require_not_negative, require_positive, to_dict
from dschat.data.specs import parse_source
from dschat.errors import UserError, run_before_imports, run_program
from dschat.flags import REMOVED, EvaluationFlags
from dschat.rlhf.reward_specs import TOY
from dschat.rlhf.specs import BEAM, BEST_OF_N, DECODINGS, GREEDY, SAMPLE, AnswerSpec, Sampling

MIN_TEMPERATURE = 0.01  # below, logits / temperature leave the range of float32
# flag -> the decodings that it is about
ABOUT = {
    "num_beams": (BEAM,),
    "best_of_n": (BEST_OF_N,),
    "temperature": (SAMPLE, BEST_OF_N),
    "top_k": (SAMPLE, BEST_OF_N),
    "top_p": (SAMPLE, BEST_OF_N),
}
Key = tuple[str, str]  # model, decoding
_BOTH = "give both models to --model_name_or_path, the baseline first"
GONE = REMOVED | {
    "model_name_or_path_baseline": _BOTH,
    "model_name_or_path_finetune": _BOTH,
    "num_beam_groups": "the groups made beams differ; use --decoding sample",
    "penalty_alpha": "contrastive search is gone; use --decoding sample with --top_k",
    "num_return_sequences": "use --decoding best_of_n, or sample with several seeds",
    "language": "prompts come from --data_path, in any language",
}


@dataclass(kw_only=True)
class Config(EvaluationFlags):
    model_name_or_path: list[str] = flag(help="the models, the one to compare with first: directories or hub names")
    data_path: list[str] = flag(
        [],
        "prompts: files, save_to_disk folders, hub names or 'toy'; of each its test split where it has one, else all",
    )
    eval_data_path: list[str] = flag([], "as the stages' held-out data: asked instead of data_path")
    num_prompts: int = flag(20, "ask so many prompts, evenly spread over the data; 0: all")
    num_shown: int = flag(20, "print the answers to the first so many; --output_dir keeps all")
    decoding: list[str] = flag([GREEDY], "how answers are made, one or more ways", choices=DECODINGS)
    temperature: float = flag(1.0, "of sample and best_of_n")
    top_k: int = flag(0, "sample and best_of_n draw among the k likeliest tokens; 0: all")
    top_p: float = flag(1.0, "sample and best_of_n draw among the likeliest tokens of this total probability")
    num_beams: int = flag(4, "of beam")
    best_of_n: int = flag(8, "best_of_n takes the one that --reward likes best of so many samples")
    max_new_tokens: int = flag(0, "longest answer; 0: 256 tokens, or half of the smallest context where that is less")
    max_prompt_seq_len: int = flag(0, "tokens of a prompt; longer ones lose their earliest turns; 0: what fits")
    reward: list[str] = flag([], "as --reward of step 3, or the directory of a reward model: the score of each answer")
    judge: str | None = flag(
        None, "toy, or any one reward: who decides which answer is better; default: toy for the data of that name"
    )
    normalize_reward: bool = flag(
        True, "scores to mean 0 and std 1 by the statistics of step 2, where a model has them"
    )
    output_dir: str | None = flag(None, "where answers.jsonl and summary.json go; default: nowhere")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model_name_or_path", "decoding"):
            if not getattr(self, name):
                raise UserError(f"--{name}: nothing given; give at least one")
        if not (self.data_path or self.eval_data_path):
            raise UserError("no prompts: give --data_path, such as --data_path questions.jsonl")
        require_positive(self, "best_of_n")
        require_not_negative(self, "num_prompts", "num_shown", "top_k", "max_new_tokens", "max_prompt_seq_len")
        if self.num_beams < 2:
            raise UserError(f"--num_beams {self.num_beams}: expected 2 or more; one beam is --decoding greedy")
        if not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"--temperature {self.temperature}: expected at least {MIN_TEMPERATURE}; use --decoding greedy for 0"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: expected a probability above 0 and up to 1 (1: all tokens)")
        defaults = {field.name: field.default for field in fields(self)}
        for name, decodings in ABOUT.items():
            if getattr(self, name) != defaults[name] and not set(decodings) & set(self.decoding):
                raise UserError(f"--{name} is of no use without --decoding {' or '.join(decodings)}")
        if BEST_OF_N in self.decoding and not self.reward:
            raise UserError("--decoding best_of_n needs --reward to choose by")

    @property
    def judged_by(self) -> str | None:
        sources = self.eval_data_path or self.data_path
        return self.judge or (TOY if all(parse_source(path)[0] == TOY for path in sources) else None)

    def answer_spec(self, max_new_tokens: int) -> AnswerSpec:
        sampling = Sampling(max_new_tokens, self.temperature, self.top_k, self.top_p)
        return AnswerSpec(sampling, self.num_beams, self.best_of_n, self.seed, self.batch_size)


if __name__ == "__main__":  # help, and mistakes in flags, need not wait for the libraries below, which take seconds
    run_before_imports(partial(parse_config, Config, doc=__doc__, removed=GONE))

from dschat.engine.distributed import quiet_libraries
from dschat.models.load import resolve_dtype
from dschat.report.answer_table import Answered, answers_table, save_answers, side_by_side, summarize_answers
from dschat.report.metrics import peak_rss_gb, prepare_output_dir
from dschat.report.progress import Console
from dschat.rlhf.answers import Rows, answer, best_of, num_tokens, prompt_rows
from dschat.rlhf.judges import Verdicts, check_judge, create_judge
from dschat.rlhf.policies import Policy, answer_room, fit_prompts, load_prompts, open_policies, spread
from dschat.rlhf.rewards import Samples
from dschat.rlhf.samples import prompt_text

import torch


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, doc=__doc__, removed=GONE)
    start = time.time()
    quiet_libraries()
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(config.dtype, device)
    if config.output_dir:
        prepare_output_dir(config.output_dir)

    # Models and prompts
    policies = open_policies(config.model_name_or_path, config.chat_template)
    spec = config.answer_spec(answer_room(policies, config.max_new_tokens))
    found, left_out = load_prompts(
        config.eval_data_path or config.data_path,
        policies[0].tokenizer,
        eval_fraction=0.0 if config.eval_data_path else config.eval_fraction,
        seed=config.seed,
        cache_dir=os.path.expanduser(config.data_output_path),
        skip_bad_records=config.skip_bad_records,
    )
    chosen = [found[i] for i in spread(len(found), config.num_prompts)]
    rows, changed = fit_prompts(chosen, policies, config.max_prompt_seq_len, spec.sampling.max_new_tokens)
    dialogues, records = [row["messages"] for row in rows], [row["record"] for row in rows]
    questions = [prompt_text(messages) for messages in dialogues]
    for judge in filter(None, (config.reward, config.judged_by)):
        check_judge(judge, policies[0].tokenizer, questions)
    notes: dict[str, int] = dict(left_out + changed)

    # Answer
    answers: dict[Key, Samples] = {}
    for policy in policies:
        model = policy.load(dtype, device)
        asked = prompt_rows(policy.tokenizer, dialogues, records)
        for decoding in dict.fromkeys(config.decoding):
            track = partial(show_progress, console, f"{policy.name} {decoding}")
            answers[policy.name, decoding] = answer(model, policy.tokenizer, asked, decoding, spec, track)
        del model
        free_memory()

    # Judge
    loading: Any = {"dtype": dtype, "device": device, "batch_size": config.batch_size}
    loading |= {"normalize": config.normalize_reward}
    rewards = ask(config.reward, answers, policies, loading)
    for key, samples in answers.items():
        if key[1] == BEST_OF_N:
            answers[key], rewards[key].scores = best_of(samples, rewards[key].scores, config.best_of_n)
    judged = ask(config.judged_by, answers, policies, loading)

    for name, verdicts in (("reward", rewards), ("judge", judged)):
        if missing := sum(score is None for given in verdicts.values() for score in given.scores):
            notes[f"answer without a score by the {name}"] = missing

    # Show and save
    groups = [answered(key, samples, rewards.get(key), judged.get(key)) for key, samples in answers.items()]
    width = shutil.get_terminal_size((120, 24)).columns
    for i, question in enumerate(questions[: config.num_shown]):
        console.print("\n" + side_by_side(f"{i + 1}. {question}", groups, i, width))
    results = summarize_answers(groups)
    console.print("\n" + answers_table(results))
    console.print(f"\nasked {len(questions)} of {len(found)} prompts")
    for reason, count in notes.items():
        console.print(f"  {count} × {reason}")
    if config.output_dir:
        summary = {
            "models": {policy.name: policy.path for policy in policies},
            "num_prompts": len(questions),
            "notes": notes,
            "judge": config.judged_by,
            "max_new_tokens": spec.sampling.max_new_tokens,
            "answers": results,
            "seconds": round(time.time() - start, 1),
            "peak_rss_gb": round(peak_rss_gb(), 3),
            "config": to_dict(config),
        }
        save_answers(config.output_dir, groups, questions, dialogues, summary)
        console.print(f"written to {config.output_dir}: answers.jsonl, summary.json")


def ask(
    specs: str | list[str] | None, answers: dict[Key, Samples], policies: list[Policy], loading: dict[str, Any]
) -> dict[Key, Verdicts]:
    """What the judge that ``specs`` names says of all answers; it is in memory only meanwhile. {}: none is named."""
    if not specs:
        return {}
    tokenizers = {policy.name: policy.tokenizer for policy in policies}
    judge = create_judge(specs, policies[0].tokenizer, **loading)
    verdicts = {key: judge.for_model(tokenizers[key[0]])(samples) for key, samples in answers.items()}
    del judge
    free_memory()
    return verdicts


def answered(key: Key, samples: Samples, reward: Verdicts | None, judge: Verdicts | None) -> Answered:
    return Answered(
        *key,
        responses=samples.responses,
        num_tokens=num_tokens(samples),
        finished=samples.finished,
        scores=reward.scores if reward else None,
        judged=judge.scores if judge else None,
        correct=judge.correct if judge else None,
    )


def show_progress(console: Console, name: str, batches: Sequence[Rows]) -> Iterator[Rows]:
    return console.track(batches, len(batches), name)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_program(main)
