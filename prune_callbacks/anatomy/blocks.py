"""Finding the decoder blocks of a model, and the layers in them that are pruned."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prune_callbacks.anatomy.experts import ExpertWeight, expert_weights, fused_parameters, routers

PRUNABLE = (nn.Linear, Conv1D)
"""Layer types whose `weight` is pruned. `Conv1D` is GPT-2's Linear with a weight of shape (in, out)."""


SPARSE = 0.01
"""The fraction of zeros from which on a tensor is taken for a pruned one."""


def find_language_model(module: nn.Module) -> nn.Module:
    """
    The outermost `transformers` model inside `module` (a LightningModule, a wrapper), else `module` itself.

    Of several (a student and its teacher), the only one that is trained.

    Raises:
        ValueError: there are several, and not exactly one has parameters that require gradients.
    """
    names = [name for name, m in module.named_modules() if isinstance(m, PreTrainedModel)]
    outer = [n for n in names if not any(n != o and (not o or n.startswith(o + ".")) for o in names)]
    trained = [n for n in outer if any(p.requires_grad for p in module.get_submodule(n).parameters())]
    if len(outer) > 1 and len(trained) != 1:
        raise ValueError(
            f"{type(module).__name__} holds {len(outer)} language models, {outer}, of which {len(trained)} are "
            "trained; one must be: freeze the others (model.requires_grad_(False))"
        )
    return module.get_submodule(trained[0] if len(outer) > 1 else outer[0]) if outer else module


