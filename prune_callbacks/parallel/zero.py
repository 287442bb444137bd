"""DeepSpeed ZeRO: the optimizer steps fp32 master copies, sharded over the ranks; forward passes use casts of them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from prune_callbacks.parallel.access import ParamAccess, Span
from prune_callbacks.ranks import Ranks
from prune_callbacks.sparsity import MaskSet

if TYPE_CHECKING:  # an extra
    from deepspeed import DeepSpeedEngine


class _ZeroAccess(ParamAccess):
    """The common part of all stages. `engine.optimizer` is ZeRO's optimizer, whose `optimizer` is torch's."""

    def __init__(self, module: nn.Module, masks: MaskSet, engine: "DeepSpeedEngine", ranks: Ranks) -> None:
        self._engine = engine
        self._zero: Any = engine.optimizer
        super().__init__(module, masks, [self._zero.optimizer], ranks)

    def mask_gradients(self) -> None:
        """
        Zeroes the gradients of pruned weights before the engine clips them.

        Lightning calls `on_before_optimizer_step` for every micro-batch under DeepSpeed. The accumulated gradients are
        complete only at the last one; at the others this does nothing.
        """
        if self._engine.is_gradient_accumulation_boundary():
            wait = getattr(self._zero, "_wait_for_offload_copies", None)  # ZeRO-1 and 2 copy asynchronously
            if wait is not None:
                wait()
            super().mask_gradients()
            self._mask_norms()

    def _mask_norms(self) -> None:
        # An offloaded optimizer computes norms while it copies gradients to the CPU, before they are masked.
        norms = getattr(self._zero, "norm_for_param_grads", {})
        if not norms:
            return
        for name, parameter in self._parameters().items():
            place = self._zero.get_param_id(parameter) if name in self._keep else None
            if place in norms:
                gradient = self._gradient(parameter)
                assert gradient is not None
                norms[place] = gradient.to(norms[place].dtype).norm(2).to(norms[place].device)


class Zero12Access(_ZeroAccess):
    """
    `ParamAccess` for ZeRO-1 and ZeRO-2.

    Every rank has all weights. It has masters, moments and averaged gradients for one contiguous part of all
    parameters laid end to end. This part may begin and end inside a parameter, and contain nothing of others.
    """

    def _span(self, parameter: Tensor) -> Span:
        address = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
        return Span(address.start, address.start + address.numel)

    def _owner(self, parameter: Tensor) -> Tensor | None:
        mapping = getattr(parameter, "_hp_mapping", None)  # frozen parameters have none
        if mapping is None:
            return None
        owner: Tensor = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        return owner

    def _piece(self, parameter: Tensor, whole: Tensor) -> Tensor:
        address = parameter._hp_mapping.get_hp_fragment_address()  # type: ignore[attr-defined]
        return whole.detach().narrow(0, address.start, address.numel)

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        gradient: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
        assert gradient.numel() == mapping.lp_fragment_address.numel
        return gradient

    def _copies(self, parameter: Tensor) -> Iterator[tuple[Span, Tensor]]:
        yield Span(0, parameter.numel()), parameter.detach()

    def _counts(self, parameter: Tensor) -> bool:
        # Frozen parameters have no mapping and are complete on every rank, so rank 0 counts them.
        return self.ranks.rank == 0 if not hasattr(parameter, "_hp_mapping") else parameter._hp_mapping is not None


class Zero3Access(_ZeroAccess):
    """
    `ParamAccess` for ZeRO-3.

    Every parameter is sharded over the ranks, with the last shard padded; so are masters, moments and gradients.
    """

    def _span(self, parameter: Tensor) -> Span:
        piece = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        start = min(self.ranks.rank * piece, parameter.ds_numel)  # type: ignore[attr-defined]
        return Span(start, min(start + piece, parameter.ds_numel))  # type: ignore[attr-defined]

    def _owner(self, parameter: Tensor) -> Tensor | None:
        place = self._zero.grad_position.get(self._zero.get_param_id(parameter))
        if place is None or not parameter.requires_grad:
            return None
        owner: Tensor = self._zero.fp32_partitioned_groups_flat[place[0]]
        return owner

    def _piece(self, parameter: Tensor, whole: Tensor) -> Tensor:
        _, start, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return whole.detach().narrow(0, start, self._span(parameter).size)

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        # safe_get_local_grad of deepspeed.utils would return a copy, not a view, if dtype or device differ.
        gradient, _ = self._zero._get_fp32_grad_state_partition(parameter, release_swap_buffers=True)
        return gradient.view(-1)[: self._span(parameter).size]  # type: ignore[no-any-return]

    def _copies(self, parameter: Tensor) -> Iterator[tuple[Span, Tensor]]:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        span = self._span(parameter)
        yield span, parameter.ds_tensor.detach().view(-1)[: span.size]  # type: ignore[attr-defined]
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            yield Span(0, parameter.ds_numel), parameter.detach()  # type: ignore[attr-defined]  # small ones persist
