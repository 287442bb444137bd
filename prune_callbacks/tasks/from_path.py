"""Builds a causal LM from a checkpoint: whole, or so that every rank reads and holds only its part of the weights."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from prune_callbacks.anatomy.blocks import NoBlocksError, find_blocks
from prune_callbacks.parallel.fsdp2 import local, span_of
from prune_callbacks.streaming.places import find_places
from prune_callbacks.streaming.skeleton import build_skeleton, model_dtype
from prune_callbacks.streaming.source import CheckpointFolder
from prune_callbacks.streaming.spans import Part, SpanReader


class FromPath:
    """
    A checkpoint, and the model that it holds, without values so far.

    Args:
        path: a folder with `config.json` and safetensors files, or a name on the Hub, from which it is downloaded.
        dtype: dtype of the weights; None: that of the configuration.

    Attributes:
        reader: what has been read so far.

    Raises:
        ValueError: the folder cannot be read in parts; see `CheckpointFolder` and `find_places`.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | str | None) -> None:
        self.folder = local_folder(path)
        checkpoint = CheckpointFolder(self.folder)
        self.dtype = model_dtype(checkpoint, dtype)
        self._empty = build_skeleton(checkpoint.config, self.dtype)
        self.reader = SpanReader(checkpoint, self._empty, find_places(self._empty, checkpoint))

    def whole(self) -> PreTrainedModel:
        """Returns the model with all its weights, by `from_pretrained`."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)
        return model

    def in_rows(self, shard: Callable[[PreTrainedModel], None], device: torch.device) -> PreTrainedModel:
        """
        Returns the model sharded by rows (FSDP2), with this rank's rows on its device.

        Args:
            shard: calls `fully_shard` on the model and its parts.
            device: the device of this rank.
        """
        model = self._empty.requires_grad_(True)
        computed = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
        shard(model)
        model.to_empty(device=device)
        for name, parameter in model.named_parameters():
            self.reader.fill(Part(name, span_of(parameter).start, local(parameter).view(-1)))
        for name, buffer in model.named_buffers():
            if name in computed:
                buffer.data = computed[name].to(device)  # such as rotary frequencies
        self._read_buffers(model, computed)
        return model

    def partitioned(self, strategy: DeepSpeedStrategy) -> PreTrainedModel:
        """
        Returns the model partitioned by DeepSpeed (ZeRO-3), one parameter after another.

        DeepSpeed flattens every parameter and gives each rank one part of it; the rank reads that part.
        """
        import deepspeed.comm

        model, init = self._empty, _partitioner(strategy)
        where = init.local_device
        made: dict[int, nn.Parameter] = {}  # tied ones are one
        for module in model.modules():
            for name, empty in module.named_parameters(recurse=False):
                if id(empty) not in made:
                    made[id(empty)] = nn.Parameter(torch.empty(empty.shape, dtype=empty.dtype, device=where))
                    init._convert_to_zero_parameters([made[id(empty)]])
                setattr(module, name, made[id(empty)])
        computed = {name for name, buffer in model.named_buffers() if not buffer.is_meta}
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device=where) if buffer.is_meta else buffer.to(where))
        for name, parameter in model.named_parameters():
            held: Any = parameter
            own = held.ds_tensor.data.view(-1)
            start = deepspeed.comm.get_rank(group=held.ds_process_group) * own.numel()
            self.reader.fill(Part(name, start, own[: max(0, held.ds_numel - start)]))
        self._read_buffers(model, computed)
        return model

    def _read_buffers(self, model: PreTrainedModel, computed: Collection[str]) -> None:
        """Reads the buffers that are not computed, but in the files."""
        for name, buffer in model.named_buffers():
            if name not in computed and name in self.reader.places:
                self.reader.fill(Part(name, 0, buffer.view(-1)))


def _partitioner(strategy: DeepSpeedStrategy) -> Any:
    """Returns DeepSpeed's initialisation of partitioned parameters, for those whose values are still to be read."""
    import deepspeed

    class Unread(deepspeed.zero.Init):  # type: ignore[misc]
        def _zero_init_param(self, param: nn.Parameter) -> None:
            # As DeepSpeed's, which first sends rank 0's values to all: every rank would touch every weight.
            self._convert_to_deepspeed_param(param)
            param.partition()  # type: ignore[attr-defined]

    return Unread(config_dict_or_path=strategy.config, remote_device=strategy.remote_device)


def shard_by_blocks(model: PreTrainedModel, mesh: DeviceMesh, *, reshard_after_forward: bool | None = None) -> None:
    """
    Shards a model by rows over a mesh (FSDP2): every decoder block is a group, and all the rest is one.

    Raises:
        ValueError: the blocks cannot be found.
    """
    try:
        blocks = find_blocks(model)
    except NoBlocksError as error:
        raise ValueError(
            f"CausalLM shards a model by its decoder blocks under ModelParallelStrategy: {error.reason}. Shard it "
            "yourself, by fully_shard in configure_model of a subclass"
        ) from error
    for _, block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)


def local_folder(path: str | Path) -> Path:
    """Returns the folder of a checkpoint; downloads one that is named as on the Hub, on the first rank of a machine."""
    if Path(path).exists() or str(path).count("/") != 1 or str(path).startswith((".", "/")):
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
