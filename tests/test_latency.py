import copy
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from fits import optimizer, trainer_of
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.utils.data import DataLoader
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from prune_callbacks import CausalLM, Magnitude, MaskEnforcer, OneShotPrune, Unstructured
from prune_callbacks.callbacks.sparsity_benchmark import SparsityBenchmark
from prune_callbacks.deploy.csr import convert_to_csr_
from prune_callbacks.deploy.latency import layer_sweep, model_sweep, stored_bytes, with_compiled
from prune_callbacks.deploy.timing import Failure, Timing, time_in_turns
from prune_callbacks.reporting.latency import latency_table, verdict
from prune_callbacks.reporting.latency_picture import draw_latency
from prune_callbacks.tasks import tiny_llama

CPU = torch.device("cpu")


def test_calls_take_turns_and_each_is_prepared_for():
    log = []
    calls = {name: lambda name=name: log.append(name) for name in "ab"}
    time_in_turns(calls, CPU, repeats=3, warmup=2, prepare=lambda name: log.append(f"for {name}"))
    pairs = list(zip(log[::2], log[1::2], strict=True))
    assert all(before == f"for {call}" for before, call in pairs)
    assert [call for _, call in pairs] == list("aabb" + "ab" * 3)


def test_times_are_those_of_known_calls_and_one_slow_turn_does_not_move_the_median():
    slow = iter([0.0, 1.0] + [0.0] * 20)  # the first turn that counts
    calls = {
        "20 ms": lambda: time.sleep(0.02),
        "40 ms": lambda: time.sleep(0.04),
        "20 ms, once 1020": lambda: time.sleep(0.02 + next(slow)),
    }
    times = time_in_turns(calls, CPU, repeats=9, warmup=1, prepare=lambda _: time.sleep(0.001))
    two, four, odd = times.values()
    assert 0.02 <= two.low <= two.median <= two.high
    assert 1.5 < four.median / two.median < 2.5
    assert odd.median < 1.5 * two.median
    assert odd.high > 2 * odd.median  # the spread shows it
    assert two.peak_bytes is None


def test_what_fails_is_named_and_the_others_go_on():
    count = iter(range(100))

    def breaks_later():
        if next(count) > 3:
            raise RuntimeError("out of memory")

    def refuses():
        raise NotImplementedError("no kernel")

    times = time_in_turns({"a": refuses, "b": lambda: None, "c": breaks_later}, CPU, repeats=5, warmup=1)
    assert times["a"] == Failure("NotImplementedError: no kernel")
    assert isinstance(times["b"], Timing)
    assert times["c"] == Failure("RuntimeError: out of memory")
    with pytest.raises(ValueError, match="a repeat and a warm-up call, got repeats=0"):
        time_in_turns({}, CPU, repeats=0)


def test_bytes_are_counted_as_stored():
    layer = nn.Linear(8, 4)
    layer.twin = layer.weight  # tied: once
    assert stored_bytes(layer) == 4 * (8 * 4 + 4)
    values, meta = torch.ones(32, 32, dtype=torch.bfloat16), torch.ones(32, 4, dtype=torch.int16)
    sparse = SparseSemiStructuredTensorCUTLASS(torch.Size([32, 64]), values, meta, None, None, None)
    packed = nn.Linear(64, 32, bias=False)
    packed.weight = nn.Parameter(sparse, requires_grad=False)
    assert stored_bytes(packed) == 32 * 32 * 2 + 32 * 4 * 2
    twin = copy.deepcopy(packed)  # SparsityBenchmark copies models that were converted
    assert type(twin.weight) is SparseSemiStructuredTensorCUTLASS
    assert twin.weight.packed.data_ptr() != values.data_ptr()


class Counting(nn.Linear):
    def forward(self, x):
        seen.append(tuple(x.shape))
        return super().forward(x)


seen = []