def find_blocks(model: nn.Module, name: str | None = None) -> list[tuple[str, nn.Module]]:
    """
    The decoder blocks of a model, in order, as (name, module).

    Structure decides, not a table of model families: the blocks are the `nn.ModuleList` that lies in no other
    one and has as many members as the configuration has layers; of several, the one with most parameters.

    Args:
        model: a causal language model.
        name: the dotted name of the list of blocks, where the structure does not tell, e.g. "model.layers".

    Raises:
        ValueError: no list of blocks is found, or `name` is none.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if name is not None:
        if name not in lists:
            raise ValueError(f"blocks={name!r} is no nn.ModuleList of {type(model).__name__}; it has {sorted(lists)}")
        chosen = name
    else:
        outer = [n for n in lists if not any(n != o and n.startswith(o + ".") for o in lists)]
        depth = _configured_depth(model)
        candidates = [n for n in outer if len(lists[n]) == depth] or ([] if depth else outer)
        if not candidates:
            raise ValueError(
                f"no decoder blocks found in {type(model).__name__}: "
                + (
                    f"no nn.ModuleList has the configuration's {depth} layers. "
                    if depth
                    else "it has no nn.ModuleList. "
                )
                + f'Name the list of blocks with blocks="...", e.g. blocks="model.layers"; there are {sorted(lists)}'
            )
        chosen = max(candidates, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    return [(f"{chosen}.{i}", block) for i, block in enumerate(lists[chosen])]


def _configured_depth(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)


def find_targets(
    blocks: Sequence[tuple[str, nn.Module]], targets: Sequence[str] | str | None = None, *, experts: bool = False
) -> dict[str, nn.Module]:
    """
    The layers to prune inside the blocks, by full name, in the model's order.

    Args:
        blocks: what `find_blocks` returned.
        targets: shell-style patterns matched against full names ("*.mlp.*") or against the last part
            ("down_proj"); None for every `nn.Linear` and `Conv1D` in the blocks but the `routers`.
        experts: also the matrices of fused experts, as `ExpertWeight`. One is matched by its name, which ends in the
            expert's number ("*.experts.down_proj.3"), or for all experts by the parameter's ("down_proj").

    Raises:
        ValueError: a pattern matches nothing, or there is nothing to prune.
    """
    layers: dict[str, nn.Module] = {}
    owners: dict[tuple[int, int], str] = {}
    for name, layer in _prunable(blocks):
        if isinstance(layer, ExpertWeight) and not experts:
            continue
        owner = owners.setdefault(_identity(layer), name)
        if owner == name:
            layers[name] = layer
        else:
            warnings.warn(
                f"{name} shares its weight with {owner} and is pruned with it, on that one's inputs", stacklevel=3
            )
    if not layers:
        raise ValueError(
            "the decoder blocks hold no nn.Linear or Conv1D to prune. Packed or quantized layers cannot be pruned: "
            "load the model with its weights dequantized"
        )
    if targets is None:
        deciding = {f"{block_name}.{name}" for block_name, block in blocks for name in routers(block)}
        return {name: layer for name, layer in layers.items() if name not in deciding}
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("targets is empty, so nothing would be pruned; None prunes every linear layer of the blocks")
    for pattern in patterns:
        if not any(_matches(name, layer, pattern) for name, layer in layers.items()):
            first = {n: layer for n, layer in layers.items() if n.startswith(blocks[0][0] + ".")}
            shown = [f"{parameter_name(n, e)}.*" if isinstance(e, ExpertWeight) else n for n, e in first.items()]
            raise ValueError(
                f"target {pattern!r} matches no layer. The first block has {', '.join(dict.fromkeys(shown))}"
            )
    return {name: layer for name, layer in layers.items() if any(_matches(name, layer, p) for p in patterns)}


def matrices(blocks: Sequence[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """
    All weights in the blocks that may hold zeros of a pruning, by name, whatever is pruned by default.

    Those of every `nn.Linear` and `Conv1D`, routers of any kind, and tensors of experts, also of experts whose module
    does not say how it stores them.
    """
    found: dict[str, nn.Parameter] = {}
    for block_name, block in blocks:
        found |= {f"{name}.weight": layer.get_parameter("weight") for name, layer in _linear(block_name, block)}
        found |= {
            f"{block_name}.{name}.weight": block.get_submodule(name).get_parameter("weight") for name in routers(block)
        }
        found |= _fused(block_name, block)
    once = {id(parameter): name for name, parameter in reversed(found.items())}
    return {name: p for name, p in found.items() if once[id(p)] == name and p.is_floating_point()}


def sparse_experts(
    blocks: Sequence[tuple[str, nn.Module]], targets: Sequence[str] | str | None = None
) -> dict[str, nn.Parameter]:
    """
    Tensors of experts that hold 1 % of zeros or more, by name: what is left out where linear layers only are taken.

    Args:
        blocks: what `find_blocks` returned.
        targets: as of `find_targets`.
    """
    patterns = [targets] if isinstance(targets, str) else targets
    found = {name: parameter for block in blocks for name, parameter in _fused(*block).items()}
    return {
        name: parameter
        for name, parameter in found.items()
        if (patterns is None or any(_expert_matches(name, pattern) for pattern in patterns))
        and float((parameter.detach() == 0).float().mean()) >= SPARSE
    }


def _fused(block_name: str, block: nn.Module) -> dict[str, nn.Parameter]:
    """Tensors with a matrix for each of several experts."""
    return {
        ".".join(filter(None, (block_name, place, attribute))): parameter
        for place, _, attribute, parameter in fused_parameters(block)
    }


def _expert_matches(name: str, pattern: str) -> bool:
    return any(fnmatchcase(known, pattern) for known in (name, name.rsplit(".", 1)[-1], f"{name}.0"))


def _linear(block_name: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in _prunable([(block_name, block)]) if not isinstance(m, ExpertWeight))


def _prunable(blocks: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    for block_name, block in blocks:
        # peft keeps the layer that it adapts in base_layer, and its own small matrices beside that.
        adapted = [f"{name}." for name, layer in block.named_modules() if hasattr(layer, "base_layer")]
        for name, layer in block.named_modules():
            adapter = any(name.startswith(a) and name != f"{a}base_layer" for a in adapted)
            path = f"{block_name}.{name}" if name else block_name
            if isinstance(layer, PRUNABLE) and not adapter:
                yield path, layer
            for place, expert in expert_weights(layer):
                yield f"{path}.{place}", expert


def _identity(layer: nn.Module) -> tuple[int, int]:
    return (id(layer.fused), layer.index) if isinstance(layer, ExpertWeight) else (id(layer.weight), 0)


def _matches(name: str, layer: nn.Module, pattern: str) -> bool:
    whole = parameter_name(name, layer) if isinstance(layer, ExpertWeight) else name
    return any(fnmatchcase(known, pattern) for known in (name, whole, whole.rsplit(".", 1)[-1]))


def parameter_name(name: str, layer: nn.Module) -> str:
    """The name of the parameter that holds a layer's weight: of an expert, that of all experts."""
    return name.rpartition(".")[0] if isinstance(layer, ExpertWeight) else f"{name}.weight"


def stored_name(name: str, layer: nn.Module) -> str:
    """What a layer's weight is called in reports: the parameter, and of one that holds several experts which one."""
    return name if isinstance(layer, ExpertWeight) else f"{name}.weight"


def parameters_of(layers: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters that hold the layers' weights, by name; one that holds those of several experts is there once."""
    return {
        parameter_name(name, layer): layer.fused if isinstance(layer, ExpertWeight) else layer.get_parameter("weight")
        for name, layer in layers.items()
    }


def stored_input_first(layer: nn.Module) -> bool:
    """Whether the layer's weight is (in, out)."""
    return layer.input_first if isinstance(layer, ExpertWeight) else isinstance(layer, Conv1D)


def oriented(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A view of a layer's weight or mask as (out, in), and back: its own inverse."""
    return tensor.T if stored_input_first(layer) else tensor


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer's weight."""
    out, size = oriented(layer, layer.get_parameter("weight")).shape
    return out, size


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Puts the layer's name in front of what is raised or warned of inside."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except ValueError as error:
        raise type(error)(f"layer {layer}: {error}") from error
    for warning in caught:
        warnings.warn(f"layer {layer}: {warning.message}", warning.category, stacklevel=4)
