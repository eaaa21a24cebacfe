"""RLHF in three stages on DeepSpeed: supervised fine-tuning, reward model, PPO."""

import os

# libgomp reads this once, when torch loads it, hence here, before any `import torch`. Idle OpenMP threads spin for a
# moment and then sleep. Spinning on, the default, made a step beside a busy neighbour 16 times slower than this on two
# cores; never spinning (OMP_WAIT_POLICY=PASSIVE) made it twice as slow on idle ones: benchmarks/openmp_spin.py.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
