"""Matrices that torch's own modules keep outside of linear layers: of attention, recurrent layers, and others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from prune_callbacks.anatomy.convolution import CONVOLUTIONS
from prune_callbacks.anatomy.names import dotted
from prune_callbacks.anatomy.target import Target

Role = Literal["query", "key", "value", "output"]
ROLES: tuple[Role, ...] = ("query", "key", "value")

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LEFT_DENSE = (nn.MultiheadAttention, *RECURRENT, nn.Bilinear, *TRANSPOSED, *CONVOLUTIONS)
"""Modules of torch with matrices in parameters of their own, which stay dense if they are no targets."""


@dataclass(frozen=True)
class AttentionTarget(Target):
    """
    One of the four matrices of a `nn.MultiheadAttention`, which multiplies with them without calling a layer.

    The matrices of queries, keys and values are the three parts of `in_proj_weight`, (3 x out, in), in this order; or
    three parameters, if keys or values have another size than queries.

    Attributes:
        holder: the parameter's full name.
        attention: the module.
        role: what the matrix makes of its input.
        packed: whether the matrix is a part of `in_proj_weight`.
    """

    holder: str = ""
    attention: Any = None
    role: Role = "query"
    packed: bool = False

    seen_by = "attention"

    @property
    def parts(self) -> int:
        return len(ROLES) if self.packed else 1

    @property
    def parameter_name(self) -> str:
        return self.holder

    @property
    def layer(self) -> str:
        return self.holder.removesuffix(".weight").rpartition(".")[0]

    @property
    def stored_name(self) -> str:
        return self.name if self.packed else self.holder

    @property
    def _part(self) -> int:
        return ROLES.index(self.role) if self.packed else 0

    def part_of(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.parts)[self._part]


def attention_targets(name: str, module: nn.MultiheadAttention) -> Iterator[AttentionTarget]:
    """Yields the four matrices of an attention with full name `name`."""

    def of(own: str, attribute: str, role: Role, owner: nn.Module, *, part: str = "") -> AttentionTarget:
        path = dotted(name, own)
        holder = f"{path}.weight" if role == "output" else path
        return AttentionTarget(f"{path}{part}", owner, attribute, False, holder, module, role, bool(part))

    for role in ROLES:
        if module._qkv_same_embed_dim:
            yield of("in_proj_weight", "in_proj_weight", role, module, part=f".{role}")
        else:
            own = f"{role[0]}_proj_weight"
            yield of(own, own, role, module)
    yield of("out_proj", "weight", "output", module.out_proj)


@dataclass(frozen=True)
class RecurrentTarget(Target):
    """A matrix of a recurrent layer or cell, (gates x hidden, in): `weight_ih_l0` and others."""

    seen_by = "never"
    unseen = "the inputs of a recurrent layer's matrices are seen step by step inside of one function"

    @property
    def parameter_name(self) -> str:
        return self.name


def recurrent_targets(name: str, module: nn.Module) -> Iterator[RecurrentTarget]:
    """Yields the matrices of a recurrent layer with full name `name`."""
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 2:
            yield RecurrentTarget(dotted(name, own), module, own)


def other_matrices(parts: Sequence[tuple[str, nn.Module]], chosen: Mapping[str, Target]) -> dict[str, str]:
    """Returns why matrices in torch's own modules stay dense that are no targets, by the parameter's full name."""
    taken = {id(target.parameter) for target in chosen.values() if target.why_no_parameter is None}
    found: dict[str, str] = {}
    for part_name, part in parts:
        for name, module in part.named_modules():
            if not isinstance(module, LEFT_DENSE):
                continue
            kind = next(base.__name__ for base in type(module).__mro__ if base in LEFT_DENSE)
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1 and parameter.is_floating_point() and id(parameter) not in taken:
                    found[dotted(part_name, name, own)] = f"it is a parameter of a nn.{kind}, not taken by this pruner"
    return found
