"""All three stages of RLHF in one command: supervised fine-tuning, reward model, PPO; then what it came to.

    python e2e_rlhf.py                                  the embedded task and model, on whatever machine this is
    python e2e_rlhf.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m --deployment-type single_gpu
    python e2e_rlhf.py --actor-model ./my-model --data-path mine.jsonl --seed 3 --ppo.kl_coef 0.1

The flags of the stages' programs work here too: --NAME goes to every stage that has it; --sft.NAME, --reward.NAME and
--ppo.NAME go to one stage and outweigh --NAME (`python training/step1_supervised_finetuning/main.py --help` lists
those of step 1). DSCHAT_LAUNCH in the environment replaces the launcher: DSCHAT_LAUNCH="deepspeed --hostfile hosts".
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
from dschat.report.metrics import prepare_output_dir
from dschat.report.summary import before_and_after, grade, read_answers, read_run, results_table, summarize

ROOT = Path(__file__).resolve().parent
FOLDERS = {1: "step1_supervised_finetuning", 2: "step2_reward_model_finetuning", 3: "step3_rlhf_finetuning"}
KEYS = {1: "sft", 2: "reward", 3: "ppo"}  # as in --sft.NAME and in summary.json
TITLES = {1: "supervised fine-tuning", 2: "reward model", 3: "PPO"}
DEPLOYMENTS = ("cpu", "single_gpu", "single_node", "multi_node")
SET_HERE = ("output_dir", "model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path")
SECONDS_TO_STOP = 10


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
        print(f"--actor-model   {list_recipes(1)}\n--reward-model  sft, the output of step 1; {list_recipes(2)}")
        return
    start = time.time()
    steps, output = sorted(set(args.step)), Path(args.output_dir)
    actor = find_model(args.actor_model, 1)
    sft = output / "actor-models" / actor.name
    from_sft = args.reward_model in ("sft", "toy")
    reward = replace(actor, path=str(sft)) if from_sft else find_model(args.reward_model, 2)
    models = {1: actor, 2: reward, 3: replace(actor, path=str(sft))}
    outputs = {1: sft, 2: output / "reward-models" / reward.name, 3: output / "step3-models" / actor.name}
    data = args.data_path or (["toy"] if actor.family == "toy" else None)
    deployment, launcher = choose_launcher(args.deployment_type, args.num_ranks)
    commands = {}
    for step in steps:
        recipe = find_recipe(step, models[step], deployment)
        commands[step] = [str(recipe), *stage_flags(step, args, models[step], data, outputs)]
    needed = {1, 2} if 3 in steps else {1} if from_sft else set()
    for step in sorted(needed - set(steps)):
        if not (outputs[step] / "run.json").is_file():
            raise UserError(f"{outputs[step]} does not hold the output of step {step}; run --step {step} first")
    prepare_output_dir(str(output))
    (output / "summary.json").unlink(missing_ok=True)  # it tells of models that are replaced from here on

    seconds = {}
    for step, command in commands.items():
        print(f"[{step}/3] {TITLES[step]}: {models[step].path} -> {outputs[step]}", flush=True)
        seconds[step] = run_stage(step, command, outputs[step], output / f"error-{KEYS[step]}.txt", launcher)
        print(f"[{step}/3] {TITLES[step]} done in {seconds[step]:.1f} s", flush=True)
    if 3 in steps:
        report(output, outputs, seconds, time.time() - start)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--step", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="stages to run (default: 1 2 3)")
    add("--actor-model", default="toy", help="toy (default), facebook/opt-1.3b or a model directory")
    add("--reward-model", default="sft", help="what step 2 starts from; sft (default): the output of step 1")
    add("--actor-zero-stage", type=int, choices=range(4), help="of step 1 and step 3's actor; default: the recipe's")
    add("--reward-zero-stage", type=int, choices=range(4), help="of step 2 and the critic; default: the recipe's")
    add("--output-dir", "--output_dir", default="output", help="where everything goes (default: output)")
    add("--deployment-type", choices=DEPLOYMENTS, help="default: single_gpu where there is a GPU, else cpu")
    add("--num-ranks", type=int, help="processes (default: 1; single_node: one for each GPU)")
    add("--data-path", "--data_path", nargs="+", help="as the stages' --data_path (default with the toy model: toy)")
    add("--list", action="store_true", help="print the models and deployments that have recipes")
    known = {option for action in parser._actions for option in action.option_strings}
    for step, key in KEYS.items():
        for name, kind in flag_types(step).items():
            for flag, dest in ((f"--{key}.{name}", f"{key}.{name}"), (f"--{name}", f"all.{name}")):
                if flag not in known:
                    known.add(flag)
                    add_stage_flag(parser, flag, dest, kind)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse(next((word for word in unknown if word.startswith("--")), unknown[0]), known)
    for name in (dest.removeprefix("all.") for dest in vars(args) if dest.startswith("all.")):
        if not any(name in flag_types(step) for step in args.step):
            owners = " and ".join(str(step) for step in KEYS if name in flag_types(step))
            raise UserError(f"--{name} is a flag of step {owners}, which --step leaves out")
    return args


def add_stage_flag(parser: Parser, flag: str, dest: str, kind: str) -> None:
    options: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    if kind == "bool":
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = {"int": int, "float": float}.get(kind.removesuffix(" | None"), str)
        options["nargs"] = "+" if kind.startswith("list") else None
    parser.add_argument(flag, **options)


@functools.cache
def flag_types(step: int) -> dict[str, str]:
    """The flags of a stage's program that a user may give, read from its source: importing it would import torch."""
    sources = ("dschat/flags.py", "dschat/rlhf/flags.py", f"training/{FOLDERS[step]}/main.py")
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


