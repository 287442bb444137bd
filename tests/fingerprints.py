"""
Hashes of what pruning gives, to show that a change of the code's layout changes nothing else.

`python tests/fingerprints.py before.json` prunes small models by every method with every pattern, allocates, prunes one
block of SmolLM2-135M where its package is installed, and runs every recipe with `smoke=true`. For each it writes a hash
of the masks and one of the weights, and of reports all but times, versions and paths. `python tests/fingerprints.py
after.json before.json` says what differs. Hashes are those of one machine: sums of floats depend on its libraries.
"""

import contextlib
import copy
import hashlib
import io
import itertools
import json
import re
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import families  # noqa: E402
import torch  # noqa: E402
from launch import trained  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from prune_callbacks import (  # noqa: E402
    ALPS,
    GPTQ,
    MRP,
    NM,
    OWL,
    Block,
    Columns,
    LagrangianAllocation,
    Magnitude,
    Rows,
    SparseGPT,
    SparseGPTQ,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.tasks import smollm2_135m, tiny_llama  # noqa: E402

PATTERNS = (
    Unstructured(0.5),
    Unstructured(0.6, per="row"),
    NM(2, 4),
    NM(1, 4),
    Block(4, 0.5),
    Rows(0.25),
    Columns(0.25),
)
METHODS = {
    "Magnitude": Magnitude,
    "Wanda": Wanda,
    "SparseGPT": SparseGPT,
    "MRP SM": MRP,
    "MRP MM": partial(MRP, variant="MM"),
    "MRP MS": partial(MRP, variant="MS"),
    "ALPS": ALPS,
    "SparseGPTQ": SparseGPTQ,
}
VOLATILE = re.compile(r"seconds|bytes|version|command|path|checkpoint|time|created|machine|device")
"""Entries of reports that differ from run to run."""

LEFT_OUT = {"demo": "the real model", "consolidate": "needs a run", "prune_streaming": "needs a checkpoint"}
"""Recipes that are not run; those beside others and sweeps are."""


def hashed(tensors):
    """The first digits of a SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def batches(model, count=3):
    """Token ids of a generator of its own."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, min(250, model.config.vocab_size), (2, 48), generator=generator) for _ in range(count)]


def outcome(model, *args, **settings):
    """Hashes of the masks and the weights, with the losses; or the error."""
    model = copy.deepcopy(model)
    try:
        report = prune_sequentially(model, batches(model), *args, progress=False, **settings)
    except ValueError as error:
        return {"refused": str(error)}
    losses = {layer.name: layer.loss for layer in report.layers}
    return {
        "masks": hashed({name: report.masks[name].byte() for name in report.masks}),
        "weights": hashed(dict(model.named_parameters())),
        "losses": losses,
        "skipped": report.skipped,
    }


def models():
    """The small models by name: linear layers, transposed ones, experts apart and in one tensor."""
    yield "llama", tiny_llama(hidden_size=32, layers=2)
    for name, make in {**families.FAMILIES, **families.MIXTURES}.items():
        if name in ("gpt2", "mixtral", "mamba"):
            torch.manual_seed(0)
            yield name, AutoModelForCausalLM.from_config(make())


def methods():
    """Every method with every pattern, on the small models; the rest on one of them."""
    found = {}
    for name, model in models():
        for (label, method), pattern in itertools.product(METHODS.items(), PATTERNS):
            try:
                pruner = method(pattern)
            except ValueError as error:
                found[f"{label} {pattern}"] = {"refused": str(error)}
                continue
            found[f"{name} {pruner}"] = outcome(model, pruner)
    model = tiny_llama(hidden_size=32, layers=2)
    found["llama GPTQ"] = outcome(model, GPTQ())
    for allocation, pruner in itertools.product(
        (OWL(), LagrangianAllocation()), (Wanda(Unstructured(0.5)), SparseGPT(Unstructured(0.7)), Wanda(NM(2, 4)))
    ):
        found[f"llama {allocation} {pruner}"] = outcome(model, pruner, allocation=allocation)
    return found


def real_block():
    """The first block of SmolLM2-135M by each method."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_135m())
    model.model.layers = model.model.layers[:1]
    pruners = (Magnitude(NM(2, 4)), Wanda(NM(2, 4)), SparseGPT(Unstructured(0.5)), MRP(NM(2, 4)))
    return {f"SmolLM2 {pruner}": outcome(model, pruner) for pruner in pruners}


def steady(record):
    """A report without what differs from run to run."""
    if isinstance(record, dict):
        return {key: steady(value) for key, value in record.items() if not VOLATILE.search(key)}
    if isinstance(record, list):
        return [steady(value) for value in record]
    return None if isinstance(record, str) and "/" in record else record


def recipes():
    """The reports of every recipe in small, and the hash of its masks file."""
    found = {}
    for path in sorted((HERE.parent / "recipes/recipe").glob("*.yaml")):
        if path.stem in LEFT_OUT:
            continue
        with tempfile.TemporaryDirectory() as folder:
            trained(f"recipe={path.stem}", "smoke=true", f"output_dir={folder}/run", "trainer.accelerator=cpu")
            for report in sorted(Path(folder).rglob("*.json")):
                if report.name in ("report.json", "sweep.json", "sensitivity.json"):
                    found[f"{path.stem} {report.relative_to(folder)}"] = steady(json.loads(report.read_text()))
            for masks in sorted(Path(folder).rglob("masks.safetensors")):
                digest = hashlib.sha256(masks.read_bytes()).hexdigest()[:16]
                found[f"{path.stem} {masks.relative_to(folder)}"] = digest
        print(f"{path.stem} done", file=sys.stderr, flush=True)
    return found


def main(target, before=None):
    """Writes what there is now; returns how many entries differ from those of an earlier file."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        found = methods()
        print("methods done", file=sys.stderr, flush=True)
        try:
            found |= real_block()
        except (ValueError, OSError) as error:
            print(f"no real block: {error}", file=sys.stderr)
        found |= recipes()
    found = json.loads(json.dumps(found))
    Path(target).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} entries in {target}")
    if before is None:
        return 0
    old = json.loads(Path(before).read_text())
    different = [name for name in {**old, **found} if old.get(name) != found.get(name)]
    for name in different:
        print(f"differs: {name}\n  before {str(old.get(name))[:300]}\n  after  {str(found.get(name))[:300]}")
    print(f"{len(different)} of {len({**old, **found})} entries differ")
    return len(different)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
