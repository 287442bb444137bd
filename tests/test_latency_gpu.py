"""Measuring on a device: `make gpu`."""

import json

import pytest
import torch
from fits import optimizer, trainer_of
from torch import nn
from torch.utils.data import DataLoader

from prune_callbacks import NM, CausalLM, Magnitude, MaskEnforcer, OneShotPrune
from prune_callbacks.callbacks.semi_structured_convert import SemiStructuredConvert
from prune_callbacks.callbacks.sparsity_benchmark import SparsityBenchmark
from prune_callbacks.deploy.conversion import is_converted
from prune_callbacks.deploy.csr import convert_to_csr_
from prune_callbacks.deploy.latency import layer_sweep, with_compiled
from prune_callbacks.deploy.timing import time_in_turns
from prune_callbacks.tasks import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SMALL = {"batches": (1,), "tokens": (1, 64), "prompt_tokens": (16,), "repeats": 3, "warmup": 2}


def test_events_see_the_device_work_and_the_memory_that_it_took():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    calls = {"one": lambda: x @ x, "four": lambda: [x @ x for _ in range(4)]}
    times = time_in_turns(calls, device, repeats=10, warmup=3, prepare=lambda _: torch.cuda.synchronize())
    assert 3 < times["four"].median / times["one"].median < 5
    assert x.nbytes <= times["one"].peak_bytes < 2 * x.nbytes
    assert 4 * x.nbytes <= times["four"].peak_bytes < 6 * x.nbytes


def test_layers_take_the_time_of_their_weights():
    """One token reads all weights once: no faster than memory, which caches would be."""
    layers = {"a": with_compiled({"dense": nn.Linear(8192, 8192, bias=False, device="cuda", dtype=torch.bfloat16)})}
    cells = layer_sweep(layers, [1, 64], repeats=10)
    assert not any(c["error"] for c in cells)
    assert all(8192 * 8192 * 2 / c["median"] < 9e12 for c in cells)  # bytes a second


def test_csr_is_refused_on_the_device():
    model = tiny_llama(hidden_size=64, layers=2).cuda()
    with pytest.raises(ValueError, match=r"is on cuda:0: CSR weights are for CPUs.*2:4"):
        convert_to_csr_(model)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("compiled", [False, None])
def test_a_fit_on_the_device_is_measured(convert, compiled, precision, tmp_path):
    benchmark = SparsityBenchmark(**SMALL, compiled=compiled)
    callbacks = [OneShotPrune(Magnitude(NM(2, 4)), progress=False), MaskEnforcer()]
    callbacks += [SemiStructuredConvert(progress=False)] * convert + [benchmark]
    module = CausalLM(tiny_llama(hidden_size=256, layers=2), optimizer)
    settings = {"accelerator": "gpu", "devices": 1, "precision": precision, "max_steps": 2}
    trainer = trainer_of(callbacks, tmp_path, **settings)
    trainer.fit(module, DataLoader(torch.randint(3, 200, (16, 16)), 4))
    converted = any(is_converted(m) for m in module.modules())
    assert converted is (convert and precision == "bf16-true")  # 2:4 takes 16 bits
    assert {p.device.type for p in module.parameters()} == {"cuda" if converted else "cpu"}
    made = json.loads((tmp_path / "latency.json").read_text())
    assert made["setting"]["kind"] == "cuda"
    assert made["setting"]["dtype"] == "bfloat16"
    expected = {"dense", "2:4"} | ({"dense compiled", "2:4 compiled"} if compiled is None else set())
    assert {c["variant"] for c in made["cells"]} == expected
    assert not [c for c in made["cells"] if c["error"] and "compiled" not in c["variant"]]
    assert all(c["peak_bytes"] > 0 for c in made["cells"] if not c["error"])
    sizes = {c["variant"]: c["weight_bytes"] for c in made["cells"] if c["phase"] == "decode"}
    assert sizes["2:4"] < sizes["dense"]
