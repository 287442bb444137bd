"""Corpora by name or path: which text they are, and what a run measures on several."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from launch import train, trained
from lightning import Trainer
from safetensors.torch import load_file

from prune_callbacks import CausalLM, Magnitude, MaskEnforcer, OneShotPrune, RunReport, TokenDataModule, Unstructured
from prune_callbacks.callbacks.run_quality import RunQuality
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.storage.run_record import RunRecord
from prune_callbacks.tasks import HubText, PythonDocs, TextFile, corpus

FOLDER = os.environ.get("PRUNE_CALLBACKS_DATA")
REFERENCE = Path(FOLDER or "").parent / "reference/smollm2_windows.safetensors"
PARTS = ("train", "calibration", "evaluation")


@pytest.fixture
def root(tmp_path):
    """The published files' layouts, with made-up text."""
    texts = {
        "wikitext2-raw/wiki.test.raw": " \n = Title = \n \n Some text , with @-@ signs . \n",
        "ptb/ptb.test.txt": " no it was n't black <unk> \n but N years ago \n",
        "ptb/ptb.train.txt": " a sentence \n",
        "c4/c4_train_head.jsonl": "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(3)),
        "lambada/lambada_test.jsonl": "".join(json.dumps({"text": f"passage {i}"}) + "\n" for i in range(20)),
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "c4/en").mkdir()
    with gzip.open(tmp_path / "c4/en/c4-validation.00000-of-00008.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"valid {i}"}) + "\n" for i in range(1200))
    return tmp_path


def test_local_files_give_the_text_of_the_hubs_rows(root, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(root / "cache"))

    def texts(name, part="evaluation"):
        return corpus(name, part, root).documents()

    # The rows are "", " = Title = \n", "", " Some text ...\n".
    assert texts("wikitext2") == ["\n\n = Title = \n\n\n\n\n Some text , with @-@ signs . \n"]
    assert texts("ptb") == ["no it was n't black <unk> but N years ago"]
    assert texts("ptb", "train") == texts("ptb", "calibration") == ["a sentence"]
    assert texts("c4", "calibration") == ["document 0", "document 1", "document 2"]
    crlf = root / "wikitext2-raw/wiki.test.raw"
    before = texts("wikitext2")
    crlf.write_bytes(b"\xef\xbb\xbf" + crlf.read_bytes().replace(b"\n", b"\r\n"))
    assert texts("wikitext2") == before
    crlf.write_bytes(b"a\n\xe9\n")
    with pytest.raises(ValueError, match=r"wiki\.test\.raw is no text in UTF-8: line 2 has the byte 0xe9"):
        texts("wikitext2")
    assert texts("c4") == [" ".join(f"valid {i}" for i in range(1100))]
    assert texts("lambada") == [f"passage {i}" for i in range(20)]
    with pytest.raises(ValueError, match="lambada has test passages only.*was given for calibration"):
        corpus("lambada", "calibration", root)
    assert corpus("c4", "evaluation", root).title == "c4-validation.00000-of-00008.json.gz"
    assert corpus("wikitext2", "evaluation", root).title == "WikiText-2 raw test"


def test_names_without_a_folder_are_the_hubs():
    assert corpus("wikitext2", "evaluation") == HubText(
        "Salesforce/wikitext", "wikitext-2-raw-v1", split="test", join="\n\n"
    )
    assert corpus("ptb", "evaluation").field == "sentence"
    assert corpus("lambada", "evaluation").path == "EleutherAI/lambada_openai"
    shards = [corpus("c4", part).data_files for part in PARTS]
    assert shards == [
        "en/c4-train.00001-of-01024.json.gz",
        "en/c4-train.00000-of-01024.json.gz",
        "en/c4-validation.00000-of-00008.json.gz",
    ]


def test_a_path_is_a_file(root):
    assert corpus("python_docs", "evaluation") == PythonDocs("evaluation")
    path = str(root / "c4/c4_train_head.jsonl")
    assert corpus(path, "calibration") == TextFile(path, "calibration")


def test_what_is_not_there_is_named(root, tokenizer):
    with pytest.raises(
        ValueError, match=r"no corpus 'wikitext': accepted are wikitext2, ptb, c4, lambada, python_docs and the path"
    ):
        corpus("wikitext", "evaluation")
    with pytest.raises(ValueError, match=r"no text file at .*none\.txt"):
        corpus(str(root / "none.txt"), "evaluation")
    missing = r"has no file of wikitext2's train text: looked for wikitext2-raw/wiki\.train\.raw and .*the Hub"
    with pytest.raises(ValueError, match=missing):
        corpus("wikitext2", "train", root)
    docs = [PythonDocs(part) for part in PARTS]
    path = str(root / "ptb/ptb.test.txt")
    with pytest.raises(ValueError, match="evaluate names one corpus twice"):
        TokenDataModule(tokenizer, *docs, evaluate=[path, path])
    data = TokenDataModule(tokenizer, *docs, seq_len=512, calibration_windows=2, evaluate="ptb", root=root)
    with pytest.raises(ValueError, match="the evaluation corpus, Penn Treebank test: the text has 35 tokens"):
        data.setup("fit")


def test_a_run_measures_every_text(tmp_path, tiny, tokenizer, root):
    docs = [PythonDocs(part) for part in PARTS]
    sizes = {"seq_len": 32, "train_windows": 4, "calibration_windows": 4, "evaluation_windows": 3}
    (root / "again.txt").write_text("line of text\n" * 300)
    given = {"evaluate": ["lambada", str(root / "again.txt"), "c4"], "root": root}
    data = TokenDataModule(tokenizer, *docs, **sizes, **given)
    report = RunReport(tmp_path / "run", progress=False)
    one_shot = OneShotPrune(Magnitude(Unstructured(0.5)), dirpath=tmp_path / "pruned", progress=False)
    module = CausalLM(tiny, lambda p: torch.optim.AdamW(p, lr=1e-2))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(accelerator="cpu", max_epochs=1, callbacks=[report, one_shot, MaskEnforcer()], **quiet).fit(
        module, datamodule=data
    )
    written = json.loads((tmp_path / "run/report.json").read_text())
    assert written["text"] == {"bos": False, "calibration_rows": "separate"}
    assert "bos: no, calibration rows: separate" in (tmp_path / "run/report.html").read_text()
    corpora = written["corpora"]
    assert list(corpora) == ["lambada", "again.txt", "c4"]
    pruned = type(tiny).from_pretrained(tmp_path / "pruned/model")
    for name, found in corpora.items():
        title, windows = data.further_evaluation[name]
        assert (found["dataset"], found["seq_len"], found["windows"]) == (title, 32, 3)
        assert found["pruned"] == pytest.approx(perplexity(pruned, windows, progress=False), rel=1e-6)
        assert found["recovered"] == pytest.approx(perplexity(module.model, windows, progress=False), rel=1e-6)
        assert len({found[stage] for stage in ("dense", "pruned", "recovered")}) == 3
    assert "Perplexity on further texts" in (tmp_path / "run/report.html").read_text()


def test_what_was_measured_on_other_windows_does_not_stand_beside(tiny, tokenizer, root):
    """A fit that is resumed with other windows."""
    docs = [PythonDocs(part) for part in PARTS]
    record = RunRecord()
    quality = RunQuality(None, 1, None, progress=False)
    module = CausalLM(tiny, lambda p: torch.optim.AdamW(p, lr=1e-2))
    for stage, seq_len in (("dense", 32), ("pruned", 32), ("recovered", 16)):
        sizes = {"train_windows": 1, "calibration_windows": 1, "evaluation_windows": 2}
        data = TokenDataModule(tokenizer, *docs, seq_len=seq_len, evaluate=["lambada"], root=root, **sizes)
        data.setup("fit")
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.datamodule = data
        quality.measure(trainer, module, stage, record)
        if stage == "pruned":
            assert record.perplexity.dense is not None
            assert record.corpora["lambada"]["dense"] is not None
    assert record.perplexity.dense is None
    assert "dense" not in record.corpora["lambada"]
    assert record.corpora["lambada"]["seq_len"] == 16


@pytest.mark.slow
def test_the_command_line(tmp_path, root):
    """Names as calibration and evaluation, a folder, several texts; what is missing is said before any work."""
    path = root / "long.txt"
    path.write_text("words in a line\n" * 600)
    given = ["recipe=wanda_50", "smoke=true", f"data.root={root}", f"data.calibration={path}"]
    trained(*given, f"evaluate=[c4,{path}]", f"output_dir={tmp_path / 'run'}")
    record = json.loads((tmp_path / "run/report.json").read_text())
    assert set(record["corpora"]) == {"c4", "long.txt"}
    done = train(*given, "data.evaluation=lambada", f"output_dir={tmp_path / 'short'}")
    assert done.returncode == 1
    assert "the evaluation corpus, lambada_test.jsonl: the text has" in done.output
    assert not (tmp_path / "short/report.json").exists()
    done = train(*given, "evaluate=[wikitext2,imdb]", f"output_dir={tmp_path / 'bad'}")
    assert done.returncode == 1
    assert "no corpus 'imdb': accepted are wikitext2, ptb, c4, lambada, python_docs" in done.output


@pytest.mark.skipif(FOLDER is None, reason="PRUNE_CALLBACKS_DATA does not name a folder of corpora")
def test_the_real_files_are_the_papers_text():
    from transformers import AutoTokenizer

    from prune_callbacks.tasks import smollm2_135m

    text = corpus("wikitext2", "evaluation", FOLDER).documents()[0]
    if REFERENCE.is_file():
        wanted = load_file(REFERENCE)["wikitext2"].flatten().tolist()
        ids = AutoTokenizer.from_pretrained(smollm2_135m())(text[:100_000], add_special_tokens=False)["input_ids"]
        assert ids[: len(wanted)] == wanted
    assert len(corpus("c4", "calibration", FOLDER).documents()) == 1000
    with pytest.raises(ValueError, match="no file of ptb's evaluation text"):
        corpus("ptb", "evaluation", FOLDER)
