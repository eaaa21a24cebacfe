"""All stages of RLHF in one command: supervised fine-tuning, reward model, PPO; then what it came to.

    python e2e_rlhf.py                                  the embedded task and model, on whatever machine this is
    python e2e_rlhf.py --method dpo                     DPO in place of reward model and PPO
    python e2e_rlhf.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m --deployment-type single_gpu
    python e2e_rlhf.py --actor-model ./my-model --data-path mine.jsonl --seed 3 --ppo.kl_coef 0.1
    python e2e_rlhf.py --actor-model opt-13b --deployment-type single_node --dry_run --plan_for 8x80

The flags of the stages' programs work here too: --NAME goes to every stage that has it; --sft.NAME, --reward.NAME,
--ppo.NAME, --dpo.NAME and --answers.NAME go to one stage and outweigh --NAME (`python
training/step1_supervised_finetuning/main.py --help` lists those of step 1). DSCHAT_LAUNCH in the environment replaces
the launcher: DSCHAT_LAUNCH="deepspeed --hostfile hosts".

A second start runs only what is not done: a stage that has not finished, and one whose flags, code, data or earlier
stage changed, each with the reason. --fresh runs all again. --dry_run says what memory and disk each stage needs, and
runs none (exit code 3: one does not fit); --plan_for 8x80 for other machines than this.
"""

import argparse
import difflib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from dschat.data import toy
from dschat.engine.launch import choose_launcher, wait_for
from dschat.errors import AGAIN, UserError, run_program
from dschat.report.metrics import prepare_output_dir, write_whole
from dschat.report.page import write_page
from dschat.report.picture import write_picture
from dschat.report.reward_quality import QUALITY_FOLDER, read_quality
from dschat.report.run_files import load_run
from dschat.report.stage_record import NO_EFFECT, Hashes, MadeFrom, StageRecord, code_hash, named_paths
from dschat.report.summary import (
    before_and_after,
    grade,
    read_answers,
    read_run,
    read_side_by_side,
    results_table,
    summarize,
)
from training.stages import (
    DEPLOYMENTS,
    METHODS,
    NEEDS,
    SET_HERE,
    STAGES,
    Model,
    find_model,
    find_recipe,
    flag_types,
    pairs_table,
    program,
)

ROOT = Path(__file__).resolve().parent


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):  # a stage has a process group of its own and must not outlive us
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    args = parse_args(sys.argv[1:])
    if args.list:
        print(*pairs_table(), "", "--reward-model sft (default): the output of step 1", sep="\n")
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
    if getattr(args, "all.dry_run", False):
        starts = {"sft": actor, "reward": actor if from_sft else reward, "ppo": actor, "dpo": actor}
        sys.exit(plan_stages([key for key in stages if key in starts], args, starts, data, outputs))
    deployment, launcher = choose_launcher(args.deployment_type, args.num_ranks)
    flags = {key: stage_flags(key, args, models[key], data, outputs) for key in stages}
    commands = {key: command(key, models[key], deployment, flags[key]) for key in stages}
    needs = {key: [stage for stage in NEEDS[key] if key != "reward" or from_sft] for key in stages}
    for key in sorted(set().union(*needs.values()) - set(stages), key=lambda key: STAGES[key].step):
        if not (outputs[key] / STAGES[key].record).is_file():
            step = STAGES[key].step
            raise UserError(f"{outputs[key]} does not hold the output of step {step}; run --step {step} first")
    prepare_output_dir(str(output))

    placed = placement(args, deployment, launcher)
    hashes = Hashes(leave_out=output)
    records = {key: StageRecord(outputs[key], hashes) for key in METHODS[args.method]}
    for key in stages:
        before = {f"step {STAGES[stage].step}": outputs[stage] for stage in needs[key]}
        made_from = provenance(key, flags[key], {} if key == "answers" else placed, before, hashes)
        if not args.fresh and (outputs[key] / STAGES[key].record).is_file() and records[key].is_done(made_from):
            print(f"step {STAGES[key].step}: done, as before ({outputs[key]})", flush=True)
            continue
        reasons, anew = (["--fresh"], True) if args.fresh else records[key].why_again(made_from)
        if reasons:
            print(f"step {STAGES[key].step} again: {'; '.join(reasons)}", flush=True)
        (output / "summary.json").unlink(missing_ok=True)  # it tells of models that are replaced from here on
        records[key].start(made_from, anew)
        title = f"[{STAGES[key].step}/3] {STAGES[key].title}"
        start_from = ", ".join(str(outputs[stage]) for stage in NEEDS[key]) if key == "answers" else models[key].path
        print(f"{title}: {start_from} -> {outputs[key]}", flush=True)
        words = [*commands[key], *["--fresh"] * (anew and "fresh" in flag_types(key))]
        seconds = run_stage(key, words, outputs[key], output / f"error-{key}.txt", launcher)
        records[key].finish(made_from, seconds, peak_rss_of_children())
        print(f"{title} done in {seconds:.1f} s", flush=True)
    if 3 in args.step:
        report(args.method, output, {key: outputs[key] for key in METHODS[args.method]}, records, time.time() - start)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--method", choices=METHODS, default="ppo", help="after step 1: reward model and PPO (default), or DPO")
    add("--step", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="stages to run (default: 1 2 3)")
    add("--actor-model", default="toy", help="toy (default), a name that --list prints, or a model directory")
    add("--reward-model", default="sft", help="what step 2 starts from; sft (default): the output of step 1")
    add("--actor-zero-stage", type=int, choices=range(4), help="of step 1, DPO and PPO's actor; default: the recipe's")
    add("--reward-zero-stage", type=int, choices=range(4), help="of step 2 and the critic; default: the recipe's")
    add("--output-dir", "--output_dir", default="output", help="where everything goes (default: output)")
    add("--deployment-type", choices=DEPLOYMENTS, help="default: single_gpu where there is a GPU, else cpu")
    add("--num-ranks", type=int, help="processes (default: 1; single_node: one for each GPU)")
    add("--data-path", "--data_path", nargs="+", help="as the stages' --data_path (default with the toy model: toy)")
    add("--fresh", action="store_true", help="run every stage again, from its start, also those that are done")
    add("--list", action="store_true", help="print the (model, deployment) pairs that have recipes")
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
    if getattr(args, "all.calibrate", 0):
        raise UserError("--calibrate is for one stage at a time: give it to the stage's own main.py")
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


