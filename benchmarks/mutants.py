"""Do the tests of the mathematics see a fault? Each of these, alone in a copy of the code, must turn one red.

    python benchmarks/mutants.py --jobs 2        all of them, minutes
    python benchmarks/mutants.py --only 12 40    the ones with these numbers

A fault is (file of dschat/functional/, text that occurs once in it, what replaces it). Exit code 1 if one survives,
if one breaks the import (which proves nothing), or if the code without a fault is not green. The repository itself is
not written to.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Fault = tuple[str, str, str]
# Every run is a fresh process, forked from one that has loaded what takes seconds (but nothing of dschat).
SERVER = multiprocessing.get_context("forkserver")

FAULTS: list[Fault] = [
    # masks
    ("masks.py", "return torch.where(mask, x.float(), 0.0)", "return x.float() * mask"),
    ("masks.py", "return torch.where(mask, x.float(), 0.0)", "return torch.where(mask, x, 0.0)"),
    ("masks.py", "if mask.dtype != torch.bool:", "if mask.dtype.is_complex:"),
    ("masks.py", "if mask.shape != x.shape:", "if mask.dim() > x.dim():"),
    ("masks.py", "columns = size - 1 - columns", "columns = size - columns"),
    ("masks.py", "<= int(lengths.max()) <= size:", "<= int(lengths.max()):"),
    ("masks.py", "real.cumsum(dim=-1) - 1, 0)", "real.cumsum(dim=-1), 0)"),
    ("masks.py", "return torch.where(real, real.cumsum(dim=-1) - 1, 0)", "return real.cumsum(dim=-1) - 1"),
    ("masks.py", "return kept.sum() / mask.sum().clamp(min=1)", "return kept.sum() / mask.numel()"),
    ("masks.py", "kept.sum(dim) / mask.sum(dim).clamp(min=1)", "kept.sum(dim) / mask.sum(dim)"),
    ("masks.py", "select(centred - masked_mean(centred, mask), mask)", "select(centred, mask)"),
    ("masks.py", "masked_mean(masked_centre(x, mask).square(), mask)", "masked_mean(select(x, mask).square(), mask)"),
    ("masks.py", "masked_variance(x, mask) + 1e-8", "masked_variance(x, mask) + 1e-6"),
    ("masks.py", "whitened if shift_mean else", "whitened if not shift_mean else"),
    # reduction
    ("reduction.py", "return total / torch.where(own_count > 0, chosen, 1.0)", "return total / chosen"),
    ("reduction.py", "chosen = own_count if denominator is None else denominator", "chosen = own_count"),
    ("reduction.py", "divide(select(x, action_mask).sum()", "divide(x.float().sum()"),
    (
        "reduction.py",
        "select(x, action_mask).sum(), action_mask.sum()",
        "select(x, action_mask).sum(), action_mask.any()",
    ),
    ("reduction.py", "value.detach().float()", "value.float()"),
    ("reduction.py", "len(set(shapes.values())) > 1", "len({len(shape) for shape in shapes.values()}) > 1"),
    # logprobs
    ("logprobs.py", "columns = max(1, min(length, positions))", "columns = max(1, length)"),
    ("logprobs.py", "rows = max(1, positions // columns)", "rows = max(1, positions)"),
    ("logprobs.py", "logits[block].log_softmax(dim=-1, dtype=torch.float32)", "logits[block].log_softmax(dim=-1)"),
    ("logprobs.py", "softmax.mul_(-upstream)", "softmax.mul_(upstream)"),
    ("logprobs.py", "token_ids[block][..., None], upstream)", "token_ids[block][..., None], upstream.abs())"),
    (
        "logprobs.py",
        "by_logit.masked_fill_(upstream == 0, 0.0)\n        return result, None",
        "by_logit\n        return result, None",
    ),
    ("logprobs.py", "if logits.shape[:-1] != token_ids.shape:", "if logits.dim() != token_ids.dim() + 1:"),
    ("logprobs.py", "logp.masked_fill_(p == 0, 0.0)", "logp"),
    ("logprobs.py", "logp = logits.log_softmax(dim=-1, dtype=torch.float32)", "logp = logits.log_softmax(dim=-1)"),
    ("logprobs.py", "result[block] = -(p * logp).sum(dim=-1)", "result[block] = (p * logp).sum(dim=-1)"),
    ("logprobs.py", "(logp - minus_entropy)", "(logp + minus_entropy)"),
    ("logprobs.py", "(logp - minus_entropy)", "logp"),
    ("logprobs.py", ".mul_(p).mul_(-upstream)", ".mul_(p).mul_(upstream)"),
    ("logprobs.py", ".mul_(p).mul_(-upstream)", ".mul_(-upstream)"),
    (
        "logprobs.py",
        "by_logit.masked_fill_(upstream == 0, 0.0)\n        return result\n",
        "by_logit\n        return result\n",
    ),
    ("logprobs.py", "ctx.save_for_backward(logits)", "ctx.save_for_backward(logits.float())"),
    (
        "logprobs.py",
        "@once_differentiable\n    def backward(ctx: Any, gradient: Tensor) -> Tensor:",
        "def backward(ctx: Any, gradient: Tensor) -> Tensor:",
    ),
    # kl
    ("kl.py", "logp.sub_(logq.masked_fill_(p == 0, 0.0))", "logp.sub_(logq)"),
    ("kl.py", "logq = ref_logits.log_softmax(dim=-1, dtype=torch.float32)", "logq = ref_logits.log_softmax(dim=-1)"),
    (
        "kl.py",
        "_log_ratio(logits[block], ref_logits[block])\n            result",
        "_log_ratio(ref_logits[block], logits[block])\n            result",
    ),
    ("kl.py", "log_ratio.sub_(kl).mul_(p)", "log_ratio.mul_(p)"),
    ("kl.py", ".mul_(p).mul_(upstream)", ".mul_(p)"),
    ("kl.py", "by_logit.masked_fill_(upstream == 0, 0.0)", "by_logit"),
    ("kl.py", "ctx.save_for_backward(logits, ref_logits)", "ctx.save_for_backward(logits, ref_logits.float())"),
    ("kl.py", "_FullKL.apply(logits, ref_logits.detach())", "_FullKL.apply(logits, ref_logits)"),
    ("kl.py", "if logits.shape != ref_logits.shape:", "if logits.dim() != ref_logits.dim():"),
    ("kl.py", "d = logprobs.float() - ref_logprobs.float()", "d = (logprobs - ref_logprobs).float()"),
    ("kl.py", "d = logprobs.float() - ref_logprobs.float()", "d = logprobs.detach().float() - ref_logprobs.float()"),
    ("kl.py", "return d\n", "return d.clamp(-10, 10)\n"),
    ("kl.py", "return d.abs()", "return d.relu()"),
    ("kl.py", "return d.square() / 2", "return d.square()"),
    ("kl.py", "return torch.expm1(-d) + d", "return torch.expm1(d) - d"),
    ("kl.py", "return torch.expm1(-d) + d", "return torch.exp(-d) - 1 + d"),
    ("kl.py", "kl_per_seq / target - 1, -0.2)", "kl_per_seq - target, -0.2)"),
    ("kl.py", "min(max(kl_per_seq / target - 1, -0.2), 0.2)", "max(kl_per_seq / target - 1, -0.2)"),
    ("kl.py", "error * num_sequences / horizon", "error * horizon / num_sequences"),
    ("kl.py", "if num_sequences >= 5 * horizon:", "if num_sequences > 5 * horizon:"),
    ("kl.py", "if not (target > 0 and horizon > 0):", "if target <= 0 or horizon <= 0:"),
    ("kl.py", "if not math.isfinite(kl_per_seq):", "if math.isnan(kl_per_seq):"),
    # advantages
    ("advantages.py", "unfinished = scores.float() - penalty", "unfinished = scores.float() + penalty"),
    ("advantages.py", "torch.full_like(scores, -penalty,", "torch.full_like(scores, penalty,"),
    ("advantages.py", "unfinished = torch.zeros_like(scores, dtype=torch.float32)", "unfinished = scores.float()"),
    ("advantages.py", "torch.where(finished, select(scores, finished), unfinished)", "unfinished"),
    ("advantages.py", "action_mask.flip(1).cumsum(dim=1).flip(1)", "action_mask.cumsum(dim=1)"),
    ("advantages.py", "score_at_last - kl_coef", "score_at_last + kl_coef"),
    ("advantages.py", "kl_coef * kl.float()", "kl_coef * kl"),
    (
        "advantages.py",
        "return select(score_at_last - kl_coef * kl.float(), action_mask)",
        "return score_at_last - kl_coef * kl.float()",
    ),
    ("advantages.py", "@torch.no_grad()\n", ""),
    ("advantages.py", "select(rewards, action_mask), select(values, action_mask)", "rewards.float(), values.float()"),
    ("advantages.py", "if final_values.shape != rewards.shape[:1]:", "if final_values.dim() != 1:"),
    ("advantages.py", "(0, 1), value=size)[:, 1:]", "(0, 1), value=0)[:, 1:]"),
    ("advantages.py", "torch.where(action_mask, index, size)", "torch.where(action_mask, index, index)"),
    (
        "advantages.py",
        "torch.cat([values, final_values[:, None]], dim=1)",
        "torch.cat([values, 0 * final_values[:, None]], dim=1)",
    ),
    (
        "advantages.py",
        "select(rewards + gamma * next_values - values, action_mask)",
        "rewards + gamma * next_values - values",
    ),
    ("advantages.py", "rewards + gamma * next_values - values", "rewards + next_values - values"),
    ("advantages.py", "torch.where(action_mask, gamma * lam, 1.0)", "torch.where(action_mask, lam, 1.0)"),
    ("advantages.py", "torch.where(action_mask, gamma * lam, 1.0)", "torch.full_like(rewards, gamma * lam)"),
    ("advantages.py", "return advantages, advantages + values", "return advantages, advantages + rewards"),
    ("advantages.py", "action_mask, gamma, 1.0)[1]", "action_mask, gamma, gamma)[1]"),
    ("advantages.py", "action_mask, gamma, 1.0)[1]", "action_mask, 1.0, gamma)[1].cumsum(dim=1)"),
    # groups
    ("groups.py", "or group_size < 2 or", "or group_size < 1 or"),
    ("groups.py", "or group_size < 2 or len(totals) % group_size:", "or group_size < 2:"),
    (
        "groups.py",
        "select(totals, counts).reshape(-1, group_size)",
        "select(totals, counts).reshape(group_size, -1).T",
    ),
    ("groups.py", "kept - largest, 0.0)", "kept, 0.0)"),
    ("groups.py", "offsets.sum(dim=1, keepdim=True) / num_counted", "offsets.mean(dim=1, keepdim=True)"),
    ("groups.py", "return torch.where(counted, offsets - ", "return torch.where(counted | True, offsets - "),
    ("groups.py", "(centred * num_counted / (num_counted - 1).clamp(min=1))", "centred"),
    (
        "groups.py",
        "centred * num_counted / (num_counted - 1).clamp(min=1)",
        "centred * num_counted / (num_counted - 1)",
    ),
    ("groups.py", "keepdim=True) / (num_counted - 1).clamp(min=1)", "keepdim=True) / num_counted.clamp(min=1)"),
    ("groups.py", "variance.sqrt() + 1e-6", "variance.sqrt() + 1e-4"),
    ("groups.py", "variance.sqrt() + 1e-6", "variance + 1e-6"),
    # ppo
    ("ppo.py", "_MAX_LOG_RATIO = 20.0", "_MAX_LOG_RATIO = 200.0"),
    ("ppo.py", "old_logprobs.detach(), advantages.detach()", "old_logprobs, advantages"),
    ("ppo.py", "ratio.clamp(1 - cliprange, 1 + cliprange)", "ratio.clamp(max=1 + cliprange)"),
    ("ppo.py", "losses = torch.maximum(unclipped, clipped)", "losses = torch.minimum(unclipped, clipped)"),
    ("ppo.py", "losses = torch.maximum(unclipped, clipped)", "losses = clipped"),
    ("ppo.py", "no_gradient = clipped > unclipped", "no_gradient = (ratio - 1).abs() > cliprange"),
    ("ppo.py", "(kept_advantages < 0) & (losses > ceiling)", "losses > ceiling"),
    ("ppo.py", "(losses > ceiling)", "(losses >= ceiling)"),
    ("ppo.py", "ceiling = -kept_advantages * dual_clip", "ceiling = -kept_advantages * (1 + dual_clip)"),
    ("ppo.py", "losses = torch.where(too_high, ceiling, losses)", "losses = torch.where(too_high, 0.0, losses)"),
    ("ppo.py", "no_gradient = no_gradient | too_high", "no_gradient = too_high"),
    ("ppo.py", "no_gradient = no_gradient | too_high", "no_gradient = no_gradient"),
    ("ppo.py", "masked_mean(too_high, action_mask)", "masked_mean(no_gradient, action_mask)"),
    ("ppo.py", "not dual_clip > 1:", "dual_clip < 1:"),
    ("ppo.py", "torch.expm1(log_ratio) - log_ratio", "torch.exp(log_ratio) - 1 - log_ratio"),
    ("ppo.py", "torch.expm1(log_ratio) - log_ratio", "-log_ratio"),
    ("ppo.py", "kept_ratio = select(ratio, action_mask)", "kept_ratio = ratio"),
    ("ppo.py", "select(returns.detach(), action_mask)", "select(returns, action_mask)"),
    ("ppo.py", "kept_values.clamp(kept_old_values - cliprange_value,", "kept_values.clamp(-cliprange_value,"),
    ("ppo.py", "0.5 * torch.maximum(unclipped, clipped)", "torch.maximum(unclipped, clipped)"),
    ("ppo.py", "0.5 * torch.maximum(unclipped, clipped)", "0.5 * unclipped"),
    (
        "ppo.py",
        "masked_variance(kept_values.detach() - kept_returns,",
        "masked_mean((kept_values.detach() - kept_returns).square(),",
    ),
    ("ppo.py", "torch.where(variance > 0, 1 - residual_variance / variance, 0.0)", "1 - residual_variance / variance"),
    # losses
    ("losses.py", "(margins > 0).float() + 0.5 * (margins == 0).float()", "(margins > 0).float()"),
    ("losses.py", "logits[:, :-1][scored]", "logits[:, 1:][scored]"),
    ("losses.py", "nll * token_weights, token_weights.sum()", "nll * token_weights, num_tokens"),
    ("losses.py", "surplus = margins - margin.float()", "surplus = margins + margin.float()"),
    ("losses.py", "-logsigmoid(surplus).sum()", "-torch.log(torch.sigmoid(surplus)).sum()"),
    ("losses.py", "_share_correct(margins).sum(), num_pairs", "_share_correct(surplus).sum(), num_pairs"),
    ("losses.py", "(ranks[:, :, None] < ranks[:, None, :])", "(ranks[:, :, None] > ranks[:, None, :])"),
    ("losses.py", "present[:, :, None] & present[:, None, :] &", "present[:, None, :] &"),
    ("losses.py", "/ pairs_per_prompt.clamp(min=1)", "/ 1"),
    ("losses.py", "num_prompts = (pairs_per_prompt > 0).sum()", "num_prompts = present.any(dim=1).sum()"),
    ("losses.py", "return -logsigmoid(beta * h)", "return -logsigmoid(h)"),
    ("losses.py", "1 / (2 * beta)).square()", "1 / beta).square()"),
    ("losses.py", "torch.relu(1 - beta * h)", "torch.relu(1 - h)"),
    ("losses.py", "label_smoothing * loss_of(-h)", "label_smoothing * loss_of(h)"),
    ("losses.py", "- ref_rejected_logps.float()", "- ref_chosen_logps.float()"),
    ("losses.py", "chosen_reward=divide(beta * chosen.sum()", "chosen_reward=divide(chosen.sum()"),
]


def check_faults(faults: Iterable[Fault]) -> None:
    """Every text occurs exactly once, so that a fault is what its author meant when the code has moved on."""
    for file, old, new in faults:
        count = (ROOT / "dschat" / "functional" / file).read_text(encoding="utf-8").count(old)
        if count != 1 or old == new:
            raise SystemExit(f"{file}: {old!r} occurs {count} times, must occur once and change")


def pytest_in(folder: str, tests: list[str], log: str) -> None:
    """The whole life of one process: pytest in `folder`, whose dschat is found first; ends with pytest's exit code."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.exit(int(pytest.main(["-x", "-q", *tests])))


