"""
Compares forms of block reconstruction, of which the library has the best: losses, targets, windows, learning rates.

    python benchmarks/reconstruction_search.py WINDOWS.safetensors [--held-out TEXT.jsonl] [--forms "plain error" ...]

ALPS prunes the first blocks of a model of Llama's kind to 2:4, one after the other, and each is trained in one of the
forms below before the next; all other blocks stay dense, so perplexity shows what these blocks cost. WINDOWS and TEXT
are as in `benchmarks/reconstruction.py`; no window is held out. Written apart from the library, which has no switches
for what is worse. Results are written after every form; run again, and what is finished is not measured twice.
"""

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reconstruction import measure, read_windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prune_callbacks import ALPS, NM, Gram
from prune_callbacks.calibration.batches import to_device
from prune_callbacks.calibration.capture import hidden_of
from prune_callbacks.calibration.chain import chain_inputs
from prune_callbacks.calibration.stand_ins import BlockInputs
from prune_callbacks.storage.cells import open_results
from prune_callbacks.writing import write_json

Loss = Callable[[Tensor, Tensor, nn.Module], Tensor]
"""Of output, target and the norm in front of the next block."""


def relative(output: Tensor, target: Tensor, _: nn.Module) -> Tensor:
    return ((output - target).square().sum(-1) / target.square().sum(-1)).mean()


def plain(output: Tensor, target: Tensor, _: nn.Module) -> Tensor:
    return (output - target).square().mean()


def after_norm(output: Tensor, target: Tensor, norm: nn.Module) -> Tensor:
    return (norm(output) - norm(target)).square().mean()


@dataclass(frozen=True)
class Form:
    """
    A form of reconstruction.

    Args:
        passes: over the windows; 0: none.
        learning_rate: relative to the root mean square of a parameter's kept values; `absolute`: as it is.
        batch: windows per step.
        loss: of a block's output.
        own_target: the target is the dense block's output on the pruned model's hidden states, not on its own.
        further: how many dense blocks behind the trained one run too, each with its loss.
        halves: attention is trained first, with the hidden states between the halves as target, then the MLP.
        again: whether masks are chosen again after the training, with pruned weights at their dense values, and the
            block is trained once more.
        adapted: passes in which the dense block is trained before it is pruned.
        correction: strength of the closed-form correction of every layer's target before pruning (GPTAQ, ICML 2025).
        norms: whether norms are trained too.
    """

    passes: int = 3
    learning_rate: float = 0.01
    absolute: bool = False
    batch: int = 1
    loss: Loss = relative
    own_target: bool = False
    further: int = 0
    halves: bool = False
    again: bool = False
    adapted: int = 0
    correction: float = 0.0
    norms: bool = True


