import json
from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.normalizers import NFKC, Replace
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import PreTrainedTokenizerFast

from prune_callbacks import TokenDataModule
from prune_callbacks.calibration.windows import contiguous_windows, random_windows
from prune_callbacks.tasks import HubText, PythonDocs, TextFile
from prune_callbacks.tasks.loader import ResumableLoader, Shuffled, Windows


def encode(text):
    return [ord(c) for c in text]


def test_random_windows_are_pieces_of_documents_and_do_not_overlap():
    documents = ["".join(chr(1000 * d + i) for i in range(n)) for d, n in enumerate([50, 9, 33, 20], 1)]
    windows = random_windows(documents, encode, 6, 10, seed=1)
    assert windows.shape == (6, 10)
    tokens = windows.flatten().tolist()
    assert len(set(tokens)) == len(tokens)
    for window in windows.tolist():
        assert window == list(range(window[0], window[0] + 10))
    assert torch.equal(windows, random_windows(documents, encode, 6, 10, seed=1))
    assert not torch.equal(windows, random_windows(documents, encode, 6, 10, seed=2))


def test_long_documents_each_give_one_window_first():
    documents = ["".join(chr(1000 * d + i) for i in range(100)) for d in range(1, 6)]
    windows = random_windows(documents, encode, 5, 10)
    assert sorted(int(w[0]) // 1000 for w in windows) == [1, 2, 3, 4, 5]


def test_too_few_windows_say_what_there_is():
    with pytest.raises(
        ValueError, match=r"asked for 4 calibration windows of 10 tokens; the corpus \(2 documents, the "
    ):
        random_windows(["x" * 25, "y" * 9], encode, 4, 10)
    with pytest.raises(ValueError, match=r"has 25 tokens and fills 2 windows of 10; 3 are needed"):
        contiguous_windows(["x" * 25], encode, 10, limit=3)
    with pytest.raises(ValueError, match=r"fills 0 windows of 10; 1 are needed"):
        contiguous_windows(["x"], encode, 10)


def test_documents_are_tokenized_until_there_are_enough_windows():
    seen = []
    random_windows([letter * 30 for letter in "abcdef"], lambda text: seen.append(text) or encode(text), 2, 10)
    assert len(seen) == 2


def test_contiguous_windows_join_documents_with_blank_lines():
    windows = contiguous_windows(["abc", "defgh"], encode, 5)
    assert ["".join(map(chr, w)) for w in windows.tolist()] == ["abc\n\n", "defgh"]


def trained_tokenizer(kind):
    """Tokenizers as models have them: within words (GPT-2, Llama 3), over whole texts (Llama 2), by likelihood (T5)."""
    text = PythonDocs("calibration").documents()
    if kind == "byte-level BPE":
        tokenizer, trainer = Tokenizer(BPE()), BpeTrainer(vocab_size=600, show_progress=False)
        tokenizer.pre_tokenizer = ByteLevel()
    elif kind == "BPE over whole texts":
        tokenizer, trainer = Tokenizer(BPE()), BpeTrainer(vocab_size=600, show_progress=False)
        tokenizer.normalizer = Replace(" ", "\u2581")
        text = [line for document in text for line in document.splitlines()]
    else:
        tokenizer, trainer = (
            Tokenizer(Unigram()),
            UnigramTrainer(vocab_size=600, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]),
        )
        tokenizer.normalizer, tokenizer.pre_tokenizer = NFKC(), Metaspace()
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["byte-level BPE", "BPE over whole texts", "Unigram"])
@pytest.mark.parametrize("joined", ["\n\n", " "], ids=["lines", "one line"])
def test_the_first_windows_are_those_of_the_whole_text_though_the_rest_is_not_tokenized(kind, joined):
    tokenizer, characters = trained_tokenizer(kind), []
    documents = [joined.join(" ".join(d.split()) for d in PythonDocs("train").documents())]

    def encode(text):
        characters.append(len(text))
        return tokenizer.encode(text, add_special_tokens=False).ids

    whole = contiguous_windows(documents, encode, 64)
    for limit in (1, 3, 50, len(whole)):
        assert torch.equal(contiguous_windows(documents, encode, 64, limit=limit), whole[:limit])
    characters.clear()
    contiguous_windows(documents, encode, 64, limit=3)
    assert sum(characters) < 0.1 * len(documents[0])


def test_the_parts_of_the_embedded_corpus_do_not_overlap():
    texts = {part: "\n\n".join(PythonDocs(part).documents()) for part in ("train", "calibration", "evaluation")}
    total = sum(map(len, texts.values()))
    assert total > 250_000
    assert len(texts["train"]) > 0.6 * total
    assert min(map(len, texts.values())) > 0.1 * total
    paragraphs = {part: {" ".join(p.split()) for p in text.split("\n\n")} for part, text in texts.items()}
    flat = {part: " ".join(text.split()) for part, text in texts.items()}
    for part in texts:
        for other in texts:
            if part == other:
                continue
            shared = {p for p in paragraphs[part] & paragraphs[other] if p}
            assert not shared
            # Nor does a longer stretch of one stand in the other under another paragraph break.
            long = [p for p in paragraphs[part] if len(p) > 200]
            assert sum(p in flat[other] for p in long) <= 0.01 * len(long)


