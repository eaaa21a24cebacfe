"""All stages of RLHF in one command: supervised fine-tuning, reward model, PPO; then what it came to.

    python e2e_rlhf.py                                  the embedded task and model, on whatever machine this is
    python e2e_rlhf.py --method dpo                     DPO in place of reward model and PPO
    python e2e_rlhf.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m --deployment-type single_gpu
    python e2e_rlhf.py --actor-model ./my-model --data-path mine.jsonl --seed 3 --ppo.kl_coef 0.1

The flags of the stages' programs work here too: --NAME goes to every stage that has it; --sft.NAME, --reward.NAME,
--ppo.NAME, --dpo.NAME and --answers.NAME go to one stage and outweigh --NAME (`python
training/step1_supervised_finetuning/main.py --help` lists those of step 1). DSCHAT_LAUNCH in the environment replaces
the launcher: DSCHAT_LAUNCH="deepspeed --hostfile hosts".
"""

import argparse
import ast
import difflib
import functools
import json
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from dschat.data import toy
from dschat.errors import UserError, run_program
from dschat.report.metrics import prepare_output_dir, write_whole
from dschat.report.reward_quality import QUALITY_FOLDER, read_quality
from dschat.report.summary import (
    before_and_after,
    grade,
    read_answers,
    read_run,
    read_side_by_side,
    results_table,
    summarize,
)

ROOT = Path(__file__).resolve().parent
DEPLOYMENTS = ("cpu", "single_gpu", "single_node", "multi_node")
SET_HERE = ("output_dir", "model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path")
SECONDS_TO_STOP = 10


@dataclass(frozen=True)
class Stage:
    step: int  # as in --step
    title: str
    program: str  # below training/
    record: str = "run.json"  # what it leaves when it is done


# The keys are those of --sft.NAME and of summary.json.
STAGES = {
    "sft": Stage(1, "supervised fine-tuning", "step1_supervised_finetuning/main.py"),
    "reward": Stage(2, "reward model", "step2_reward_model_finetuning/main.py"),
    "ppo": Stage(3, "PPO", "step3_rlhf_finetuning/main.py"),
    "dpo": Stage(2, "DPO", "step2_dpo_finetuning/main.py"),
    "answers": Stage(3, "answers side by side", "step1_supervised_finetuning/prompt_eval.py", "summary.json"),
}
METHODS = {"ppo": ("sft", "reward", "ppo"), "dpo": ("sft", "dpo", "answers")}
# What of the stages before it a stage starts from.
NEEDS = {"sft": (), "reward": ("sft",), "ppo": ("sft", "reward"), "dpo": ("sft",), "answers": ("sft", "dpo")}