def test_layers_are_swept_over_tokens_and_a_failing_one_is_in_the_record():
    class Refusing(nn.Linear):
        def forward(self, x):
            if len(x) < 4:
                raise RuntimeError("at least 4 tokens")
            return super().forward(x)

    seen.clear()
    layers = {"one (8 x 16)": {"dense": Counting(16, 8), "other": Refusing(12, 8)}}
    cells = layer_sweep(layers, (1, 8), repeats=2, warmup=1)
    assert seen == [(1, 16)] * 3 + [(8, 16)] * 3
    by = {(c["variant"], c["tokens"]): c for c in cells}
    assert len(by) == len(cells) == 4
    refused = by["other", 1]
    assert refused["error"] == "RuntimeError: at least 4 tokens"
    assert refused["median"] is refused["speedup"] is refused["tokens_per_second"] is None
    fine = by["other", 8]
    assert fine["speedup"] == pytest.approx(by["dense", 8]["median"] / fine["median"])
    assert fine["tokens_per_second"] == pytest.approx(8 / fine["median"])
    assert fine["weight_bytes"] == 4 * (12 * 8 + 8)
    assert {(c["phase"], c["batch"], c["title"]) for c in cells} == {("layer", None, "one (8 x 16)")}
    json.dumps(cells, allow_nan=False)
    with pytest.raises(ValueError, match=r"layer b: the variants \['x'\] have none named 'dense'"):
        layer_sweep({"b": {"x": nn.Linear(2, 2)}}, [1])


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32))


