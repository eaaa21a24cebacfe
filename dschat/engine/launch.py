"""How a program is started: on which kind of machine, behind which launcher, and nothing of it left at the end."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from dschat.errors import UserError

SECONDS_TO_STOP = 300  # a program that is asked to stop writes a checkpoint first; a second signal stops it at once


def choose_launcher(deployment: str | None, num_ranks: int | None) -> tuple[str, str | None]:
    """The deployment type and the command that starts a stage; None: as the environment or the recipe says."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    has_gpu = visible and any(list(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "kfd", "dxg"))
    several = (num_ranks or 0) > 1
    deployment = deployment or ("cpu" if not has_gpu else "single_node" if several else "single_gpu")
    elsewhere = deployment == "multi_node" or bool(os.environ.get("DSCHAT_LAUNCH"))  # where the ranks are counted
    if num_ranks is not None and (elsewhere or num_ranks < 1 or (several and deployment == "single_gpu")):
        mend = "leave it out" if elsewhere else "give 1 or more; several GPUs are --deployment-type single_node"
        raise UserError(f"--num-ranks {num_ranks} does not go with {deployment} and its launcher: {mend}")
    if deployment in ("single_gpu", "single_node") and not has_gpu:
        print(f"no GPU found here: {deployment} will be slow", file=sys.stderr)
    if elsewhere:
        if not os.environ.get("DSCHAT_LAUNCH") and not Path("/job/hostfile").is_file():
            raise UserError('multi_node needs /job/hostfile, or DSCHAT_LAUNCH="deepspeed --hostfile FILE"')
        return deployment, None
    python = Path(sys.executable).name  # `run_words` puts its folder, whose name may have spaces, first in PATH
    if num_ranks == 1 or (not several and deployment != "single_node"):
        return deployment, python
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ranks = f"--num_accelerators {num_ranks}" if num_ranks else ""  # else all
    return deployment, f"{python} -m deepspeed.launcher.runner --quiet {ranks} --master_port {port}"


def wait_for(process: subprocess.Popen) -> int:
    """The exit code. However we leave, nothing of the process group stays behind."""
    try:
        return process.wait()
    except (KeyboardInterrupt, SystemExit) as stop:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
            process.wait(SECONDS_TO_STOP)
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
