"""The run state on two ranks at every ZeRO stage, and on another number of ranks than the one that wrote it."""

import json
import shutil

from tests.ranks import launch

import pytest
import torch

DRIVER = "tests.resume_driver"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(root):
    """Results by number of ranks and case."""
    launch(DRIVER, 2, str(root), ",".join(f"write:{stage}" for stage in range(4)))
    for stage in range(4):  # the checkpoint of step 3 is the one to go on from
        shutil.rmtree(root / f"zero{stage}" / "checkpoints" / "step_00000006")
        shutil.copytree(root / f"zero{stage}", root / "one" / f"zero{stage}")
    launch(DRIVER, 2, str(root), ",".join(["read:0:0", "read:1:1", "read:2:2", "read:3:3", "fail"]))
    launch(DRIVER, 1, str(root / "one"), ",".join(f"read:{was}:{now}" for was in range(4) for now in range(4)))
    files = {2: [root / "ranks2-write-0.json", root / "ranks2-read-0-0.json"]}
    files[1] = [root / "one" / "ranks1-read-0-0.json"]
    return {ranks: {k: v for path in paths for k, v in json.loads(path.read_text()).items()}
            for ranks, paths in files.items()}  # fmt: skip


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_go_on_bit_for_bit(found, stage):
    whole, continued = found[2][f"write:{stage}"], found[2][f"read:{stage}:{stage}"]
    assert len(continued) == 7 and continued == whole[6:]
    assert len(set(whole)) == len(whole)  # everything moves


@pytest.mark.parametrize("stage", range(4))
def test_no_rank_writes_what_is_frozen(found, root, stage):
    files = sorted((root / f"zero{stage}" / "checkpoints" / "step_00000003").rglob("*model_states.pt"))
    assert len(files) == (2 if stage == 3 else 1)
    for file in files:
        saved = torch.load(file, weights_only=True)
        assert {name.split(".")[0] for name in saved["module"]} == {"layers"}
        assert not saved["frozen_param_fragments"]


@pytest.mark.parametrize("now", range(4))
@pytest.mark.parametrize("was", range(4))
def test_one_rank_goes_on_where_two_were(found, was, now):
    """Losses and the average up to rounding, the generator exactly; matrices decay, vectors do not."""
    assert found[1][f"read:{was}:{now}"] == pytest.approx(found[2][f"write:{was}"][6:], rel=1e-6)


def test_one_rank_that_cannot_write_leaves_the_others_in_no_collective(found):
    first, said, second, names = found[2]["fail"]
    assert first is False and second is True and names == ["step_00000000"]
    assert len(said) == 1 and "No space left on device" in said[0]
