"""The engine: prunes a model block by block, every block on the outputs of the pruned ones before it."""

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from prune_callbacks.calibration.blocks import find_blocks, find_targets, naming, oriented, weight_shape
from prune_callbacks.calibration.capture import Batch, BlockInputs, capture_inputs, run_block
from prune_callbacks.calibration.prune_report import LayerReport, PruneReport, peak_memory
from prune_callbacks.pruners import JointPruner, Pruned, Pruner, check_weight
from prune_callbacks.solvers import Gram, InputNorm
from prune_callbacks.solvers.linalg import row_dot
from prune_callbacks.sparsity import MaskSet

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def prune_sequentially(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    pruner: Pruner,
    *,
    targets: Sequence[str] | str | None = None,
    blocks: str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> PruneReport:
    """
    Prunes a causal language model in place, block by block.

    Equivalent to re-running the whole model, with all earlier blocks pruned, to collect the inputs of every
    block; each block's inputs are computed once from the previous block's outputs instead.

    Args:
        model: a `transformers` causal LM, or any module with an `nn.ModuleList` of blocks.
        batches: token ids (batch, tokens), or mappings with `input_ids` and maybe `attention_mask` (padding
            does not count toward the statistics). May be None for a pruner that needs no calibration.
        pruner: decides what goes and what becomes of the rest.
        targets: patterns of layer names; None for every Linear and Conv1D inside the blocks.
        blocks: name of the list of decoder blocks, where it cannot be found.
        device: where blocks are moved, one at a time, to be run and solved; None: where the model is.
        progress: show a progress bar.

    Raises:
        ValueError: before any work for targets, shapes or blocks that do not fit; on the way, naming the
            layer, for activations that are not finite or a Gram that cannot be factorised.
    """
    begin = time.perf_counter()
    model = getattr(model, "_orig_mod", model)  # torch.compile(model) wraps the model that is meant
    found = find_blocks(model, blocks)
    for block_name, block in found:
        _refuse_compiled(block_name, block)
    chosen = find_targets(found, targets)
    for name, layer in chosen.items():
        with naming(name):
            _check_weight(layer.get_parameter("weight"))
            pruner.pattern.check_shape(weight_shape(layer))
    forced = None if device is None else torch.device(device)
    calibrated = pruner.statistic(1) is not None
    if calibrated and batches is None:
        raise ValueError(f"{type(pruner).__name__} needs calibration batches, got None")
    if forced is not None and forced.type == "cuda":
        torch.cuda.reset_peak_memory_stats(forced)
    last = max(i for i, (block_name, _) in enumerate(found) if any(_inside(n, block_name) for n in chosen))
    run = _Run(pruner)
    if targets is None:
        run.note_fused(found)
    with _evaluating(model), _progress(len(chosen), progress) as (bar, task):
        inputs: list[BlockInputs] = []
        if calibrated and batches is not None:
            bar.update(task, description="embedding the calibration windows")
            inputs = capture_inputs(model, [block for _, block in found], batches)
        for index, (block_name, block) in enumerate(found[: last + 1]):
            layers = {n: m for n, m in chosen.items() if _inside(n, block_name)}
            bar.update(task, description=f"pruning {block_name}")
            home = next(block.parameters()).device
            where = forced or home
            block.to(where)
            statistics = run.collect(index, block, layers, inputs, where) if layers and inputs else {}
            for names in _sharing_an_input(layers, statistics, pruner):
                run.prune({name: layers[name] for name in names}, statistics.get(names[0]))
                bar.advance(task, len(names))
            del statistics
            if index < last:
                for batch in inputs:
                    batch.hidden = run_block(index, block, batch, where)
            block.to(home)
    if not run.layers:
        raise ValueError(
            f"nothing was pruned; all {len(run.skipped)} layers were skipped: {next(iter(run.skipped.values()))}"
        )
    return PruneReport(
        MaskSet.join(run.masks),
        tuple(run.layers),
        run.skipped,
        time.perf_counter() - begin,
        peak_memory(where),
        frozenset(run.input_first),
    )


class _Run:
    """The results gathered so far, and the two steps taken for every block."""

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self.masks: list[MaskSet] = []
        self.layers: list[LayerReport] = []
        self.skipped: dict[str, str] = {}
        self.input_first: set[str] = set()
        self.few_tokens = False

    def note_fused(self, blocks: Sequence[tuple[str, nn.Module]]) -> None:
        """Names weights that are matrices of several layers in one tensor (fused experts): they stay dense."""
        for block_name, block in blocks:
            for name, parameter in block.named_parameters():
                owner = block.get_submodule(name.rpartition(".")[0])
                if parameter.ndim == 3 and not isinstance(owner, CONVOLUTIONS):
                    self.skipped[f"{block_name}.{name}"] = "it holds the weights of several layers in one tensor"
        if self.skipped:
            warnings.warn(
                f"{len(self.skipped)} tensors stay dense, first {next(iter(self.skipped))}: they hold the weights of "
                "several layers (experts) in one tensor, which is not supported",
                stacklevel=3,
            )

    def collect(
        self,
        index: int,
        block: nn.Module,
        layers: dict[str, nn.Module],
        inputs: list[BlockInputs],
        where: torch.device,
    ) -> dict[str, Gram | InputNorm]:
        """Streams the layers' inputs into statistics; layers that get the same tensor share one."""
        statistics: dict[str, Gram | InputNorm] = {}
        leaders: dict[str, str] = {}
        seen: dict[int, tuple[Tensor, str]] = {}
        tokens: Tensor | None = None

        def observe(name: str, x: Tensor) -> None:
            # The tensor is held in `seen` for the length of one pass, so that its id stays its own.
            leader = seen.setdefault(id(x), (x, name))[1]
            if leaders.setdefault(name, leader) != leader:
                raise ValueError(f"{name} shares its input with {leaders[name]} in one batch and not in another")
            if leader != name:
                return
            if name not in statistics:
                made = self.pruner.statistic(x.shape[-1], where)
                assert made is not None
                statistics[name] = made
            if tokens is not None and x.shape[:2] == tokens.shape:
                x = x[tokens]
            elif tokens is not None and x.ndim == 2 and len(x) == tokens.numel():  # OPT's MLP sees flat tokens
                x = x[tokens.flatten()]
            statistics[name].update(x)

        hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
            for name, layer in layers.items()
        ]
        try:
            for batch in inputs:
                seen.clear()
                tokens = None if batch.tokens is None else batch.tokens.to(where)
                run_block(index, block, batch, where)
        finally:
            for hook in hooks:
                hook.remove()
            seen.clear()
        return {name: statistics[leader] for name, leader in leaders.items()}

    def prune(self, layers: dict[str, nn.Module], statistic: Gram | InputNorm | None) -> None:
        """Prunes layers that share their input in place, or notes why not."""
        name, first = next(iter(layers.items()))
        if statistic is None and self.pruner.statistic(1) is not None:
            reason = "its forward was never called during calibration, so nothing is known about its inputs"
            self.skipped[f"{name}.weight"] = reason
            warnings.warn(f"{name} stays dense: {reason}. Leave it out of `targets` to silence this.", stacklevel=3)
            return
        if statistic is not None and statistic.tokens < weight_shape(first)[1] and not self.few_tokens:
            self.few_tokens = True
            warnings.warn(
                f"{statistic.tokens} calibration tokens for the {weight_shape(first)[1]} input features of {name}: too "
                "few to tell features apart, and slow to solve for. Use several times as many tokens as features",
                stacklevel=3,
            )
        begin = time.perf_counter()
        weights = [oriented(layer, layer.get_parameter("weight").detach()) for layer in layers.values()]
        for name, weight in zip(layers, weights, strict=True):
            with naming(name):
                check_weight(weight, self.pruner.pattern)
        with naming(", ".join(layers)):
            if isinstance(self.pruner, JointPruner):
                results = self.pruner.prune_together(weights, statistic)
            else:
                results = [self.pruner.prune(weight, statistic) for weight in weights]
        seconds = time.perf_counter() - begin
        rows = sum(len(weight) for weight in weights)
        for (name, layer), weight, pruned in zip(layers.items(), weights, results, strict=True):
            self._replace(name, layer, weight, pruned, statistic, seconds * len(weight) / rows)

    def _replace(
        self,
        name: str,
        layer: nn.Module,
        weight: Tensor,
        pruned: Pruned,
        statistic: Gram | InputNorm | None,
        seconds: float,
    ) -> None:
        parameter_name, parameter = f"{name}.weight", layer.get_parameter("weight")
        relative = _relative_loss(weight, pruned, statistic)
        parameter.data.copy_(oriented(layer, pruned.weight))
        self.masks.append(MaskSet({parameter_name: oriented(layer, pruned.keep)}))
        if oriented(layer, parameter) is not parameter:
            self.input_first.add(parameter_name)
        sparsity = 1 - float(pruned.keep.float().mean())
        self.layers.append(LayerReport(parameter_name, weight_shape(layer), sparsity, pruned.loss, relative, seconds))


