"""Devices without float64, and systems without POSIX: nothing here needs either."""

import ast
import ctypes
import re
import sys
from pathlib import Path

import pytest
import torch
from fake_mps import DEVICE, OnMps, fake_mps
from transformers import LlamaConfig, LlamaForCausalLM

import prune_callbacks
from prune_callbacks import (
    ALPS,
    GPTQ,
    MRP,
    NM,
    OWL,
    RIA,
    Columns,
    LagrangianAllocation,
    Magnitude,
    MaskSet,
    SparseGPT,
    SparseGPTQ,
    Structured,
    Unstructured,
    Wanda,
    permute_channels_,
    prune_checkpoint,
    prune_sequentially,
)
from prune_callbacks.anatomy.blocks import find_blocks
from prune_callbacks.anatomy.targets import find_targets
from prune_callbacks.engine.iterative import shrink_masks
from prune_callbacks.measure.perplexity import Perplexity, perplexity
from prune_callbacks.memory import peak_memory
from prune_callbacks.parallel.plain import PlainAccess
from prune_callbacks.solvers.float64 import in_float64, sum_in_float64
from prune_callbacks.solvers.linalg import quadratic_form
from prune_callbacks.studies.sensitivity import sensitivity

BATCHES = torch.randint(0, 64, (2, 2, 24), generator=torch.Generator().manual_seed(1)).unbind()
WINDOWS = torch.cat(BATCHES)[:2, :12]

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens for the")


@pytest.fixture
def mps(monkeypatch):
    with fake_mps(monkeypatch) as device:
        yield device


def llama(layers):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes)).eval()


def on_both(work, mps, layers=1):
    """What `work` makes of a model on the CPU, and of one on the device that is then moved to the CPU."""
    results = []
    for device in ("cpu", mps):
        model = llama(layers).to(device)
        assert {parameter.device for parameter in model.parameters()} == {torch.device(device)}
        result = work(model, device)
        results.append((result, {name: tensor.cpu() for name, tensor in model.state_dict().items()}))
    return results


