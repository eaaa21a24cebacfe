"""RLHF in three stages on DeepSpeed: supervised fine-tuning, reward model, PPO."""

import os

# libgomp reads this once, when torch loads it: idle OpenMP threads then sleep instead of spinning, which on a
# shared CPU is the difference between 3 s and 30 s a step. Hence here, before any `import torch`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