FORMS = {
    "no reconstruction": Form(passes=0),
    "3 passes, as the library": Form(),
    "learning rate 0.005": Form(learning_rate=0.005),
    "learning rate 0.02": Form(learning_rate=0.02),
    "learning rate 0.001, the same for all": Form(learning_rate=0.001, absolute=True),
    "4 windows per step": Form(batch=4),
    "6 passes": Form(passes=6),
    "plain error": Form(loss=plain),
    "error after the next norm": Form(loss=after_norm),
    "target: dense block on pruned inputs": Form(own_target=True),
    "loss behind the next block too": Form(further=1),
    "attention, then MLP": Form(halves=True),
    "masks chosen again": Form(again=True),
    "dense block adapted first": Form(adapted=1),
    "correction 0.25, no reconstruction": Form(passes=0, correction=0.25),
    "correction 1, no reconstruction": Form(passes=0, correction=1.0),
    "correction 0.25": Form(correction=0.25),
    "norms as they are": Form(norms=False),
}
READERS = {  # the layers with one input, by the first of them
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def run(block: nn.Module, inputs: BlockInputs, number: int, hidden: Tensor) -> Tensor:
    """Returns a block's output on hidden states, with the other arguments of that call."""
    args, kwargs = to_device(inputs.calls[number], torch.device("cpu"))
    assert isinstance(inputs.place, int)
    return hidden_of(block(*args[: inputs.place], hidden, *args[inputs.place :], **kwargs))


def between(block: nn.Module, inputs: BlockInputs, number: int, hidden: Tensor) -> Tensor:
    """Returns the hidden states behind a block's attention."""
    found: list[Tensor] = []
    hook = block.get_submodule("post_attention_layernorm").register_forward_pre_hook(
        lambda _, args: found.append(args[0])
    )
    run(block, inputs, number, hidden)
    hook.remove()
    return found[0]


def prune(block: nn.Module, pruned: list[BlockInputs], dense: list[BlockInputs], strength: float) -> None:
    """Prunes a block by ALPS; with a `strength`, every layer's target is corrected for the error of its inputs."""
    layers = {name: block.get_submodule(name) for names in READERS.values() for name in names}
    seen: dict[str, Tensor] = {}
    hooks = [
        layers[name].register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)}))
        for name in READERS
    ]
    grams = {name: Gram(layers[name].weight.shape[1]) for name in READERS}
    crosses: dict[str, Tensor] = {}
    for number in range(len(pruned)):
        run(block, dense[number], 0, dense[number].hidden)
        before = dict(seen)
        run(block, pruned[number], 0, pruned[number].hidden)
        tokens = pruned[number].hidden.flatten(0, 1).norm(dim=1, keepdim=True)
        for name, value in seen.items():
            grams[name].update(value)
            # Outputs are added to the residual stream, in which tokens with enormous norms would decide everything.
            scale = 30 / tokens if name in ("self_attn.o_proj", "mlp.down_proj") else torch.ones_like(tokens)
            a, b = (value * scale).double(), (before[name] * scale).double()
            crosses[name] = crosses.get(name, 0) + torch.stack([a.T @ a, a.T @ (b - a)])
    for hook in hooks:
        hook.remove()
    pruner = ALPS(NM(2, 4))
    for leader, names in READERS.items():
        own, cross = crosses[leader]
        damped = own + 0.01 * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype)
        change = strength * torch.linalg.solve(damped, cross)  # of the identity, as seen by a weight from the right
        for name in names:
            weight = layers[name].weight
            wanted = (weight.double() + weight.double() @ change.T).float() if strength else weight
            weight.copy_(pruner.prune(wanted, grams[leader]).weight)


