"""DeepSpeed and torch.distributed, known nowhere else."""

import logging

# On a machine without a GPU DeepSpeed warns, on import and on stdout, that it found none. Errors still pass.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
