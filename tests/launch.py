"""
Starting the processes of a test, and ending them whatever happens.

A process that imports torch, Lightning and transformers has spent eight seconds before its first line. Here a server
imports them once (`warm`), and the processes are forked from it: they have a pid, a session, an exit code and signals
of their own as any process has. `cold` starts a fresh interpreter, for what a fork cannot show: that a command of the
README imports all that it needs, and that nothing depends on the order of sets, which forks have in common.
"""

import atexit
import fcntl
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np

HERE = Path(__file__).parent
TRAIN = HERE.parent / "train.py"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "100",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["warm"])


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code (minus the signal, if one ended it) and what it wrote."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self):
        return self.stdout + self.stderr


class Started:
    """A script that runs in a forked process."""

    def __init__(self, script, arguments, environment, folder):
        self._written = tempfile.TemporaryDirectory()
        files = [str(Path(self._written.name) / name) for name in ("stdout", "stderr")]
        for file in files:
            Path(file).touch()
        self._files = files
        command = [str(part) for part in (script, *arguments)]
        where = str(folder or HERE.parent)
        self._process = _SERVER.Process(target=_become, args=(command, dict(environment), where, *files))
        with patch.dict(os.environ, ENVIRONMENT):  # of the server, if this is the first process
            self._process.start()
        self.pid = self._process.pid

    @property
    def stdout(self):
        """What it has written to standard output so far."""
        return Path(self._files[0]).read_text(errors="replace")

    @property
    def stderr(self):
        """What it has written to standard error so far."""
        return Path(self._files[1]).read_text(errors="replace")

    @property
    def output(self):
        return self.stdout + self.stderr

    def poll(self):
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=240):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, self.output[-4000:])
        return Ended(self.poll(), self.stdout, self.stderr)

    def end(self):
        """Kills it, if it runs, and all that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._written.cleanup()


def _become(command, environment, folder, stdout, stderr):
    """In the forked process: what an interpreter does with a script, its environment and its files."""
    assert "warm" in sys.modules, "the server could not import tests/warm.py: it names a module that is not there"
    os.setsid()
    for file, number in ((stdout, 1), (stderr, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    # Of the server they are pipes or /dev/null, and may be closed.
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    np.random.seed()  # numpy's generator would go on where the server's is; torch and Python seed theirs
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing leave out


@contextmanager
def started(script, *arguments, environment=None, folder=None):
    """A script in a process group of its own, which is killed in the end, its children and all."""
    process = Started(script, arguments, ENVIRONMENT | (environment or {}), folder)
    try:
        yield process
    finally:
        process.end()


def ended(script, *arguments, timeout=240, **settings):
    """A script that ran to its end."""
    with started(script, *arguments, **settings) as process:
        return process.wait(timeout)


def train(*overrides, **settings):
    """train.py, at its end."""
    return ended(TRAIN, *overrides, **settings)


def trained(*overrides, **settings):
    """train.py, at its end, which was a good one."""
    return good(train(*overrides, **settings))


def good(process):
    assert process.returncode == 0, process.output[-4000:]
    return process


@contextmanager
def cold_started(*command, environment=None, folder=None):
    """A command in a fresh interpreter and a process group of its own, which is killed in the end."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | (environment or {}),
        cwd=folder or HERE.parent,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()


def cold(*command, timeout=240, **settings):
    """A command in a fresh interpreter, at its end."""
    with cold_started(*command, **settings) as process:
        stdout, stderr = process.communicate(timeout=timeout)
        return Ended(process.returncode, stdout, stderr)


@contextmanager
def one_set():
    """
    Waits until no other worker has processes that wait for each other in every step.

    Two such sets on two cores would take several times as long: each step waits for whichever process has no core.
    """
    with open(Path(tempfile.gettempdir()) / f"prune_callbacks_tests_{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def ranks(script, *arguments, world_size=2, folder=None):
    """A script in as many processes as torchrun would start, with the environment that torchrun gives them."""
    with one_set(), ExitStack() as stack:
        port = _free_port()
        yield [
            stack.enter_context(started(script, *arguments, environment=_rank(rank, world_size, port), folder=folder))
            for rank in range(world_size)
        ]


def together(script, *arguments, timeout=240, **settings):
    """Ranks at their end; as soon as one fails the others are killed, as torchrun does."""
    with ranks(script, *arguments, **settings) as processes:
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in processes):
            failed = [process for process in processes if process.poll()]
            assert not failed, failed[0].output[-4000:]
            assert time.monotonic() < deadline, "".join(process.output[-2000:] for process in processes)
            time.sleep(0.02)
        return [good(process.wait()) for process in processes]


def fits(scenario, *arguments, world_size=2):
    """Runs a scenario of rank_fits.py."""
    if world_size == 1:
        return [good(ended(HERE / "rank_fits.py", scenario, *arguments))]
    return together(HERE / "rank_fits.py", scenario, *arguments, world_size=world_size)


def _rank(rank, world_size, port):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return address | {name: str(value) for name, value in places.items()} | {"GROUP_RANK": "0"}


_next_port = 20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])


def _free_port():
    """A port that no other worker tries, below those that the system gives to whoever asks for any."""
    global _next_port
    while True:
        _next_port += 1
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", _next_port))
            return _next_port
