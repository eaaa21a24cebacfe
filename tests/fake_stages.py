"""Stand-ins for the stages of e2e_rlhf.py, which leave the records of real ones in no time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "e2e_rlhf.py"

# A stage that notes its flags in calls.jsonl and leaves what report() reads; $FAKE says how it fails.
FAKE_STAGE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
program, flags = Path(sys.argv[1]).resolve(), sys.argv[2:]
is_answers, is_dpo = program.name == "prompt_eval.py", "dpo" in program.parent.name
step = 3 if is_answers else int(program.parent.name[4])
names = {"GOMP_SPINCOUNT", "PYTHONPATH"}
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps([step, flags, {name: os.environ.get(name) for name in names}]) + "\\n")
def values(name):
    if name not in flags:
        return []
    start = len(flags) - flags[::-1].index(name)
    end = next((i for i in range(start, len(flags)) if flags[i].startswith("--")), None)
    return flags[start:end]
failure, _, at = os.environ.get("FAKE", "").partition("@")
error = Path(os.environ["DSCHAT_ERROR_FILE"]) if "DSCHAT_ERROR_FILE" in os.environ else None
if failure == "again" and step == int(at) and not Path("again").exists():
    Path("again").touch()
    error.write_text("start again: rank 1: out of memory")
    sys.exit(1)
if failure and failure != "again" and step == int(at):
    print("noise of a library", file=sys.stderr)
    if failure in ("user", "crash"):
        error.write_text("error: no disk" if failure == "user" else "Trace\\nboom")
        print("launcher: rank 0 ended", file=sys.stderr)
        sys.exit(5)
    if failure == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if failure == "nothing":
        sys.exit(0)
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    Path("pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)
time.sleep(0.1)
output = Path(values("--output_dir")[0])
output.mkdir(parents=True, exist_ok=True)
made = output / "actor" if step == 3 else output
made.mkdir(exist_ok=True)
(made / "model.safetensors").write_text(str([values("--seed"), values("--learning_rate"), values("--kl_coef")]))
metrics = {2: {"eval/accuracy": 0.75, "eval/accuracy_low": 0.30064, "eval/accuracy_high": 0.95441,
               "eval/num_pairs": 4.0}, 3: {"eval/kl_per_seq": 3.125}}
config = {name: values(f"--{name}") for name in ("data_path", "eval_data_path")}
run = {"config": config, "metrics": metrics.get(step, {}), "seconds": 10.0 * step, "peak_rss_gb": 50.0 + step}
if is_dpo:
    run["metrics"] = metrics[2]
(output / ("summary.json" if is_answers else "run.json")).write_text(json.dumps(run))
if is_answers:
    asked = ["What is the capital of France?", "What colour is a lemon?"]
    with open(output / "answers.jsonl", "w") as file:
        for model, text in (("sft", "Berlin."), ("dpo", "Paris.")):
            for prompt in asked:
                right = "--data_path toy" in " ".join(flags) and "France" in prompt and text == "Paris."
                row = {"model": model, "decoding": "sample", "prompt": prompt, "response": text, "score": None}
                judged = "--data_path toy" in " ".join(flags)
                row |= {"judge": 1.5 if right else -0.5 if judged else None, "correct": right if judged else None}
                file.write(json.dumps(row) + "\\n")
elif step == 3:
    is_toy = (config["eval_data_path"] or config["data_path"]) == ["toy"]
    asked = ["What is the capital of France?", "What colour is a lemon?"] if is_toy else ["a", "b"]
    rows = [(0, "policy", "Paris.", 1), (0, "best_of_8", "Berlin.", 3), (2, "policy", "x", 9), (4, "policy", "?", 2)]
    with open(output / "samples.jsonl", "w") as file:
        for at, kind, response, score in rows:
            for number, prompt in enumerate(asked):
                row = {"step": at, "kind": kind, "prompt": prompt, "response": response}
                row["score"] = score - 3 * number * at
                file.write(json.dumps(row) + "\\n")
"""


def stand_ins(tmp_path):
    """What runs e2e_rlhf.py in a folder with a space in its name; ``fake`` is how and where a stage fails."""
    (tmp_path / "fake.py").write_text(FAKE_STAGE)
    folder = tmp_path / "my runs"
    folder.mkdir()
    launch = f"{Path(sys.executable)} {tmp_path / 'fake.py'}"
    stub = tmp_path / "python"  # for the one program that is started without a launcher
    stub.write_text(f'#!/bin/sh\nexec {launch} "$@"\n')
    stub.chmod(0o755)
    start = f"import sys; sys.argv[0] = {str(PROGRAM)!r}; sys.path.insert(0, {str(ROOT)!r}); import e2e_rlhf; "
    start += f"sys.executable = {str(stub)!r}; e2e_rlhf.run_program(e2e_rlhf.main)"

    def call(*flags, fake="", wait=True):
        env = {name: text for name, text in os.environ.items() if name not in ("GOMP_SPINCOUNT", "PYTHONPATH")}
        env |= {"DSCHAT_LAUNCH": launch, "FAKE": fake}
        options = {"cwd": folder, "env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # off in background jobs
        process = subprocess.Popen([sys.executable, "-c", start, *map(str, flags)], **options)
        if not wait:
            return process
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(flags, process.returncode, out, err)

    call.folder = folder
    return call


def calls(run):
    lines = (run.folder / "calls.jsonl").read_text().splitlines()
    return {step: (flags, env) for step, flags, env in map(json.loads, lines)}


def value(flags, name):
    """What a stage takes: the last of a flag given twice."""
    return flags[len(flags) - flags[::-1].index(name)]