def train(
    form: Form,
    passes: int,
    block: nn.Module,
    outputs: Callable[[int, int], list[Tensor]],
    targets: list[list[Tensor]],
    norms: list[nn.Module],
    masks: dict[str, Tensor],
    names: str = "",
) -> None:
    """Trains the parameters of a block whose names begin as given, with their zeros held."""
    parameters = {n: p for n, p in block.named_parameters() if n.startswith(tuple(names.split())) or not names}
    parameters = {n: p for n, p in parameters.items() if form.norms or p.ndim == 2}
    rates = [
        form.learning_rate * (1 if form.absolute else float(p[p != 0].square().mean().sqrt()))
        for p in parameters.values()
    ]
    adam = torch.optim.Adam([{"params": [p.requires_grad_()]} for p in parameters.values()])
    count = len(targets)
    steps, done = passes * -(-count // form.batch), 0
    for _ in range(passes):
        for group in torch.randperm(count).split(form.batch):
            for part, rate in zip(adam.param_groups, rates, strict=True):
                part["lr"] = rate * (1 - done / steps)
            with torch.enable_grad():
                for number in group.tolist():
                    pairs = zip(outputs(number, len(targets[number])), targets[number], norms, strict=False)
                    (sum(form.loss(o, t, n) for o, t, n in pairs) / len(group)).backward()  # type: ignore[union-attr]
            for name, parameter in parameters.items():
                if name in masks and parameter.grad is not None:
                    parameter.grad.mul_(masks[name])
            adam.step()
            adam.zero_grad()
            done += 1
    block.requires_grad_(False)


@torch.no_grad()
def shrinkage(model: nn.Module, dense: nn.Module, windows: Tensor, blocks: int) -> float:
    """Returns the norm of what the trained blocks add to the residual stream over that in the dense model, a median."""
    ratios = []
    for window in windows.split(1):
        ways = [m.model(window, use_cache=False, output_hidden_states=True).hidden_states for m in (model, dense)]
        added, before = ((states[blocks] - states[0]).norm(dim=-1) for states in ways)
        ratios.append((added / before).flatten())
    return round(float(torch.cat(ratios).median()), 4)


@torch.no_grad()
def reconstructed(path: str, form: Form, blocks: int, calibration: Tensor) -> nn.Module:
    """Returns the model with its first blocks pruned and trained in one form."""
    torch.manual_seed(0)
    model, dense = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2))
    model.requires_grad_(False)
    dense.requires_grad_(False)
    whole = list(dense.model.layers)
    windows = list(calibration.split(1))
    pruned, before = (chain_inputs(m, list(m.model.layers), windows) for m in (model, dense))
    for index in range(blocks):
        block, original = model.model.layers[index], whole[index]
        behind = whole[index + 1 : index + 1 + form.further]
        norms = [layer.input_layernorm for layer in whole[index + 1 :]] + [dense.model.norm]

        def outputs(number: int, count: int, block: nn.Module = block, behind: Any = behind) -> list[Tensor]:
            found = [run(block, pruned[number], 0, pruned[number].hidden)]
            for layer in behind[: count - 1]:
                found.append(run(layer, pruned[number], 0, found[-1]))
            return found

        targets = []
        for given, own in zip(pruned, before, strict=True):
            hidden = given.hidden if form.own_target else own.hidden
            targets.append([run(original, own, 0, hidden)])
            for layer in behind:
                targets[-1].append(run(layer, own, 0, targets[-1][-1]))
        if form.adapted:
            train(form, form.adapted, block, outputs, targets, norms, {})
        prune(block, pruned, before, form.correction)
        masks = {name: value != 0 for name, value in block.named_parameters() if value.ndim == 2}
        rest = (form, form.passes, block)
        if form.halves:
            middle = [[between(original, own, 0, own.hidden)] for own in before]
            first = lambda n, _: [between(block, pruned[n], 0, pruned[n].hidden)]  # noqa: E731, B023
            train(*rest, first, middle, [block.post_attention_layernorm], masks, "self_attn input_layernorm")
            train(*rest, outputs, targets, norms, masks, "mlp post_attention_layernorm")
        else:
            train(*rest, outputs, targets, norms, masks)
        if form.again:
            for name, value in block.named_parameters():
                if name in masks:
                    value.copy_(torch.where(masks[name], value, original.get_parameter(name)))
            prune(block, pruned, before, form.correction)
            masks = {name: value != 0 for name, value in block.named_parameters() if value.ndim == 2}
            train(*rest, outputs, targets, norms, masks)
        assert all(bool((value[~masks[name]] == 0).all()) for name, value in block.named_parameters() if name in masks)
        for given, own in zip(pruned, before, strict=True):
            given.hidden, own.hidden = run(block, given, 0, given.hidden), run(original, own, 0, own.hidden)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("windows", type=Path)
    parser.add_argument("--model", help="a model of Llama's kind; SmolLM2-135M from its PyPI package by default")
    parser.add_argument("--held-out", type=Path, help="a .jsonl file of documents")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), metavar="FORM")
    parser.add_argument("--matmul-precision", default="medium", choices=("highest", "high", "medium"))
    results_path = Path(__file__).parent / "results/reconstruction_search_smollm2_135m.json"
    parser.add_argument("--results", type=Path, default=results_path)
    args = parser.parse_args()
    path, calibration, texts = read_windows(args.model, args.windows, args.held_out)
    torch.set_float32_matmul_precision(args.matmul_precision)
    setting = {"model": Path(path).name, "calibration": list(calibration.shape), "blocks": args.blocks, "seed": 0}
    setting |= {"matmul_precision": args.matmul_precision, "texts": {k: list(v.shape) for k, v in texts.items()}}
    results = open_results(args.results, setting)
    results["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name in args.forms:
        if name not in results["cells"]:
            begin = time.perf_counter()
            model = reconstructed(path, FORMS[name], args.blocks, calibration)
            seconds = round(time.perf_counter() - begin, 1)
            added = shrinkage(model, dense, texts["wikitext2"], args.blocks)
            results["cells"][name] = measure(model, texts) | {"seconds": seconds, "added_over_dense": added}
            write_json(args.results, results)
        cell = results["cells"][name]
        values = " | ".join(f"{cell[text]:.2f}" for text in texts)
        print(f"| {name} | {values} | {cell['added_over_dense']:.3f} | {cell['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
