"""How OpenMP's waiting changes a training step of the embedded model on a CPU: alone, and beside a copy of itself.

    python benchmarks/openmp_spin.py

The ratios are what matters; dschat/__init__.py sets what wins.
"""

import os
import subprocess
import sys

STEP = """
import time, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=1197, hidden_size=96, intermediate_size=288, num_hidden_layers=4,
                                     num_attention_heads=4, tie_word_embeddings=True))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
ids = torch.randint(0, 1197, (32, 40))
def step():
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
for _ in range(5):
    step()
start = time.time()
for _ in range(20):
    step()
print((time.time() - start) / 20)
"""
SETTINGS = {
    "the default": {},
    **{f"GOMP_SPINCOUNT={turns}": {"GOMP_SPINCOUNT": str(turns)} for turns in (1000, 3000, 10_000)},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def seconds_per_step(setting: dict[str, str], copies: int) -> float:
    """The slowest of ``copies`` processes that run the same steps at the same time."""
    base = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-W", "ignore", "-c", STEP]
    running = [subprocess.Popen(command, env=base | setting, stdout=subprocess.PIPE, text=True) for _ in range(copies)]
    return max(float(process.communicate()[0]) for process in running)


def main() -> None:
    print(f"{'setting':28}{'alone, ms':>12}{'beside a copy, ms':>20}")
    for name, setting in SETTINGS.items():
        alone, beside = (1000 * seconds_per_step(setting, copies) for copies in (1, 2))
        print(f"{name:28}{alone:12.1f}{beside:20.1f}")


if __name__ == "__main__":
    main()