def refuse(word: str, known: set[str]) -> NoReturn:
    flag = word.split("=")[0]
    if flag.split(".")[-1].lstrip("-") in SET_HERE:
        raise UserError(f"{flag} is set here; use --actor-model, --reward-model and --output-dir")
    pool = [other for other in known if other.split(".")[0] == flag.split(".")[0]] or known  # first the same stage's
    close = difflib.get_close_matches(flag, pool, n=1) + difflib.get_close_matches(flag.replace("_", "-"), pool, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; see --help"
    raise UserError(f"unknown {'flag' if word.startswith('-') else 'argument'} {flag}{hint}")


def stage_flags(
    key: str, args: argparse.Namespace, model: Model, data: list[str] | None, outputs: dict[str, Path]
) -> dict[str, Any]:
    """What follows a recipe's own flags, by name; a stage takes the last of those given twice."""
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
    return {name: value for name, value in flags.items() if value is not None}


def command(key: str, model: Model, deployment: str, flags: dict[str, Any]) -> list[str]:
    """A list for the operating system: no shell reads it."""
    start = [sys.executable, program(key)] if key == "answers" else [find_recipe(key, model, deployment)]
    words = [str(word) for word in start]
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def plan_stages(
    stages: list[str],
    args: argparse.Namespace,
    starts: dict[str, Model],
    data: list[str] | None,
    outputs: dict[str, Path],
) -> int:
    """The plan of each stage, as if the stages before it had left models of the shapes that they start from; the
    largest exit code."""
    deployment = args.deployment_type or choose_launcher(None, args.num_ranks)[0]
    codes = [0]
    for key in stages:
        flags = stage_flags(key, args, starts[key], data or ["as the recipe says"], outputs)
        if data is None:
            del flags["data_path"]
        if key == "ppo":
            paths = starts["sft"].path, starts["reward"].path
            flags |= dict(zip(("actor_model_name_or_path", "critic_model_name_or_path"), paths, strict=True))
        if args.num_ranks and "plan_for" not in flags:
            flags["plan_for"] = args.num_ranks
        print(f"[{STAGES[key].step}/3] {STAGES[key].title}: {starts[key].name} on {deployment}", flush=True)
        env = stage_environment() | {"DSCHAT_LAUNCH": Path(sys.executable).name}
        words = command(key, starts[key], deployment, flags)
        codes.append(wait_for(subprocess.Popen(words, stdin=subprocess.DEVNULL, env=env, process_group=0)))
        print(flush=True)
    return max(codes)


def stage_environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PATH": path, "PYTHONPATH": modules}


def placement(args: argparse.Namespace, deployment: str, launcher: str | None) -> dict[str, str]:
    """What of the machine goes into a result: the recipe and, as batch sizes are those of one rank, how many."""
    if launcher is None:
        ranks = {"DSCHAT_LAUNCH": os.environ.get("DSCHAT_LAUNCH", "")}
    else:
        ranks = {"--num-ranks": str(args.num_ranks or ("all" if deployment == "single_node" else 1))}
    return {"--deployment-type": deployment} | ranks


def provenance(
    key: str, flags: dict[str, Any], placed: dict[str, str], before: dict[str, Path], hashes: Hashes
) -> MadeFrom:
    """What the output of a stage is made from, as things are now."""
    shown, inputs = dict(placed), {name: hashes.of(directory) for name, directory in before.items()}
    for name, value in flags.items():
        words = [str(word) for word in (value if isinstance(value, list) else [value])]
        if name in NO_EFFECT or set(map(Path, words)) <= set(before.values()):
            continue
        shown[f"--{name}"] = shlex.join(words)
        label = "data" if name.endswith("data_path") else f"--{name}"
        inputs |= {
            f"{label} {path}": hashes.of(Path(path).expanduser()) for word in words for path in named_paths(word)
        }
    return MadeFrom(shown, code_hash(ROOT, program(key)), inputs)


def run_stage(key: str, command: list[str], directory: Path, error_file: Path, launcher: str | None) -> float:
    """Run a stage, its output on our terminal. Seconds, or the end of the program with the stage's own error last."""
    title = f"[{STAGES[key].step}/3] {STAGES[key].title}"
    env = stage_environment() | {"DSCHAT_ERROR_FILE": str(error_file.absolute())}
    env |= {"DSCHAT_LAUNCH": launcher} if launcher else {}
    start = time.time()
    while True:
        error_file.unlink(missing_ok=True)
        code = wait_for(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env, process_group=0))
        error = error_file.read_text(encoding="utf-8").rstrip() if error_file.is_file() else ""
        if not error.startswith(AGAIN):
            break
        print(f"{title}: started again after: {error.removeprefix(AGAIN)}", flush=True)
        command = [word for word in command if word != "--fresh"]
    seconds = time.time() - start
    record = directory / STAGES[key].record
    if code == 0 and not error and record.is_file() and record.stat().st_mtime > start - 2:  # file systems round
        return seconds
    if code < 0:
        error = error or f"killed by {signal.Signals(-code).name}; out of memory is the usual cause"
    # of a user's mistake 2, whatever a launcher made of it
    code = 2 if error.startswith("error: ") else 128 - code if code < 0 else code or 1
    print(f"{title} failed after {seconds:.1f} s with exit code {code}", file=sys.stderr)
    print(error or f"it left no {record}; its own last lines are above", file=sys.stderr, flush=True)
    sys.exit(code)


