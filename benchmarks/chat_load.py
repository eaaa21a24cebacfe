"""`chat.py --serve` under load: nothing lost, nothing mixed up, flat memory, time to the first token, start-up.

    python e2e_rlhf.py --step 1
    python benchmarks/chat_load.py --path output/actor-models/toy

Fifty requests, each with a question and a seed of its own, are asked one by one, then all at once again and again. A
seed fixes an answer, so each must come out as it did alone. Memory is the server's resident set. The start-up is that
of the terminal chat, from the command to the prompt "you>".
"""

import argparse
import os
import pty
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from dschat.data.toy import questions

from openai import OpenAI
from programs import ROOT

AT_ONCE = 50
CHAT = [sys.executable, str(ROOT / "chat.py")]


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def start_up_seconds(path: str) -> float:
    begin = time.perf_counter()
    process, terminal = pty.fork()
    if process == 0:
        os.environ["PROMPT_TOOLKIT_NO_CPR"] = "1"
        os.execv(sys.executable, [*CHAT, "--path", path])
    seen = b""
    while b"you>" not in seen:
        if not select.select([terminal], [], [], 120)[0]:
            sys.exit(f"no prompt: {seen[-300:]!r}")
        seen += os.read(terminal, 4096)
    seconds = time.perf_counter() - begin
    os.write(terminal, b"\x04")
    os.waitpid(process, 0)
    return seconds


def first_token_ms(client: OpenAI, model: str, question: str, seed: int) -> float:
    begin = time.perf_counter()
    messages = [{"role": "user", "content": question}]
    stream = client.chat.completions.create(model=model, messages=messages, seed=seed, stream=True)
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            break
    found = 1000 * (time.perf_counter() - begin)
    stream.close()
    return found


def load(client: OpenAI, model: str, pid: int, num_requests: int) -> None:
    asked = [(question, seed) for seed, (_, question) in enumerate(questions("eval")[:AT_ONCE])]

    def ask(pair: tuple[str, int]) -> str | None:
        messages = [{"role": "user", "content": pair[0]}]
        return client.chat.completions.create(model=model, messages=messages, seed=pair[1]).choices[0].message.content

    alone = [ask(pair) for pair in asked]
    wrong, sizes, seconds = 0, [], []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in range(num_requests // AT_ONCE):
            begin = time.perf_counter()
            wrong += sum(a != b for a, b in zip(pool.map(ask, asked), alone, strict=True))
            seconds.append(time.perf_counter() - begin)
            sizes.append(resident_mb(pid))
    count = len(sizes) * AT_ONCE
    print(f"{count} requests, {AT_ONCE} at once: {count} answered, {wrong} other than alone")
    some = ", ".join(f"{sizes[place]:.0f}" for place in (0, len(sizes) // 2, -1))
    print(f"resident MB after {AT_ONCE}, after half and after all of them: {some}")
    print(f"{AT_ONCE} at once take {median(seconds):.2f} s (median of {len(seconds)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="output/actor-models/toy")
    parser.add_argument("--requests", type=int, default=1000)
    args = parser.parse_args()
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"start-up of the terminal chat: {start_up_seconds(args.path):.1f} s")
    command = [*CHAT, "--path", args.path, "--serve", "--port", "0", "--max_new_tokens", "40"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = next(line.split()[1] for line in server.stdout if line.startswith("API:"))
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        (model,) = (found.id for found in client.models.list())
        times = [first_token_ms(client, model, question, 0) for _, question in questions("eval")[:20]]
        print(f"first token after {median(times):.0f} ms (median of {len(times)}), {times[0]:.0f} the first time")
        load(client, model, server.pid, args.requests)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
