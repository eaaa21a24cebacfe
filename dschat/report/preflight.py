"""Before PPO: is there anything to learn? Samples answers of one or several SFT checkpoints to the prompts of step 3.

    python -m dschat.report.preflight --model_name_or_path output/sft-1 output/sft-3 --reward output/reward \\
        --data_path toy --sft_data_path toy --output_dir output/preflight

Prints and writes (preflight.json, preflight.png) how large the space is that each samples from, what the reward sees
in it, which checkpoint to start from, and a verdict: GO, WARN or STOP. Exit code 0 whatever the verdict. Step 3 does
the same with its own actor before it trains. A program, and the one file of this room that imports those above it.
"""

import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dschat.config import flag, parse_config, require_positive
from dschat.errors import UserError, run_before_imports, run_program
from dschat.flags import TRUST_HELP, DataFlags
from dschat.rlhf.reward_specs import KINDS, judge_spec
from dschat.rlhf.specs import SLOTS, Sampling


@dataclass(kw_only=True)
class Config(DataFlags):
    """The flags of the data are step 3's: the same ones give the same prompts."""

    model_name_or_path: list[str] = flag(help="policies to choose from, as SFT checkpoints of several epochs")
    reward: list[str] = flag(help="as --reward of step 3, or the directory of a reward model")
    sft_data_path: list[str] = flag([], "the data of step 1: the same figures on the prompts that SFT was trained on")
    output_dir: str | None = flag(None, "where preflight.json and preflight.png go; default: nowhere")
    num_prompts: int = flag(64, "prompts, evenly spread over those of training")
    num_samples: int = flag(4, "answers to each of them")
    temperature: float = flag(1.0, "of sampling, as step 3 will have it")
    max_prompt_seq_len: int = flag(256, "as in step 3")
    max_answer_seq_len: int = flag(256, "as in step 3")
    normalize_reward: bool = flag(True, "scores to mean 0 and std 1 by the statistics of step 2, where there are any")
    batch_size: int = flag(16, "prompts answered, and answers scored, at once")
    dtype: str = flag("auto", "of the weights; auto: bf16 on a GPU that has it, else fp32")
    seed: int = flag(1234, "of the split of the data, as in step 3")
    trust_remote_code: bool = flag(False, TRUST_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_prompts", "temperature", "max_prompt_seq_len", "max_answer_seq_len", "batch_size")
        if self.num_samples < 2:
            raise UserError(
                f"--num_samples {self.num_samples}: expected 2 or more, to compare the answers to a prompt"
            )


if __name__ == "__main__":  # help, and mistakes in flags, need not wait for the libraries below, which take seconds
    run_before_imports(partial(parse_config, Config, doc=__doc__))

from dschat.data.prepare import load_rows
from dschat.data.sources import load_stage_data
from dschat.data.stages import tokenize_prompts
from dschat.engine.distributed import Runtime, quiet_libraries
from dschat.models.load import check_context, resolve_dtype
from dschat.report.metrics import prepare_output_dir
from dschat.report.preflight_figures import assemble, figures
from dschat.report.preflight_text import preflight_text, write_preflight
from dschat.report.progress import Console
from dschat.rlhf.collect import Collector
from dschat.rlhf.judges import RewardJudge, check_judge, create_judge
from dschat.rlhf.policies import Policy, open_policies, spread
from dschat.rlhf.preflight import sample_space
from dschat.rlhf.rewards import CombinedReward
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import banned_token_ids
from dschat.rlhf.rollout_engine import create_decoder
from dschat.rlhf.self_check import tolerance

import torch


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, doc=__doc__)
    quiet_libraries()
    console, device = Console(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(config.dtype, device)
    if config.output_dir:
        prepare_output_dir(config.output_dir)
    policies = open_policies(config.model_name_or_path, config.chat_template)
    if any(judge_spec(text).kind not in KINDS for text in config.reward):
        raise UserError(f"--reward {' '.join(config.reward)}: no reward of step 3; give the output of step 2")
    check_judge(config.reward, policies[0].tokenizer, [])
    judge = create_judge(
        config.reward,
        policies[0].tokenizer,
        dtype=dtype,
        device=device,
        batch_size=config.batch_size,
        normalize=config.normalize_reward,
    )
    assert isinstance(judge, RewardJudge), "as its kind says"
    candidates = []
    for policy in policies:
        console.print(f"sampling from {policy.name} ({policy.path})")
        rewards = CombinedReward(judge.for_model(policy.tokenizer).sources)
        collector = collector_of(policy, rewards, config, dtype, device)
        found: dict[str, Any] = {"name": policy.name, "path": policy.path, "training": None}
        for key, rows in rows_of(policy, config).items():
            kept = [rows[i] for i in spread(len(rows), config.num_prompts)]
            found[key] = figures(sample_space(collector, kept, config.num_samples), config.num_samples)
        candidates.append(found)
        del collector
        gc.collect()
    result = assemble(candidates)
    console.print(preflight_text(result))
    if config.output_dir:
        write_preflight(result, Path(config.output_dir), pictures=True)
        console.print(f"written to {config.output_dir}: preflight.json, preflight.png")


def rows_of(policy: Policy, config: Config) -> dict[str, Any]:
    """The prompts that step 3 would train on and, where they were asked for, those of step 1."""
    spec = config.data_spec(config.seed)
    rows = {"prompts": load_rows(spec, "prompt", policy.tokenizer, config.max_prompt_seq_len).train}
    if config.sft_data_path:
        train, _, _ = load_stage_data(
            config.sft_data_path,
            (),
            "sft",
            spec.data_split,
            spec.eval_fraction,
            spec.seed,
            spec.cache_dir,
            spec.skip_bad_records,
        )
        rows["training"] = tokenize_prompts(train, policy.tokenizer, config.max_prompt_seq_len, spec.num_workers)[0]
    return rows


def collector_of(
    policy: Policy, rewards: CombinedReward, config: Config, dtype: torch.dtype, device: torch.device
) -> Collector:
    """What samples and scores in step 3, around a plain model: one process, nothing is trained."""
    model: Any = policy.load(dtype, device)
    longest = config.max_prompt_seq_len + config.max_answer_seq_len
    check_context(model.config, longest, "--max_prompt_seq_len + --max_answer_seq_len")
    tokenizer = policy.tokenizer
    banned = banned_token_ids(tokenizer, model.config.vocab_size)
    sampling = Sampling(config.max_answer_seq_len, config.temperature, banned_ids=banned)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    decoder, _ = create_decoder(SLOTS, model, sampling, limit=tolerance(dtype), **ends)
    engine = RLHFEngine(model, None, model, model)
    place = Runtime(0, 1, device)
    sizes = (config.batch_size, config.batch_size)
    return Collector(engine, rewards, tokenizer, sampling, place, *sizes, decoder=decoder)


if __name__ == "__main__":
    run_program(main)