def gemma2():
    """Windows of 8 tokens: its caches refuse to be cropped once they are full."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return Gemma2ForCausalLM(
        Gemma2Config(**sizes, num_hidden_layers=2, head_dim=8, vocab_size=50, sliding_window=8, pad_token_id=0)
    )


@pytest.mark.parametrize("make", [lambda: tiny_llama(hidden_size=32, layers=2), gpt2, gemma2])
def test_prefill_fills_a_new_cache_and_every_decoding_step_finds_the_same(make):
    model, calls = make().eval(), []
    forward = model.forward

    def watched(input_ids, past_key_values=None, logits_to_keep=0, use_cache=None):
        held = None if past_key_values is None else past_key_values.get_seq_length()
        result = forward(input_ids, past_key_values=past_key_values, logits_to_keep=logits_to_keep, use_cache=use_cache)
        calls.append((tuple(input_ids.shape), held, result.past_key_values.get_seq_length(), result.logits.shape[1]))
        return result

    model.forward = watched
    cells = model_sweep({"dense": model}, (1, 2), (4, 16), repeats=3, warmup=1)
    assert [(c["phase"], c["batch"], c["tokens"]) for c in cells] == [
        (phase, batch, tokens) for batch in (1, 2) for tokens in (4, 16) for phase in ("prefill", "decode")
    ]
    assert not any(c["error"] for c in cells)
    expected = []
    for batch in (1, 2):
        for tokens in (4, 16):
            expected += [((batch, tokens), None, tokens, 1)] * (4 + 1)  # and once to fill what is copied
            expected += [((batch, 1), tokens, tokens + 1, 1)] * 4
    assert calls == expected
    by = {(c["phase"], c["batch"], c["tokens"]): c for c in cells}
    assert by["prefill", 2, 16]["tokens_per_second"] == pytest.approx(32 / by["prefill", 2, 16]["median"])
    assert by["decode", 2, 16]["tokens_per_second"] == pytest.approx(2 / by["decode", 2, 16]["median"])


def test_models_without_logits_to_keep_and_failing_ones(tiny):
    class Whole(type(tiny)):
        def forward(self, input_ids, past_key_values=None, use_cache=None):
            return super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)

    whole, broken = copy.deepcopy(tiny).eval(), copy.deepcopy(tiny).eval()
    whole.__class__ = Whole
    broken.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.ones(3, 3))
    cells = model_sweep({"dense": tiny, "whole": whole, "broken": broken}, [1], [4], repeats=1, warmup=1)
    errors = {(c["variant"], c["phase"]): c["error"] for c in cells}
    assert "mat1 and mat2" in errors["broken", "prefill"]
    assert "mat1 and mat2" in errors["broken", "decode"]
    assert not any(error for (variant, _), error in errors.items() if variant != "broken")


def test_compiled_variants_stand_beside_theirs_and_giving_up_is_a_failure():
    def bad(graph, inputs):
        raise RuntimeError("this back end compiles nothing")

    layers = with_compiled({"dense": nn.Linear(4, 4)})
    assert list(layers) == ["dense", "dense compiled"]
    layers["dense compiled"] = torch.compile(layers["dense"], backend=bad)
    layers["fine compiled"] = torch.compile(layers["dense"], backend="eager")
    cells = layer_sweep({"a": layers}, (1, 2), repeats=1, warmup=1)
    errors = {(c["variant"], c["tokens"]): c["error"] for c in cells}
    assert all("compiles nothing" in errors["dense compiled", n] for n in (1, 2))
    assert errors["fine compiled", 1] is errors["fine compiled", 2] is None

    class Growing(nn.Linear):
        """Every call has a guard of its own: it recompiles until the limit."""

        calls = 0

        def forward(self, x):
            Growing.calls += 1
            return super().forward(x) * Growing.calls

    layers["dense compiled"] = torch.compile(Growing(4, 4), backend="eager", dynamic=False)
    cells = layer_sweep({"a": layers}, [2], repeats=12, warmup=1)
    assert "recompile" in cells[1]["error"]


def cell(variant, median, tokens=1, phase="decode", batch=1, spread=0.01, error=None, weight_bytes=2**20):
    times = dict.fromkeys(("median", "low", "high")) if error else {"median": median}
    times |= {} if error else {"low": median * (1 - spread), "high": median * (1 + spread)}
    title = "model" if phase in ("decode", "prefill") else "down (8 x 16)"
    place = {"title": title, "phase": phase, "batch": batch, "tokens": tokens, "variant": variant}
    known = {"tokens_per_second": 1.0, "speedup": None, "peak_bytes": None, "weight_bytes": weight_bytes}
    return place | times | known | {"error": error}


def record(cells, kind="cuda", **more):
    dense = {(c["title"], c["phase"], c["batch"], c["tokens"]): c for c in cells if c["variant"] == "dense"}
    for c in cells:
        if not c["error"]:
            c["speedup"] = dense[c["title"], c["phase"], c["batch"], c["tokens"]]["median"] / c["median"]
    where = {"kind": kind, "device": "NVIDIA X" if kind == "cuda" else "Some CPU", "threads": 1}
    return {"setting": where | {"dtype": "bfloat16", "torch": "2.13"}, "cells": cells, **more}


def test_the_verdict_names_where_sparse_wins_and_where_it_loses():
    cells = []
    for tokens, speed in ((1, 0.71), (2, 0.8), (4, 1.005), (8, 1.25), (16, 1.62), (32, 0.9)):
        cells += [cell("dense", 1.0, tokens), cell("dense compiled", 0.5, tokens)]
        cells += [cell("2:4", 1 / speed, tokens, weight_bytes=5 * 2**17)]
    cells += [cell("dense", 1.0, 64, "prefill", 4), cell("2:4", 2.0, 64, "prefill", 4, weight_bytes=5 * 2**17)]
    said = verdict(record(cells, left_out={"CSR": "it is for CPUs."}))
    assert said == [
        "Measured on NVIDIA X, bfloat16, torch 2.13.",
        "dense compiled is faster than dense in 6 of 6 cells, at best 2.00x (decode, batch 1, 1 token).",
        "2:4 is faster than dense in 2 of 7 cells, at best 1.62x (decode, batch 1, 16 tokens).",
        "2:4 is slower than dense in 4 of 7 cells: decode, batch 1, 1 to 2 tokens: 0.71x to 0.80x; "
        "decode, batch 1, 32 tokens: 0.90x; prefill, batch 4, 64 tokens: 0.50x.",
        "2:4 and dense cannot be told apart in 1 of 7 cells.",
        "2:4 is slower than dense compiled in 6 of 6 cells: decode, batch 1, 1 to 32 tokens: 0.35x to 0.81x.",
        "With 2:4 the model's weights take 0.625 MiB, 0.62 of dense's.",
        "CSR was left out: it is for CPUs.",
    ]


def test_the_verdict_knows_noise_failures_and_cpus():
    cells = [cell("dense", 1.0, spread=0.3), cell("CSR", 0.8, spread=0.3)]  # either median lies in the other's spread
    cells += [cell("dense", 1.0, 8, "layer", None), cell("CSR", 0.8, 8, "layer", None, error="RuntimeError: none")]
    csr = {"dense_bytes": 100, "csr_bytes": 41, "sparsity": 0.8, "break_even_sparsity": 0.5012}
    said = verdict(record(cells, "cpu", csr=csr))
    assert said == [
        "Measured on a CPU (Some CPU, 1 thread, bfloat16): this says nothing about GPUs.",
        "CSR and dense cannot be told apart in 1 of 1 cells.",
        "CSR failed in 1 of 2 cells, first at down (8 x 16), 8 tokens: RuntimeError: none",
        "With CSR the model's weights take 1 MiB, 1.00 of dense's.",
        "CSR takes fewer bytes than dense from 50.1% zeros on; these weights have 80.0%, "
        "and take 0.41 of dense's bytes.",
    ]
    for median, faster, slower in ((0.8, 1, 0), (1.25, 0, 1)):
        for spreads, sure in (((0.01, 0.01), 1), ((0.01, 0.3), 0), ((0.3, 0.01), 0)):
            pair = [cell("dense", 1.0, spread=spreads[0]), cell("CSR", median, spread=spreads[1])]
            said = " ".join(verdict(record(pair)))
            assert said.count("CSR is faster than dense in 1 of 1 cells, at best 1.25x") == faster * sure
            assert (
                said.count("CSR is slower than dense in 1 of 1 cells: decode, batch 1, 1 token: 0.80x") == slower * sure
            )
            assert said.count("cannot be told apart") == 1 - sure


def test_the_table_and_the_picture_show_every_cell(tmp_path):
    from rich.console import Console

    cells = [cell("dense", 1e-3), cell("2:4", 2e-3), cell("dense", 1e-5, 8, "layer", None)]
    cells += [cell("2:4", 1, 8, "layer", None, error="RuntimeError: none"), cell("dense", 2.0, 2)]
    made = record(cells)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(latency_table(made))
    text = console.export_text()
    assert "2 ms 0.50x" in text
    assert "10 us" in text
    assert "failed" in text
    assert "2 s " in text
    assert "down (8 x 16), 8 tokens" in text
    draw_latency(made, tmp_path / "new/latency.png")
    assert (tmp_path / "new/latency.png").stat().st_size > 10_000


SMALL = {"batches": (1,), "tokens": (1, 4), "prompt_tokens": (4,), "repeats": 2, "warmup": 1}


def fit(tmp_path, callbacks, **settings):
    module = CausalLM(tiny_llama(hidden_size=32, layers=2), optimizer)
    data = DataLoader(torch.randint(3, 200, (16, 16)), 4)
    trainer = trainer_of(callbacks, tmp_path, max_steps=2, **settings)
    trainer.fit(module, data)
    return module


class Look(MaskEnforcer):
    """Takes the bits of the module in front of the benchmark."""

    def on_fit_end(self, trainer, pl_module):
        self.before = {name: value.clone().view(torch.int32) for name, value in pl_module.state_dict().items()}
        self.modes = [m.training for m in pl_module.modules()]
        self.wanting = [p.requires_grad for p in pl_module.parameters()]


def test_a_fit_on_a_cpu_is_measured_and_the_module_left_as_it_is(tmp_path, capsys):
    look, benchmark = Look(), SparsityBenchmark(**SMALL)
    prune = OneShotPrune(Magnitude(Unstructured(0.8)), progress=False)
    module = fit(tmp_path, [prune, look, benchmark])
    after = module.state_dict()
    assert list(after) == list(look.before)
    assert all(torch.equal(value.view(torch.int32), look.before[name]) for name, value in after.items())
    assert [m.training for m in module.modules()] == look.modes
    assert [p.requires_grad for p in module.parameters()] == look.wanting
    written = json.loads((tmp_path / "latency.json").read_text())
    assert written == json.loads(json.dumps(benchmark.record))
    assert (tmp_path / "latency.png").stat().st_size > 10_000
    assert written["verdict"][0].startswith("Measured on a CPU")
    assert written["setting"]["dtype"] == "float32"
    assert written["zeros"] == pytest.approx(0.8, abs=0.01)
    assert written["csr"]["csr_bytes"] < written["csr"]["dense_bytes"]
    assert set(written["left_out"]) == {"2:4", "shrunk"}
    assert {c["variant"] for c in written["cells"]} == {"dense", "CSR"}
    assert {c["phase"] for c in written["cells"]} == {"layer", "prefill", "decode"}
    titles = {c["title"] for c in written["cells"] if c["phase"] == "layer"}
    assert titles == {
        "q_proj, o_proj (32 x 32)",
        "k_proj, v_proj (16 x 32)",
        "gate_proj, up_proj (96 x 32)",
        "down_proj (32 x 96)",
    }
    assert not any(c["error"] for c in written["cells"])
    assert len(written["cells"]) == 2 * (4 * 2 + 2)
    printed = capsys.readouterr().out
    assert "this says nothing about GPUs" in printed
    assert "decode, batch 1, 4 tokens" in printed


def test_the_default_needs_no_arguments_and_no_pruning(tmp_path):
    fit(tmp_path, [SparsityBenchmark()])
    assert json.loads((tmp_path / "latency.json").read_text())["csr"]["sparsity"] == 0


def test_whole_channels_that_are_zero_are_measured_as_a_smaller_model(tiny):
    with torch.no_grad():
        for layer in tiny.model.layers:
            layer.mlp.down_proj.weight[:, 48:] = 0
    made = SparsityBenchmark(**SMALL, compiled=False).measure(tiny, CPU)
    shrunk = [c for c in made["cells"] if c["variant"] == "shrunk"]
    assert {c["title"] for c in shrunk} == {"gate_proj, up_proj (96 x 32)", "down_proj (32 x 96)", "model"}
    assert not any(c["error"] for c in shrunk)
    sizes = {c["variant"]: c["weight_bytes"] for c in made["cells"] if c["phase"] == "prefill"}
    assert sizes["dense"] - sizes["shrunk"] == 2 * 4 * 3 * 48 * 32
    assert "shrunk" not in made["left_out"]


def test_prompts_that_do_not_fit_and_half_precision():
    model = gpt2().bfloat16()
    made = SparsityBenchmark(**SMALL | {"prompt_tokens": (4, 31, 32)}).measure(model, CPU)
    assert made["left_out"]["a prompt of 32 tokens"] == "the model has 32 positions"
    assert {c["tokens"] for c in made["cells"] if c["phase"] == "decode"} == {4, 31}
    assert "Conv1D" in made["left_out"]["CSR"]
    assert made["setting"]["dtype"] == "float32"
    assert next(model.parameters()).dtype == torch.bfloat16


def test_wrong_arguments_and_sharded_strategies_are_refused(tmp_path, unchecked):
    with pytest.raises(ValueError, match=r"tokens must be positive numbers, got \(0, 1\)"):
        SparsityBenchmark(tokens=(0, 1))
    with pytest.raises(ValueError, match="repeats and warmup must be at least 1, got 0 and 2"):
        SparsityBenchmark(repeats=0)
    with pytest.raises(ValueError, match="'nothing' matches no layer"):
        fit(tmp_path, [SparsityBenchmark(targets="nothing")])
    benchmark = SparsityBenchmark()
    trainer = trainer_of([benchmark], tmp_path)
    trainer.strategy.__class__ = ModelParallelStrategy
    with pytest.raises(ValueError, match="SparsityBenchmark does not work under ModelParallelStrategy"):
        benchmark.setup(trainer, None, "fit")
    trainer = trainer_of([benchmark], tmp_path)
    trainer.strategy._root_device = torch.device("mps")
    with pytest.raises(ValueError, match="times CPUs and CUDA devices, and this fit runs on mps"):
        benchmark.setup(trainer, None, "fit")


def load(name):
    path = Path(__file__).parent.parent / f"benchmarks/{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_for_csr_finds_where_it_breaks_even(tmp_path, monkeypatch, capsys):
    bench = load("csr")
    assert bench.break_even((0.5, 0.7, 0.9), (0.5, 0.9, 1.1)) == pytest.approx(0.8)
    assert bench.break_even((0.5, 0.7, 0.9), (1.2, 0.8, 1.2)) == pytest.approx(0.8)  # where it stays above
    assert bench.break_even((0.5, 0.7), (1.1, 1.2)) == 0.5
    assert bench.break_even((0.5, 0.7), (1.2, 0.9)) is None
    built = bench.pair((8, 20), 0.75)
    assert int((built["dense"].weight == 0).sum()) == 120
    assert torch.equal(built["CSR"].weight.to_dense(), built["dense"].weight)
    monkeypatch.setattr(bench, "SHAPES", {"smollm2": {"a": (16, 24)}})
    monkeypatch.setattr(sys, "argv", ["csr.py", "--repeats", "2", "--output", str(tmp_path / "r.json")])
    bench.main()
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [1, 64]
    assert all(len(row["speeds"]) == len(bench.SPARSITIES) for row in rows)
    assert rows[0]["bytes_over_dense"][0] > 1 > rows[0]["bytes_over_dense"][1]
    assert "break-even" in capsys.readouterr().out


def test_the_script_for_gpus_says_what_there_is_none_for(tmp_path, monkeypatch, capsys):
    bench, output = load("latency"), tmp_path / "r.json"
    monkeypatch.setattr(bench, "SHAPES", {"llama7b": {"a": (16, 24)}})
    command = "latency.py --device cpu --dtype float32 --eager --tokens 1 4 --repeats 2"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--output", str(output), "--picture", str(tmp_path / "p.png")])
    with pytest.warns(UserWarning, match="stays dense"):
        bench.main()
    made = json.loads(output.read_text())
    assert set(made["left_out"]) == {"2:4 cutlass", "2:4 cusparselt", "2:4 int8", "2:4 fp8"}
    assert len(made["cells"]) == 2
    assert math.isclose(made["cells"][0]["weight_bytes"], 16 * 24 * 4)
    assert (tmp_path / "p.png").is_file()
    weight = bench.two_four((16, 24), CPU, torch.float32).weight
    assert ((weight.view(16, 6, 4) != 0).sum(-1) == 2).all()
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["latency.py"])
        with pytest.raises(SystemExit):
            bench.main()
        assert "no CUDA device was found" in capsys.readouterr().err


def test_csr_layers_are_timed_in_the_model(tiny):
    sparse = copy.deepcopy(tiny)
    convert_to_csr_(sparse)
    cells = model_sweep({"dense": tiny.eval(), "CSR": sparse.eval()}, [1], [4], repeats=1, warmup=1)
    assert not any(c["error"] for c in cells)
