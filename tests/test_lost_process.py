"""What is said when another process is gone, when the launcher's SIGTERM comes in between."""

import logging
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from prune_callbacks.callbacks.lost_process import LostProcessWatch

pytestmark = pytest.mark.usefixtures("unchecked")  # a stand-in for the trainer
GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2345"


def trainer(folder, world_size=2):
    return SimpleNamespace(
        world_size=world_size,
        global_rank=1,
        global_step=7,
        checkpoint_callback=SimpleNamespace(dirpath=str(folder)),
    )


@pytest.fixture
def collective_in_the_handler():
    """As Lightning's: the handler of SIGTERM broadcasts, which fails where a process is gone."""

    def handler(signum, frame):
        raise RuntimeError(GLOO)

    before = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, before)


def terminated():
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_sigterm_that_interrupts_the_error_on_its_way_is_answered(tmp_path, caplog, collective_in_the_handler):
    terminated()
    assert not caplog.records  # control: nobody hears of the handler's error
    watch = LostProcessWatch(trainer(tmp_path))
    with caplog.at_level(logging.ERROR):
        terminated()
        watch.note(RuntimeError(GLOO))  # the callback's on_exception, if it is reached after all
    (record,) = caplog.records
    assert record.getMessage() == (
        "rank 1 of 2: another process of the training is gone, after 7 optimizer steps. No complete checkpoint is "
        "visible from this machine; ModelCheckpoint() writes them"
    )


def test_a_sigterm_does_not_cut_the_message_off(tmp_path, caplog, monkeypatch, collective_in_the_handler):
    """It comes while checkpoints are looked through."""

    def looking(folder):
        os.kill(os.getpid(), signal.SIGTERM)
        return folder

    monkeypatch.setattr("prune_callbacks.callbacks.lost_process.newest_checkpoint", looking)
    LostProcessWatch(trainer(tmp_path)).note(RuntimeError(GLOO))
    (record,) = caplog.records
    assert f"ckpt_path={tmp_path}" in record.getMessage()


def test_the_newest_checkpoint_is_named(tmp_path, caplog):
    torch.save({"state_dict": {}, "global_step": 3}, tmp_path / "step_3.ckpt")
    LostProcessWatch(trainer(tmp_path, world_size=1)).note(RuntimeError(GLOO))
    LostProcessWatch(trainer(tmp_path, world_size=1)).note(RuntimeError("CUDA out of memory"))
    (record,) = caplog.records  # of the first
    assert f"Resume with the same settings and ckpt_path={tmp_path / 'step_3.ckpt'}" in record.getMessage()


def test_the_handler_is_put_back(tmp_path, collective_in_the_handler):
    watch = LostProcessWatch(trainer(tmp_path))
    assert signal.getsignal(signal.SIGTERM) != collective_in_the_handler
    watch.end()
    assert signal.getsignal(signal.SIGTERM) == collective_in_the_handler
    watch = LostProcessWatch(trainer(tmp_path))
    later = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # somebody else's by now
    watch.end()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert later is not None


def test_one_process_and_other_threads_are_left_alone(tmp_path, collective_in_the_handler):
    LostProcessWatch(trainer(tmp_path, world_size=1))
    thread = threading.Thread(target=lambda: LostProcessWatch(trainer(tmp_path)))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == collective_in_the_handler
