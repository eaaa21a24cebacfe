"""RLHF in three stages on DeepSpeed: supervised fine-tuning, reward model, PPO."""

import os

# libgomp reads this once, when torch loads it, hence here, before any `import torch`. Idle OpenMP threads spin for a
# moment and then sleep. Spinning without end, the default, makes a step on a shared CPU ten times slower and more;
# never spinning (OMP_WAIT_POLICY=PASSIVE) makes it 1.4 times slower on an idle one: benchmarks/openmp_spin.py.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
