"""Real corpora, where PRUNE_CALLBACKS_DATA names a folder with them."""

import os
from pathlib import Path

import pytest

from prune_callbacks.calibration.windows import contiguous_windows, random_windows
from prune_callbacks.tasks import TextFile

FOLDER = os.environ.get("PRUNE_CALLBACKS_DATA")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="PRUNE_CALLBACKS_DATA does not name a folder of corpora")


def encode(text):
    return list(text.encode())


def test_calibration_windows_of_c4():
    documents = TextFile(str(Path(FOLDER) / "c4/c4_train_first1000.jsonl")).documents()
    assert len(documents) == 1000
    windows = random_windows(documents, encode, 128, 2048)
    assert windows.shape == (128, 2048)
    encoded = [text.encode() for text in documents]
    assert all(any(bytes(w) in text for text in encoded) for w in windows.tolist()[:8])


def test_wikitext_as_one_text():
    documents = TextFile(str(Path(FOLDER) / "wikitext2-raw/wiki.test.raw")).documents()
    assert len(documents) == 1
    assert len(documents[0].encode()) == 1_290_590
    assert len(contiguous_windows(documents, encode, 2048)) == 1_290_590 // 2048