def run_tests(fault: Fault | None) -> tuple[str, str]:
    """The tests of dschat/functional/ in a fresh copy of the code: the verdict, and the first test that failed."""
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        copy = Path(folder)
        for name in ("dschat", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        stem = ""
        if fault:
            file, old, new = fault
            target = copy / "dschat" / "functional" / file
            target.write_text(target.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
            stem = target.stem
        tests = [str(path.relative_to(copy)) for path in sorted((copy / "tests").glob("test_functional_*.py"))]
        tests.sort(key=lambda name: not name.endswith(f"_{stem}.py"))  # the nearest first: they fail soonest
        log = copy / "pytest.log"
        process = SERVER.Process(target=pytest_in, args=(folder, tests, str(log)))
        process.start()
        process.join()
        output = log.read_text(encoding="utf-8")
    failed = re.search(r"^FAILED tests/(\S+)", output, re.MULTILINE)
    verdicts: dict[int | None, str] = {0: "SURVIVED", 1: "red"}
    verdict = verdicts.get(process.exitcode, f"BROKEN ({process.exitcode})")
    return verdict, failed[1] if failed else output if verdict != "SURVIVED" else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of the faults to make; default all")
    parser.add_argument("--jobs", type=int, default=1, help="copies tested at the same time")
    args = parser.parse_args()
    check_faults(FAULTS)
    numbers = args.only or range(1, len(FAULTS) + 1)
    if not all(1 <= n <= len(FAULTS) for n in numbers):
        parser.error(f"--only takes numbers from 1 to {len(FAULTS)}")

    os.environ["OMP_NUM_THREADS"] = "1"
    SERVER.set_forkserver_preload(["torch", "hypothesis"])
    verdict, detail = run_tests(None)
    if verdict != "SURVIVED":
        print(f"the code without a fault is not green: {detail}")
        return 1
    num_red = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(run_tests, (FAULTS[n - 1] for n in numbers))
        for n, (verdict, detail) in zip(numbers, results, strict=True):
            file, old, new = (" ".join(text.split()) for text in FAULTS[n - 1])
            num_red += verdict == "red"
            print(f"{n:4} {verdict:9} {file}: {old}  ->  {new}\n{'':15}{detail}", flush=True)
    print(f"{num_red} of {len(numbers)} faults are red")
    return 0 if num_red == len(numbers) else 1


if __name__ == "__main__":
    sys.exit(main())
