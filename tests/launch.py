"""Starting the processes of a test, and ending them whatever happens."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "100",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ALONE = [sys.executable]


@contextmanager
def started(command):
    """A command in a process group of its own, which is killed in the end, launchers' children and all."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def run(*command, timeout=240):
    """What a command printed; fails with the end of it if the command does."""
    with started(command) as process:
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, output[-4000:]
    return output


def fits(scenario, *arguments, launcher=TORCHRUN):
    """Runs a scenario of rank_fits.py."""
    return run(*launcher, HERE / "rank_fits.py", scenario, *arguments)


def train(*overrides, timeout=240):
    """train.py's exit code and what it printed."""
    with started([sys.executable, HERE.parent / "train.py", *overrides]) as process:
        output, _ = process.communicate(timeout=timeout)
    return process.returncode, output
