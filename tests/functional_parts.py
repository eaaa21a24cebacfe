"""What the tests of the losses share."""

import pytest
import torch


def assert_stats(stats, **expected):
    """Exactly these statistics, each a float32 scalar outside the graph."""
    assert set(stats) == set(expected)
    for name, value in expected.items():
        assert stats[name].item() == pytest.approx(value, rel=1e-5, abs=1e-7), name
        assert stats[name].dtype == torch.float32
        assert stats[name].dim() == 0
        assert not stats[name].requires_grad