def peak_rss_of_children() -> float:
    """Of the largest process below the stages that ran, hence of one rank, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9


def report(
    method: str, output: Path, outputs: dict[str, Path], records: dict[str, StageRecord], seconds: float
) -> None:
    """Write summary.json and report.html and say what came out; a stage that was done before counts as it was then."""
    runs = {key: read_run(directory, STAGES[key].record) for key, directory in outputs.items()}
    known = {key: records[key].done or run for key, run in runs.items()}  # a stage may have run without this program
    times = {key: record["seconds"] for key, record in known.items()}
    earlier = sum(times[key] for key, record in records.items() if not record.is_of_now)
    times["total"] = seconds + earlier
    if method == "ppo":
        config = runs["ppo"]["config"]
        is_toy = all(source.partition(":")[0] == "toy" for source in config["eval_data_path"] or config["data_path"])
        judge = toy.judge if is_toy else None
        graded = {name: grade(rows, judge) for name, rows in read_answers(outputs["ppo"]).items()}
    else:
        graded = read_side_by_side(outputs["answers"])
    peak = max(record["peak_rss_gb"] for record in [*runs.values(), *known.values()])
    quality = read_quality(outputs["reward"] / QUALITY_FOLDER) if method == "ppo" else None
    summary = summarize(graded, runs, quality, times, peak)
    path = output / "summary.json"
    write_whole(path, json.dumps(summary, indent=2) + "\n")
    policy = outputs["ppo"] / "actor" if method == "ppo" else outputs["dpo"]
    chat = shlex.join(["python", os.path.relpath(ROOT / "chat.py"), "--path", str(policy)])
    run = load_run(output, {key: outputs[key] for key in runs if key != "answers"})
    write_page(output / "report.html", [run])
    write_picture(output / "report.png", [run])
    ending = [f"written to {path}", f"report: {output / 'report.html'}", f"chat: {chat}"]
    print("", results_table(summary, graded), "", before_and_after(graded), "", *ending, sep="\n", flush=True)


if __name__ == "__main__":
    run_program(main)
