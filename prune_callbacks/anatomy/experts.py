"""Mixtures of experts whose matrices lie in one parameter: what is pruned there, and what is not."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NOT_TAKEN = "it holds the weights of several layers (experts) in one tensor, which this pruner does not take"
UNKNOWN = (
    "it holds the weights of several layers (experts) in one tensor, and its module does not say which dimension is "
    "the input (`is_transposed`)"
)
DECIDES = "it decides which experts a token goes to, and what they count"


def shape_of(parameter: Tensor) -> torch.Size:
    """A parameter's own shape, also where ZeRO-3 has partitioned it: there it is empty and carries it as `ds_shape`."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


class ExpertWeight(nn.Module):
    """
    One expert's matrix, a view of the parameter that holds those of all experts; a target as a linear layer is one.

    Its name is the parameter's with the expert's number: `model.layers.0.mlp.experts.gate_up_proj.3`.

    Args:
        owner: the module that has the parameter.
        attribute: the parameter's name there; of shape (experts, out, in), or (experts, in, out).
        index: the expert.
        input_first: whether the matrix is stored as (in, out).
    """

    def __init__(self, owner: nn.Module, attribute: str, index: int, input_first: bool) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it does not become a child of ours
        self.attribute = attribute
        self.index = index
        self.input_first = input_first

    @property
    def owner(self) -> nn.Module:
        """The module that has the parameter."""
        return self._owner[0]

    @property
    def fused(self) -> nn.Parameter:
        """The parameter that holds the matrices of all experts."""
        return self.owner.get_parameter(self.attribute)

    @property
    def weight(self) -> nn.Parameter:
        """The matrix as it is stored; changing it in place changes the parameter."""
        # Made anew each time: the parameter's data is another tensor once its block was moved.
        return nn.Parameter(self.fused.data[self.index], requires_grad=False)

    def get_parameter(self, target: str) -> nn.Parameter:
        """`weight`, as a linear layer's."""
        assert target == "weight"
        return self.weight


def not_seen(layer: nn.Module) -> str:
    """What is said of a layer of whose inputs calibration has learned nothing."""
    return "no product with it was seen" if isinstance(layer, ExpertWeight) else "its forward was never called"


def inside(name: str, module: str) -> bool:
    """Whether a dotted name is a module's, or of something in it."""
    return f"{name}.".startswith(f"{module}.")


def fused_parameters(block: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Parameters of a block that hold several matrices: (module's name, module, parameter's name there, parameter)."""
    for name, owner in block.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            shape = shape_of(parameter)
            several = len(shape) >= 3 and sum(size > 1 for size in shape) > 1  # RWKV has vectors of (1, 1, features)
            if several and not isinstance(owner, CONVOLUTIONS):
                yield name, owner, attribute, parameter


def expert_weights(owner: nn.Module) -> Iterator[tuple[str, ExpertWeight]]:
    """
    The matrices of a module of experts, by the parameter's name there and the expert's number.

    Only of modules that say how they store them: `is_transposed`, which transformers' interface for experts sets.
    """
    stored = getattr(owner, "is_transposed", None)
    for attribute, parameter in owner.named_parameters(recurse=False):
        shape = shape_of(parameter)
        if isinstance(stored, bool) and len(shape) == 3 and not isinstance(owner, CONVOLUTIONS):
            for index in range(shape[0]):
                yield f"{attribute}.{index}", ExpertWeight(owner, attribute, index, stored)


def routers(block: nn.Module) -> dict[str, str]:
    """
    What decides which experts a token goes to, in a block with fused experts: names of modules, and why they are dense.

    Structure decides: beside the experts, a weight with one output for every expert, or with a single one (the gate of
    a shared expert), that is its module's only one or stands directly beside them. A few weights, on which all that
    follows depends. Where experts stand in the block itself, all of its layers stand beside them: then those count only
    if nothing else decides.
    """
    found: dict[str, str] = {}
    beside: dict[str, str] = {}
    for place, _, _, fused in fused_parameters(block):
        above = place.rpartition(".")[0]
        for name, module in block.get_submodule(above).named_modules():
            path = f"{above}.{name}" if above and name else above or name
            shape = _matrix_shape(module)
            if not name or inside(path, place) or shape is None or shape[0] not in (1, shape_of(fused)[0]):
                continue
            parent = path.rpartition(".")[0]
            if parent == above:
                (found if above else beside)[path] = DECIDES
            elif sum(_matrix_shape(child) is not None for child in block.get_submodule(parent).children()) == 1:
                found[path] = DECIDES
    return found or beside


def _matrix_shape(module: nn.Module) -> torch.Size | None:
    """Of a module whose `weight` is a matrix, the weight's shape."""
    weight = getattr(module, "weight", None)
    return shape_of(weight) if isinstance(weight, Tensor) and len(shape_of(weight)) == 2 else None


def dense_in_mixtures(
    blocks: Sequence[tuple[str, nn.Module]], chosen: Mapping[str, nn.Module]
) -> tuple[dict[str, str], dict[str, str]]:
    """
    What stays dense where experts are fused, with the reason: tensors of experts that are no targets, and routers.

    Args:
        blocks: of the model.
        chosen: the layers to be pruned, by name.

    Raises:
        ValueError: experts are packed in integers.
    """
    fused: dict[str, str] = {}
    deciding: dict[str, str] = {}
    taken = {id(layer.fused) for layer in chosen.values() if isinstance(layer, ExpertWeight)}
    for block_name, block in blocks:
        for place, owner, attribute, parameter in fused_parameters(block):
            name = ".".join(filter(None, (block_name, place, attribute)))
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{name} holds experts packed in {parameter.dtype}, which cannot be pruned; load the model with "
                    "its weights dequantized (Mxfp4Config(dequantize=True) for GPT-OSS), or choose other layers with "
                    "`targets`"
                )
            if id(parameter) not in taken:
                fused[name] = NOT_TAKEN if isinstance(getattr(owner, "is_transposed", None), bool) else UNKNOWN
        deciding |= {f"{block_name}.{name}": reason for name, reason in routers(block).items()}
    return fused, {name: reason for name, reason in deciding.items() if name not in chosen}


def told_dense(fused: Mapping[str, str], deciding: Mapping[str, str]) -> list[str]:
    """What `dense_in_mixtures` found, as sentences for warnings: how many of either kind, and the first."""
    kinds = {"tensors": fused, "routers": deciding}
    return [
        f"{len(dense)} {kind} stay dense, first {first}: {dense[first]}"
        for kind, dense in kinds.items()
        for first in list(dense)[:1]
    ]