def find_model(text: str, step: int) -> Model:
    if text == "toy":
        return Model("toy", "toy", "toy", "toy")
    if opt := re.fullmatch(r"(?:facebook/)?(?:opt-)?(\d+(?:\.\d+)?[mb])", text):
        return Model(f"facebook/opt-{opt[1]}", "opt", opt[1], f"opt-{opt[1]}")
    directory = Path(text).expanduser()
    if directory.is_dir():
        return Model(str(directory), "custom", "custom", directory.resolve().name)
    raise UserError(f"{text} is neither a directory nor a model with a recipe for step {step}: {list_recipes(step)}")


def find_recipe(step: int, model: Model, deployment: str) -> Path:
    scripts = ROOT / "training" / FOLDERS[step] / "training_scripts"
    recipe = scripts / model.family / deployment / f"run_{model.size}.sh"
    if not recipe.is_file():
        raise UserError(f"no recipe of step {step} for {model.name} on {deployment}; there are: {list_recipes(step)}")
    return recipe


def list_recipes(step: int) -> str:
    """As 'toy on cpu, single_gpu, single_node; …'."""
    found: dict[str, list[str]] = {}
    for deployment in DEPLOYMENTS:
        for script in sorted((ROOT / "training" / FOLDERS[step]).glob(f"training_scripts/*/{deployment}/run_*.sh")):
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


def stage_flags(step: int, args: argparse.Namespace, model: Model, data: list[str] | None, outputs: dict) -> list[str]:
    """The words that follow a recipe's own flags; a stage takes the last of those given twice."""
    given, key = vars(args), KEYS[step]
    flags: dict[str, Any] = {"output_dir": str(outputs[step]), "data_path": data}
    if step == 3:
        flags |= {"actor_model_name_or_path": str(outputs[1]), "critic_model_name_or_path": str(outputs[2])}
        flags |= {"actor_zero_stage": args.actor_zero_stage, "critic_zero_stage": args.reward_zero_stage}
    else:
        zero_stage = args.actor_zero_stage if step == 1 else args.reward_zero_stage
        flags |= {"model_name_or_path": model.path, "zero_stage": zero_stage}
    for prefix in ("all", key):
        flags |= {name: given[f"{prefix}.{name}"] for name in flag_types(step) if f"{prefix}.{name}" in given}
    if model.family == "custom" and not (flags["data_path"] or flags.get("config")):
        raise UserError(f"--data-path is missing, such as --data-path mine.jsonl, or --{key}.data_path")
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run_stage(step: int, command: list[str], directory: Path, error_file: Path, launcher: str | None) -> float:
    """Run a recipe, its output on our terminal. Seconds, or the end of the program with the stage's own error last."""
    error_file.unlink(missing_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PATH": path, "PYTHONPATH": modules, "DSCHAT_ERROR_FILE": str(error_file.absolute())}
    env |= {"DSCHAT_LAUNCH": launcher} if launcher else {}
    start = time.time()
    code = wait_for(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env, process_group=0))
    seconds = time.time() - start
    error = error_file.read_text(encoding="utf-8").rstrip() if error_file.is_file() else ""
    record = directory / "run.json"
    if code == 0 and not error and record.is_file() and record.stat().st_mtime > start - 2:  # file systems round
        return seconds
    if code < 0:
        error = error or f"killed by {signal.Signals(-code).name}; out of memory is the usual cause"
    # of a user's mistake 2, whatever a launcher made of it
    code = 2 if error.startswith("error: ") else 128 - code if code < 0 else code or 1
    print(f"[{step}/3] {TITLES[step]} failed after {seconds:.1f} s with exit code {code}", file=sys.stderr)
    print(error or f"it left no model in {directory}; its own last lines are above", file=sys.stderr, flush=True)
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


def report(output: Path, outputs: dict[int, Path], seconds: dict[int, float], total: float) -> None:
    """Write summary.json and say what came out. The peak memory is that of the largest process, hence of one rank."""
    runs = {step: read_run(directory) for step, directory in outputs.items()}
    earlier = {step: run["seconds"] for step, run in runs.items() if step not in seconds}  # as that run recorded
    times = {KEYS[step]: (seconds | earlier)[step] for step in runs} | {"total": total + sum(earlier.values())}
    config = runs[3]["config"]
    is_toy = all(source.partition(":")[0] == "toy" for source in config["eval_data_path"] or config["data_path"])
    judge = toy.judge if is_toy else None
    graded = {name: grade(rows, judge) for name, rows in read_answers(outputs[3] / "samples.jsonl").items()}
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9
    peak = max(children, *(run["peak_rss_gb"] for run in runs.values()))
    summary = summarize(graded, runs[2], runs[3], times, peak)
    path = output / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    chat = shlex.join(["python", os.path.relpath(ROOT / "chat.py"), "--path", str(outputs[3] / "actor")])
    ending = [f"written to {path}", f"chat: {chat}"]
    print("", results_table(summary, graded), "", before_and_after(graded), "", *ending, sep="\n", flush=True)


if __name__ == "__main__":
    run_program(main)