def _sharing_an_input(
    layers: dict[str, nn.Module], statistics: dict[str, Gram | InputNorm], pruner: Pruner
) -> list[list[str]]:
    """The layers in order, those together that a joint pruner can solve for together."""
    groups: dict[object, list[str]] = {}
    for name, layer in layers.items():
        weight, statistic = layer.get_parameter("weight"), statistics.get(name)
        joint = statistic is not None and isinstance(pruner, JointPruner)
        groups.setdefault((id(statistic), weight.dtype, weight.device) if joint else name, []).append(name)
    return list(groups.values())


def _relative_loss(weight: Tensor, pruned: Pruned, statistic: Gram | InputNorm | None) -> float | None:
    if pruned.loss is None or not isinstance(statistic, Gram):
        return None
    dense = weight.to(statistic.matrix)
    output = row_dot(dense @ statistic.matrix, dense)
    return pruned.loss / output if output > 0 else 0.0


def _check_weight(weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise ValueError(
            f"its weight is {weight.dtype}; quantized weights cannot be pruned, load the model dequantized"
        )
    if weight.is_meta:
        raise ValueError("its weight is on the meta device, without values; load the model into memory first")


def _refuse_compiled(name: str, block: nn.Module) -> None:
    if hasattr(block, "_orig_mod") or getattr(block, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"block {name} is compiled, so the inputs of its layers cannot be seen; prune before compiling"
        )


def _inside(name: str, block: str) -> bool:
    return name == block or name.startswith(block + ".")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def _progress(total: int, show: bool) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show) as bar:
        yield bar, bar.add_task("pruning", total=total)