def test_local_files(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"line {i}\n" for i in range(100)))
    parts = [TextFile(str(text), part).documents()[0] for part in ("train", "calibration", "evaluation")]
    assert "".join(parts) == text.read_text()
    assert [p.count("\n") for p in parts] == [70, 15, 15]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"body": f"document {i}"}) + "\n" for i in range(10)))
    assert TextFile(str(lines), field="body").documents() == [f"document {i}" for i in range(10)]
    (tmp_path / "separator.jsonl").write_text('{"text": "a\u2028b"}\n' * 9 + "no json\n")
    assert TextFile(str(tmp_path / "separator.jsonl"), "train").documents() == ["a\u2028b"] * 7
    with pytest.raises(ValueError, match="line 10 is no JSON"):
        TextFile(str(tmp_path / "separator.jsonl"), "evaluation").documents()
    with pytest.raises(ValueError, match="line 1 is no JSON object with a 'text' field"):
        TextFile(str(lines)).documents()
    with pytest.raises(ValueError, match="no text file at"):
        TextFile(str(tmp_path / "absent.txt")).documents()
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        TextFile(str(tmp_path / "empty.txt")).documents()
    (tmp_path / "short.txt").write_text("one line")
    with pytest.raises(ValueError, match="holds no text in its calibration part"):
        TextFile(str(tmp_path / "short.txt"), "calibration").documents()


def test_datasets_on_disk_are_read_through_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a", "", "b")))
    source = {"path": "json", "data_files": str(tmp_path / "rows.jsonl")}
    assert HubText(**source).documents() == ["a", "", "b"]
    assert HubText(**source, join="\n\n").documents() == ["a\n\n\n\nb"]
    assert HubText(**source, limit=2).documents() == ["a", ""]


def test_the_data_module(tokenizer):
    corpora = [PythonDocs(part) for part in ("train", "calibration", "evaluation")]
    data = TokenDataModule(
        tokenizer, *corpora, seq_len=64, batch_size=3, train_windows=10, calibration_windows=6, evaluation_windows=5
    )
    data.setup("fit")
    assert [batch["input_ids"].shape[0] for batch in data.train_dataloader()] == [3, 3, 3, 1]
    assert sum(len(b["input_ids"]) for b in data.calibration_dataloader()) == 6
    assert data.evaluation_windows.shape == (5, 64)
    assert tokenizer.decode(data.evaluation_windows[0].tolist()) in "\n\n".join(corpora[2].documents())
    assert data.evaluation_title == "Python language reference (evaluation)"


def test_a_tokenizer_without_a_vocabulary_is_named():
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), name_or_path="models/mine")
    data = TokenDataModule(empty, *(PythonDocs(part) for part in ("train", "calibration", "evaluation")), seq_len=8)
    with pytest.raises(ValueError, match="the tokenizer of models/mine makes no token of text"):
        data.setup("fit")


def test_bad_corpora_are_named(tokenizer, tmp_path):
    docs = PythonDocs("train")
    with pytest.raises(
        ValueError, match=r"the calibration corpus, Python language reference \(calibration\): asked for 9999"
    ):
        TokenDataModule(tokenizer, docs, PythonDocs("calibration"), docs, seq_len=64, calibration_windows=9999).setup(
            "fit"
        )
    (tmp_path / "short.txt").write_text("short")
    short = TextFile(str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match=r"the evaluation corpus, short.txt: the text has 5 tokens"):
        TokenDataModule(tokenizer, docs, docs, short, seq_len=64, calibration_windows=2).setup("fit")


def test_a_loader_goes_on_where_the_data_was_with_other_batches():
    windows = Windows(torch.arange(48)[:, None])

    def loader(rows, ranks=1, rank=0):
        return ResumableLoader(windows, rows, sampler=Shuffled(windows, ranks, rank, seed=3))

    def read(batches):
        return [int(row) for batch in batches for row in batch["input_ids"]]

    whole = read(loader(4))
    halves = [loader(2, 2, rank) for rank in (0, 1)]
    first = [read(islice(half, 5)) for half in halves]
    assert sorted(first[0] + first[1]) == sorted(whole[:20])
    same, other = loader(4), loader(2)
    same.load_state_dict(halves[0].state_dict())
    assert read(same) == whole[20:]
    with pytest.warns(UserWarning, match=r"4 windows at a time, and now it is 2 \(batch_size x processes\)"):
        other.load_state_dict(halves[0].state_dict())
    assert read(other) == whole[20:]