@dataclass(frozen=True)
class Model:
    path: str  # what a stage loads
    family: str  # its recipe is training_scripts/<family>/<deployment>/run_<size>.sh
    size: str
    name: str  # of its output directory


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):  # a stage has a process group of its own and must not outlive us
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    args = parse_args(sys.argv[1:])
    if args.list:
        print(f"--actor-model   {list_recipes('sft')}")
        print(f"--reward-model  sft, the output of step 1; {list_recipes('reward')}")
        return
    start = time.time()
    output, stages = Path(args.output_dir), [key for key in METHODS[args.method] if STAGES[key].step in args.step]
    actor = find_model(args.actor_model, "sft")
    sft = output / "actor-models" / actor.name
    from_sft = args.reward_model in ("sft", "toy")
    trained = replace(actor, path=str(sft))
    reward = trained if from_sft else find_model(args.reward_model, "reward")
    models = {"sft": actor, "reward": reward, "ppo": trained, "dpo": trained, "answers": trained}
    outputs = {"sft": sft, "reward": output / "reward-models" / reward.name, "answers": output / "answers"}
    outputs |= {"ppo": output / "step3-models" / actor.name, "dpo": output / "dpo-models" / actor.name}
    data = args.data_path or (["toy"] if actor.family == "toy" else None)
    deployment, launcher = choose_launcher(args.deployment_type, args.num_ranks)
    commands = {}
    for key in stages:
        flags = stage_flags(key, args, models[key], data, outputs)
        if key == "answers":
            commands[key] = [sys.executable, str(ROOT / "training" / STAGES[key].program), *flags]
        else:
            commands[key] = [str(find_recipe(key, models[key], deployment)), *flags]
    needed = {earlier for key in stages for earlier in NEEDS[key] if key != "reward" or from_sft}
    for key in sorted(needed - set(stages), key=lambda key: STAGES[key].step):
        if not (outputs[key] / STAGES[key].record).is_file():
            step = STAGES[key].step
            raise UserError(f"{outputs[key]} does not hold the output of step {step}; run --step {step} first")
    prepare_output_dir(str(output))
    (output / "summary.json").unlink(missing_ok=True)  # it tells of models that are replaced from here on

    seconds = {}
    for key, command in commands.items():
        title = f"[{STAGES[key].step}/3] {STAGES[key].title}"
        start_from = ", ".join(str(outputs[stage]) for stage in NEEDS[key]) if key == "answers" else models[key].path
        print(f"{title}: {start_from} -> {outputs[key]}", flush=True)
        seconds[key] = run_stage(key, command, outputs[key], output / f"error-{key}.txt", launcher)
        print(f"{title} done in {seconds[key]:.1f} s", flush=True)
    if 3 in args.step:
        finished = {key: outputs[key] for key in METHODS[args.method]}
        report(args.method, output, finished, seconds, time.time() - start)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--method", choices=METHODS, default="ppo", help="after step 1: reward model and PPO (default), or DPO")
    add("--step", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="stages to run (default: 1 2 3)")
    add("--actor-model", default="toy", help="toy (default), facebook/opt-1.3b or a model directory")
    add("--reward-model", default="sft", help="what step 2 starts from; sft (default): the output of step 1")
    add("--actor-zero-stage", type=int, choices=range(4), help="of step 1, DPO and PPO's actor; default: the recipe's")
    add("--reward-zero-stage", type=int, choices=range(4), help="of step 2 and the critic; default: the recipe's")
    add("--output-dir", "--output_dir", default="output", help="where everything goes (default: output)")
    add("--deployment-type", choices=DEPLOYMENTS, help="default: single_gpu where there is a GPU, else cpu")
    add("--num-ranks", type=int, help="processes (default: 1; single_node: one for each GPU)")
    add("--data-path", "--data_path", nargs="+", help="as the stages' --data_path (default with the toy model: toy)")
    add("--list", action="store_true", help="print the models and deployments that have recipes")
    known = {option for action in parser._actions for option in action.option_strings}
    for key in STAGES:
        for name, kind in flag_types(key).items():
            for flag, dest in ((f"--{key}.{name}", f"{key}.{name}"), (f"--{name}", f"all.{name}")):
                if flag not in known:
                    known.add(flag)
                    add_stage_flag(parser, flag, dest, kind)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse(next((word for word in unknown if word.startswith("--")), unknown[0]), known)
    check_owners(args)
    return args


def check_owners(args: argparse.Namespace) -> None:
    """Refuse a flag that no stage of this run takes."""
    stages = [key for key in METHODS[args.method] if STAGES[key].step in args.step]
    for dest in vars(args):
        prefix, dot, name = dest.partition(".")
        if not dot or prefix in stages or (prefix == "all" and any(name in flag_types(key) for key in stages)):
            continue
        owners = [key for key in STAGES if key == prefix or (prefix == "all" and name in flag_types(key))]
        if own := [key for key in owners if key in METHODS[args.method]]:
            if prefix == "all":
                steps = " and ".join(str(STAGES[key].step) for key in own)
                raise UserError(f"--{name} is a flag of step {steps}, which --step leaves out")
            continue  # a stage that --step leaves out may have flags of its own
        method = next(method for method, keys in METHODS.items() if owners[0] in keys)
        flag = name if prefix == "all" else dest
        raise UserError(f"--{flag} is a flag of --method {method}, not of {args.method}; drop it")


def add_stage_flag(parser: Parser, flag: str, dest: str, kind: str) -> None:
    options: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    if kind == "bool":
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = {"int": int, "float": float}.get(kind.removesuffix(" | None"), str)
        options["nargs"] = "+" if kind.startswith("list") else None
    parser.add_argument(flag, **options)


@functools.cache
def flag_types(key: str) -> dict[str, str]:
    """The flags of a stage's program that a user may give, read from its source: importing it would import torch."""
    sources = ("dschat/flags.py", "dschat/rlhf/flags.py", f"training/{STAGES[key].program}")
    nodes = [node for path in map(ROOT.joinpath, sources) for node in ast.parse(path.read_text(encoding="utf-8")).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}

    def fields(node: ast.ClassDef) -> dict[str, str]:
        found: dict[str, str] = {"config": "str"}
        for base in node.bases:
            found |= fields(classes[ast.unparse(base)])
        own = (item for item in node.body if isinstance(item, ast.AnnAssign))
        return found | {ast.unparse(item.target): ast.unparse(item.annotation) for item in own}

    return {name: kind for name, kind in fields(classes["Config"]).items() if name not in SET_HERE}


