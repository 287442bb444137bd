"""Folders of runs, made by hand, and what a page about them says."""

import copy
import json
from html.parser import HTMLParser

import torch

from prune_callbacks import MaskSet
from prune_callbacks.reporting.page import write_page

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
NAMES = [f"model.layers.{block}.{kind}.weight" for block in range(3) for kind in KINDS]

RECORD = {
    "recipe": "sparsegpt_50",
    "model": "mine_7b",
    "stage": "recovered",
    "command": "python train.py recipe=sparsegpt_50 'data.path=my corpus'",
    "perplexity": {"dataset": "WikiText-2", "seq_len": 2048, "dense": 5.0, "pruned": 7.0, "recovered": 5.5},
    "corpora": {"c4": {"dataset": "C4 validation", "seq_len": 1024, "windows": 256, "dense": 7.25, "pruned": 9.125}},
    "zero_shot": {
        "piqa": {
            "metric": "acc",
            "limit": None,
            "examples": 1838,
            "dense": {"value": 0.8125, "stderr": 0.01, "all": {}},
            "recovered": {"value": 0.7525, "stderr": None, "all": {}},
        }
    },
    "rounds": [],
    "changes": [],
    "training_loss": [[step, 3 - step / 20] for step in range(1, 21)],
    "seconds": {"prune": 75.25, "recover": 4000.0, "evaluate": 300.0},
    "peak_memory_bytes": 3 * 2**30,
    "pruner": "SparseGPT(pattern=NM(n=2, m=4))",
    "allocation": "OWL(threshold=5.0)",
    "schedule": None,
    "optimizer_steps": 20,
    "strategy": "SingleDeviceStrategy",
    "processes": 1,
    "precision": "32-true",
    "adapter": None,
    "sparsity": {"target": 0.5, "achieved": 0.5, "layers": dict.fromkeys(NAMES, 0.5)},
    "violations": {},
    "reconstruction_loss": {name: 0.01 * (1 + place) for place, name in enumerate(NAMES)},
    "skipped": {"model.layers.0.mlp.gate": "its 6 inputs are no multiple of 4"},
    "warnings": ["damping 0.01 was too small for a factorisation; used 0.1"],
    "versions": {"prune-callbacks": "0.2.0", "torch": "2.13.0"},
    "device": "Some GPU",
}


def masks_of_a_run():
    generator = torch.Generator().manual_seed(0)
    return MaskSet({name: torch.rand(96, 160, generator=generator) < 0.5 for name in NAMES})


def make_run(folder, width=64, **changes):
    """A run's folder of a record that differs from `RECORD` in what is given."""
    (folder / "model").mkdir(parents=True)
    config = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": width, "vocab_size": 100}
    (folder / "model/config.json").write_text(json.dumps(config))
    (folder / "config.yaml").write_text("name: sparsegpt_50\nseed: 0\njob: null\n")
    (folder / "report.json").write_text(json.dumps(copy.deepcopy(RECORD) | changes))
    masks_of_a_run().save(folder / "masks.safetensors")
    return folder


def html(folder):
    return write_page(folder).read_text(encoding="utf-8")


def words(page):
    """What a reader sees, in one line."""

    class Text(HTMLParser):
        found, hidden = (), 0

        def handle_starttag(self, tag, attrs):
            self.hidden += tag in ("style", "title")

        def handle_endtag(self, tag):
            self.hidden -= tag in ("style", "title")

        def handle_data(self, data):
            if not self.hidden:
                self.found += (data,)

    parser = Text()
    parser.feed(page)
    return " ".join(" ".join(parser.found).split())


def perplexity(**changes):
    return {"perplexity": RECORD["perplexity"] | changes}