def same_weights(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


def test_control_the_device_refuses_what_apples_does(mps):
    x = torch.ones(2, 3).to(mps)
    assert type(x) is OnMps
    assert (x @ x.T).cpu().tolist() == [[3, 3], [3, 3]]
    for make in (x.double, lambda: x.sum(dtype=torch.float64), lambda: torch.zeros(2, dtype=torch.float64, device=mps)):
        with pytest.raises(TypeError, match="Cannot convert a MPS Tensor to float64"):
            make()
    with pytest.raises(TypeError, match="Cannot convert a MPS Tensor to float64"):
        torch.ones(2, dtype=torch.float64).to(mps)
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        torch.mul(x, torch.ones(3))


PRUNERS = [
    Magnitude(Unstructured(0.5)),
    Wanda(NM(2, 4)),
    RIA(Unstructured(0.5)),
    SparseGPT(Unstructured(0.5)),
    SparseGPTQ(NM(2, 4)),
    GPTQ(),
    MRP(NM(2, 4)),
    MRP(Unstructured(0.5)),
    ALPS(NM(2, 4)),
    Structured(Columns(0.5)),
    Structured(Columns(0.5), score="wanda"),
]


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_every_pruner_computes_there_what_it_does_on_the_cpu(mps, pruner):
    def work(model, device):
        return prune_sequentially(model, BATCHES, pruner, progress=False)

    (report, weights), (there, moved) = on_both(work, mps)
    assert same_weights(moved, weights)
    assert there.masks == report.masks
    losses = [[layer.loss for layer in found.layers if layer.loss is not None] for found in (there, report)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("allocation", [OWL(1.0), LagrangianAllocation(points=1)], ids=["OWL", "Lagrangian"])
def test_allocations(mps, allocation):
    def work(model, device):
        return prune_sequentially(
            model, BATCHES, Magnitude(Unstructured(0.5)), allocation=allocation, progress=False
        ).masks.layer_sparsity()

    (here, _), (there, _) = on_both(work, mps, layers=2)
    assert here == there
    assert len(set(here.values())) > 1


def test_permuting_and_measuring(mps):
    def work(model, device):
        done = permute_channels_(model, BATCHES, NM(2, 4), progress=False)
        before = perplexity(model, WINDOWS, progress=False)
        found = sensitivity(model, BATCHES, WINDOWS, SparseGPT(Unstructured(0.5)), progress=False, targets="down_proj")
        return [*(gain.after for gain in done.values()), before, *found.increase.values(), *found.shift.values()]

    (here, weights), (there, moved) = on_both(work, mps)
    assert same_weights(moved, weights)
    assert there == pytest.approx(here, rel=1e-5)
    assert len(here) == 5


def test_masks_are_chosen_held_and_counted(mps):
    def work(model, device):
        names = [name for name, _ in model.named_parameters() if name.endswith("down_proj.weight")]
        dense = MaskSet.all_kept({name: model.get_parameter(name).shape for name in names})
        found = find_targets(find_blocks(model), "down_proj").values()
        layers = {target.parameter_name: [target] for target in found}
        for scope in ("global", "layer"):
            access = PlainAccess(model, dense, [torch.optim.SGD(model.parameters(), 0.1)])
            share = 0.25 if scope == "global" else 0.5
            dense = shrink_masks(access, layers, share, Magnitude(Unstructured(0.5)), scope)
        access = PlainAccess(model, dense)
        violations = access.violations(), dense.violations(model.named_parameters())
        access.project()
        return dense.sparsity(), violations, access.violations(), access.layer_sparsity()

    (here, weights), (there, moved) = on_both(work, mps)
    assert here == there
    assert same_weights(moved, weights)
    assert here[0] == 0.5
    assert here[2] == {}


def test_a_checkpoint_is_pruned_there_block_by_block(mps, tmp_path):
    llama(1).save_pretrained(tmp_path / "source")
    for device in ("cpu", "mps:0"):
        target = tmp_path / device
        prune_checkpoint(tmp_path / "source", target, Wanda(NM(2, 4)), BATCHES, device=device, progress=False)
    files = [path.name for path in (tmp_path / "cpu/model").glob("*.safetensors")]
    assert len(files) == 2
    for name in files:
        assert (tmp_path / "cpu/model" / name).read_bytes() == (tmp_path / "mps:0/model" / name).read_bytes()


def test_the_metric_keeps_its_sum_where_there_is_float64(mps):
    logits, labels = torch.randn(3, 9, 11), torch.randint(0, 11, (3, 9))
    metric, module = Perplexity(), torch.nn.Module()
    metric.update(logits, labels)
    expected = metric.compute()
    module.metric = Perplexity()
    for device in (mps, "cpu", mps):  # as Lightning moves modules, also with a result that is remembered
        module.to(device)
        module.metric.reset()
        module.metric.update(logits.to(device), labels.to(device))
        assert module.metric.total.device == torch.device("cpu")
        assert module.metric.count.device == module.metric.device == torch.device(device)
        assert module.metric.compute().dtype is torch.float64
        assert float(module.metric.compute()) == pytest.approx(float(expected), rel=1e-12)
    assert module.half().metric.total.dtype is torch.float64  # torchmetrics leaves states as they are


def test_sums_are_as_exact_as_elsewhere(mps):
    """In float32 the ones are lost: 2^24 + 1 is 2^24."""
    for rows in (torch.tensor([2.0**24, 1, 1, 1]), torch.tensor([[2.0**24, 0], [1, 0], [0, 1], [1, 0]])):
        assert [float(sum_in_float64(rows.to(device))) for device in ("cpu", mps)] == [2**24 + 3] * 2
    assert in_float64(torch.ones(2).to(mps)).dtype is torch.float64
    change, gram = torch.tensor([[4096.0], [1.0], [1.0]]), torch.eye(1)
    assert quadratic_form(change.to(mps), gram.to(mps)) == quadratic_form(change, gram) == 2**24 + 2


PACKAGE = Path(prune_callbacks.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}

MADE = re.compile(r"\.double\(\)|dtype=torch\.float64|, torch\.float64\)")
ALLOWED = {
    "allocation/lagrangian.py",  # on the CPU
    "contract.py",  # random numbers on the CPU
    "deploy/csr.py",  # a list of dtypes, for CPUs
    "deploy/timing.py",  # on the CPU
    "measure/perplexity.py",  # a state that is not moved to devices without float64
    "solvers/float64.py",
    "solvers/least_squares.py",  # on `float64_device`
    "solvers/statistics.py",  # of inputs that are float64
    "sparsity/selection.py",  # of scores that are float64
}


def test_float64_is_made_in_few_places():
    assert {name for name, text in SOURCES.items() if MADE.search(text)} == ALLOWED


POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "readline"}
CALLS = re.compile(
    r"\bos\.(fork|kill|getuid|geteuid|getpgid|setsid|statvfs|sched_\w+|mkfifo|chown|O_DIRECTORY|register_at_fork)\b"
    r"|\bsignal\.(SIGKILL|SIGALRM|SIGHUP|SIGUSR1|SIGCHLD|alarm|pause|pthread_\w+)\b"
)


def imported_at_once(text):
    """The modules that a file imports while it is imported itself."""
    found, nodes = set(), [ast.parse(text)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return found


def test_every_system_can_import_every_module():
    assert {name: found for name, text in SOURCES.items() if (found := imported_at_once(text) & POSIX)} == {}
    assert {name for name, text in SOURCES.items() if CALLS.search(text)} == set()
    assert imported_at_once("import fcntl\nif True:\n    import resource.x\n") == {"fcntl", "resource"}  # the control
    assert imported_at_once("def f():\n    import fcntl\n") == set()


def test_a_checkpoint_is_pruned_without_posix(monkeypatch, tmp_path):
    llama(1).save_pretrained(tmp_path / "source")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: ctypes.CDLL(name) if name else int(None))  # Windows: TypeError
    report = prune_checkpoint(tmp_path / "source", tmp_path / "target", Magnitude(Unstructured(0.5)), progress=False)
    assert report["sparsity"]["achieved"] == 0.5
    assert peak_memory(DEVICE) == 0