def refuse(word: str, known: set[str]) -> NoReturn:
    flag = word.split("=")[0]
    if flag.split(".")[-1].lstrip("-") in SET_HERE:
        raise UserError(f"{flag} is set here; use --actor-model, --reward-model and --output-dir")
    pool = [other for other in known if other.split(".")[0] == flag.split(".")[0]] or known  # first the same stage's
    close = difflib.get_close_matches(flag, pool, n=1) + difflib.get_close_matches(flag.replace("_", "-"), pool, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; see --help"
    raise UserError(f"unknown {'flag' if word.startswith('-') else 'argument'} {flag}{hint}")


def find_model(text: str, key: str) -> Model:
    if text == "toy":
        return Model("toy", "toy", "toy", "toy")
    if opt := re.fullmatch(r"(?:facebook/)?(?:opt-)?(\d+(?:\.\d+)?[mb])", text):
        return Model(f"facebook/opt-{opt[1]}", "opt", opt[1], f"opt-{opt[1]}")
    directory = Path(text).expanduser()
    if directory.is_dir():
        return Model(str(directory), "custom", "custom", directory.resolve().name)
    raise UserError(
        f"{text} is neither a directory nor a model with a recipe for step {STAGES[key].step}: {list_recipes(key)}"
    )


def recipes(key: str) -> Path:
    return (ROOT / "training" / STAGES[key].program).parent / "training_scripts"


def find_recipe(key: str, model: Model, deployment: str) -> Path:
    recipe = recipes(key) / model.family / deployment / f"run_{model.size}.sh"
    if not recipe.is_file():
        step = STAGES[key].step
        raise UserError(f"no recipe of step {step} for {model.name} on {deployment}; there are: {list_recipes(key)}")
    return recipe


def list_recipes(key: str) -> str:
    """As 'toy on cpu, single_gpu, single_node; …'."""
    found: dict[str, list[str]] = {}
    for deployment in DEPLOYMENTS:
        for script in sorted(recipes(key).glob(f"*/{deployment}/run_*.sh")):
            family, size = script.parts[-3], script.stem.removeprefix("run_")
            name = {"toy": "toy", "custom": "a model directory"}.get(family, f"facebook/{family}-{size}")
            found.setdefault(name, []).append(deployment)
    return "; ".join(f"{name} on {', '.join(deployments)}" for name, deployments in found.items())


def choose_launcher(deployment: str | None, num_ranks: int | None) -> tuple[str, str | None]:
    """The deployment type and the command that starts a stage; None: as the environment or the recipe says."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    has_gpu = visible and any(list(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "kfd", "dxg"))
    several = (num_ranks or 0) > 1
    deployment = deployment or ("cpu" if not has_gpu else "single_node" if several else "single_gpu")
    elsewhere = deployment == "multi_node" or bool(os.environ.get("DSCHAT_LAUNCH"))  # where the ranks are counted
    if num_ranks is not None and (elsewhere or num_ranks < 1 or (several and deployment == "single_gpu")):
        mend = "leave it out" if elsewhere else "give 1 or more; several GPUs are --deployment-type single_node"
        raise UserError(f"--num-ranks {num_ranks} does not go with {deployment} and its launcher: {mend}")
    if deployment in ("single_gpu", "single_node") and not has_gpu:
        print(f"no GPU found here: {deployment} will be slow", file=sys.stderr)
    if elsewhere:
        if not os.environ.get("DSCHAT_LAUNCH") and not Path("/job/hostfile").is_file():
            raise UserError('multi_node needs /job/hostfile, or DSCHAT_LAUNCH="deepspeed --hostfile FILE"')
        return deployment, None
    python = Path(sys.executable).name  # run_stage puts its folder, whose name may have spaces, first in PATH
    if num_ranks == 1 or (not several and deployment != "single_node"):
        return deployment, python
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ranks = f"--num_accelerators {num_ranks}" if num_ranks else ""  # else all
    return deployment, f"{python} -m deepspeed.launcher.runner --quiet {ranks} --master_port {port}"


def stage_flags(key: str, args: argparse.Namespace, model: Model, data: list[str] | None, outputs: dict) -> list[str]:
    """The words that follow a recipe's own flags; a stage takes the last of those given twice."""
    given = vars(args)
    flags: dict[str, Any] = {"output_dir": str(outputs[key]), "data_path": data}
    if key == "ppo":
        flags |= {"actor_model_name_or_path": str(outputs["sft"])}
        flags |= {"critic_model_name_or_path": str(outputs["reward"])}
        flags |= {"actor_zero_stage": args.actor_zero_stage, "critic_zero_stage": args.reward_zero_stage}
    elif key == "answers":
        flags |= {"model_name_or_path": [str(outputs["sft"]), str(outputs["dpo"])], "decoding": ["sample"]}
        flags |= {"eval_fraction": 0.1, "num_prompts": 300, "num_shown": 0}
    else:
        zero_stage = args.reward_zero_stage if key == "reward" else args.actor_zero_stage
        flags |= {"model_name_or_path": model.path, "zero_stage": zero_stage}
    for prefix in ("all", key):
        flags |= {name: given[f"{prefix}.{name}"] for name in flag_types(key) if f"{prefix}.{name}" in given}
    if model.family == "custom" and not (flags["data_path"] or flags.get("config")):
        raise UserError(f"--data-path is missing, such as --data-path mine.jsonl, or --{key}.data_path")
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run_stage(key: str, command: list[str], directory: Path, error_file: Path, launcher: str | None) -> float:
    """Run a stage, its output on our terminal. Seconds, or the end of the program with the stage's own error last."""
    error_file.unlink(missing_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PATH": path, "PYTHONPATH": modules, "DSCHAT_ERROR_FILE": str(error_file.absolute())}
    env |= {"DSCHAT_LAUNCH": launcher} if launcher else {}
    start = time.time()
    code = wait_for(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env, process_group=0))
    seconds = time.time() - start
    error = error_file.read_text(encoding="utf-8").rstrip() if error_file.is_file() else ""
    record = directory / STAGES[key].record
    if code == 0 and not error and record.is_file() and record.stat().st_mtime > start - 2:  # file systems round
        return seconds
    if code < 0:
        error = error or f"killed by {signal.Signals(-code).name}; out of memory is the usual cause"
    # of a user's mistake 2, whatever a launcher made of it
    code = 2 if error.startswith("error: ") else 128 - code if code < 0 else code or 1
    title = f"[{STAGES[key].step}/3] {STAGES[key].title}"
    print(f"{title} failed after {seconds:.1f} s with exit code {code}", file=sys.stderr)
    print(error or f"it left no {record}; its own last lines are above", file=sys.stderr, flush=True)
    sys.exit(code)


def wait_for(process: subprocess.Popen) -> int:
    """The exit code. However we leave, nothing of the process group stays behind."""
    try:
        return process.wait()
    except (KeyboardInterrupt, SystemExit) as stop:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
            process.wait(SECONDS_TO_STOP)
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def report(method: str, output: Path, outputs: dict[str, Path], seconds: dict[str, float], total: float) -> None:
    """Write summary.json and say what came out. The peak memory is that of the largest process, hence of one rank."""
    runs = {key: read_run(directory, STAGES[key].record) for key, directory in outputs.items()}
    earlier = {key: run["seconds"] for key, run in runs.items() if key not in seconds}  # as that run recorded
    times = {key: (seconds | earlier)[key] for key in runs} | {"total": total + sum(earlier.values())}
    if method == "ppo":
        config = runs["ppo"]["config"]
        is_toy = all(source.partition(":")[0] == "toy" for source in config["eval_data_path"] or config["data_path"])
        judge = toy.judge if is_toy else None
        graded = {name: grade(rows, judge) for name, rows in read_answers(outputs["ppo"]).items()}
    else:
        graded = read_side_by_side(outputs["answers"])
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9
    peak = max(children, *(run["peak_rss_gb"] for run in runs.values()))
    quality = read_quality(outputs["reward"] / QUALITY_FOLDER) if method == "ppo" else None
    summary = summarize(graded, runs, quality, times, peak)
    path = output / "summary.json"
    write_whole(path, json.dumps(summary, indent=2) + "\n")
    policy = outputs["ppo"] / "actor" if method == "ppo" else outputs["dpo"]
    chat = shlex.join(["python", os.path.relpath(ROOT / "chat.py"), "--path", str(policy)])
    ending = [f"written to {path}", f"chat: {chat}"]
    print("", results_table(summary, graded), "", before_and_after(graded), "", *ending, sep="\n", flush=True)


if __name__ == "__main__":
    run_program(main)
