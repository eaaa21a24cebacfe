"""A stage on two ranks, the second with room for few rows: `python -m tests.memory_driver ROWS STAGE FLAGS`."""

import sys

from dschat.engine import distributed
from dschat.errors import run_program
from tests.programs import program

import torch


def main() -> None:
    limit, stage, *argv = sys.argv[1:]
    module = program(stage)
    plain, calls = module.token_logits, []

    def limited(engine, model, ids, *rest):
        logits = plain(engine, model, ids, *rest)
        calls.append(len(ids))
        if torch.is_grad_enabled() and distributed.dist.get_rank() == 1 and len(calls) > 4 and len(ids) > int(limit):
            raise torch.OutOfMemoryError("CUDA out of memory")  # now the others begin their backward pass
        return logits

    module.token_logits = limited
    module.main(argv)


if __name__ == "__main__":
    run_program(main)
