"""Reads single weights from the checkpoints that Lightning's strategies write."""

import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from prune_callbacks.storage.safe_index import SafeReader

State = dict[str, Any]
NO_CHECKPOINT = (
    "it is no checkpoint of Lightning. Give a file or folder that a Trainer wrote (ModelCheckpoint, save_checkpoint), "
    "not weights alone, be it a state dict or {'state_dict': ...}"
)


class TrainingCheckpoint(ABC):
    """
    The weights of a checkpoint by name. Files are mapped into memory, and a weight is read on access only.

    Attributes:
        callbacks: the states of the callbacks, by class name.
        weights_only: whether it was written without the states of callbacks (`save_weights_only=True`).
        step: how many optimizer steps were finished.
    """

    def __init__(self, state: State, path: Path) -> None:
        _require(state, path, "global_step")
        self.callbacks: State = state.get("callbacks", {})
        self.weights_only = "callbacks" not in state
        self.step: int = state["global_step"]

    @abstractmethod
    def names(self) -> Collection[str]:
        """Returns the names of the weights in the LightningModule."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Returns one whole weight on the CPU: the fp32 master if the checkpoint has one."""


def open_checkpoint(path: str | Path) -> TrainingCheckpoint:
    """
    Opens a checkpoint of one device, DDP, FSDP2 (a folder, or one file) or DeepSpeed ZeRO-1, 2 or 3.

    Only tensors and plain values are unpickled, and from DeepSpeed's files also four classes of DeepSpeed.

    Raises:
        ValueError: there is no checkpoint at `path`, it holds other objects, or weights without a training's state.
    """
    folder = Path(path)
    if folder.is_file():
        return _File(folder)
    if (folder / ".metadata").is_file():
        return _Sharded(folder)
    for tag in ("checkpoint", "."):
        shards = sorted((folder / tag).glob("*_optim_states.pt"), key=_rank)
        if shards:
            return _Zero(shards)
    raise ValueError(f"there is no checkpoint at {path}: neither Lightning's file, nor a folder of FSDP2 or DeepSpeed")


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Returns the newest complete checkpoint (`*.ckpt`) in a folder; None if there is none."""
    found = [path for path in Path(folder).glob("*.ckpt") if _is_complete(path)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _is_complete(path: Path) -> bool:
    """Returns whether a checkpoint was written completely, as far as the files on this machine show."""
    if path.is_file():
        return True  # Lightning renames the file once it is complete
    if (path / "meta.pt").is_file():  # FSDP2
        return (path / ".metadata").is_file() and is_zipfile(path / "meta.pt")
    # DeepSpeed's ranks write separate files; a complete file of torch ends with the index of a zip file.
    files = list(path.glob("checkpoint/*_states.pt"))
    states = [file for file in files if file.name.endswith("_model_states.pt")]
    if not (path / "latest").is_file() or not states or not all(is_zipfile(file) for file in files):
        return False
    try:
        ranks: int = _load(states[0])["dp_world_size"]
    except ValueError:
        return True  # it holds more than plain values, so the number of ranks is unknown
    return sum("optim_states" in file.name for file in files) == ranks


def _load(path: Path) -> State:
    """Loads a file of tensors and plain values; raises ValueError if it holds other objects."""
    if not is_zipfile(path):
        raise ValueError(
            f"{path} is no file of torch.save (model.safetensors is none), or an incomplete one, so {NO_CHECKPOINT}"
        )
    try:
        state = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects that cannot be read safely, such as the arguments of save_hyperparameters(): {error}"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, so {NO_CHECKPOINT}")
    return dict(state)


def _require(state: State, path: Path, key: str) -> None:
    """Raises ValueError if a file lacks what every checkpoint of Lightning has."""
    if key not in state:
        first = ", ".join(map(repr, list(state)[:3]))
        raise ValueError(f"{path} has no {key!r}, its {len(state)} entries are {first}, ..., so {NO_CHECKPOINT}")


class _File(TrainingCheckpoint):
    """A checkpoint in one file, of one device, DDP or FSDP2."""

    def __init__(self, path: Path) -> None:
        state = _load(path)
        super().__init__(state, path)
        _require(state, path, "state_dict")
        self._weights: dict[str, Tensor] = state["state_dict"]

    def names(self) -> Collection[str]:
        return self._weights.keys()

    def read(self, name: str) -> Tensor:
        return self._weights[name]


class _Sharded(TrainingCheckpoint):
    """A folder of torch.distributed.checkpoint, written by `ModelParallelStrategy` (FSDP2)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_load(folder / "meta.pt"), folder)
        self._folder = folder
        described = SafeReader(folder).read_metadata().state_dict_metadata
        self._described = {
            name.removeprefix("state_dict."): data
            for name, data in described.items()
            if name.startswith("state_dict.") and isinstance(data, TensorStorageMetadata)
        }

    def names(self) -> Collection[str]:
        return self._described.keys()

    def read(self, name: str) -> Tensor:
        data = self._described[name]
        tensor = torch.empty(data.size, dtype=data.properties.dtype)
        load({"state_dict": {name: tensor}}, storage_reader=SafeReader(self._folder), no_dist=True)
        return tensor


class _Zero(TrainingCheckpoint):
    """
    A folder of DeepSpeed: a file with the flat fp32 masters of every rank, and files with the place of every weight.

    DeepSpeed's own zero_to_fp32 reads the same files, but for ZeRO-1 and 2 it needs memory for the whole model.
    """

    def __init__(self, shards: list[Path]) -> None:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            self._ranks = [_load(path)["optimizer_state_dict"] for path in shards]
            states = [_load(path) for path in sorted(shards[0].parent.glob("*_model_states.pt"), key=_rank)]
        super().__init__(states[0], shards[0].parent)
        self._stage_3 = "fp32_flat_groups" in self._ranks[0]
        self._shapes = {name: shape for group in states[0]["param_shapes"] for name, shape in group.items()}
        self._offsets = self._offsets_in_stage_3() if self._stage_3 else {}
        # Buffers and frozen weights have no master; ZeRO-3 shards the frozen weights.
        self._whole: dict[str, Tensor] = states[0]["module"]
        self._fragments = [state.get("frozen_param_fragments") or {} for state in states]
        self._frozen: State = states[0].get("frozen_param_shapes") or {}
        self._tied: dict[str, str] = dict(states[0].get("shared_params") or {})

    def names(self) -> Collection[str]:
        return {**self._shapes, **self._frozen, **self._whole}.keys()

    def read(self, name: str) -> Tensor:
        name = self._tied.get(name, name)
        if name not in self._shapes:
            if self._stage_3 and name in self._frozen:
                return _cut_to_shape((part[name] for part in self._fragments), self._frozen[name])
            return self._whole[name]
        pieces = self._pieces_in_stage_3(name) if self._stage_3 else self._pieces(name)
        return _cut_to_shape(pieces, self._shapes[name])

    def _pieces(self, name: str) -> Iterable[Tensor]:
        """Yields the ranks' flat parts of a weight under ZeRO-1 and 2."""
        for rank in self._ranks:
            for flat, places in zip(rank["single_partition_of_fp32_groups"], rank["param_slice_mappings"], strict=True):
                if name in places:
                    yield flat.narrow(0, places[name].start, places[name].numel)

    def _offsets_in_stage_3(self) -> dict[str, int]:
        """Returns the offset of every weight in a rank's flat masters under ZeRO-3."""
        offsets, offset = {}, 0
        for name, shape in self._shapes.items():
            offsets[name] = offset
            offset += math.ceil(shape.numel() / len(self._ranks))
        return offsets

    def _pieces_in_stage_3(self, name: str) -> Iterable[Tensor]:
        """Yields the ranks' flat parts of a weight under ZeRO-3."""
        size = math.ceil(self._shapes[name].numel() / len(self._ranks))
        for rank in self._ranks:
            offset = self._offsets[name]
            for flat in rank["fp32_flat_groups"]:  # one of them holds all of the weight's piece
                if offset < flat.numel():
                    yield flat.narrow(0, offset, size)
                    break
                offset -= flat.numel()


def _cut_to_shape(pieces: Iterable[Tensor], shape: torch.Size) -> Tensor:
    """Joins flat pieces to a tensor of a shape, without the padding of the last piece."""
    return torch.cat([piece.flatten() for piece in pieces])[: shape.numel()].view(shape)


def _rank(path: Path) -> int:
    """Returns the data-parallel rank in a file name such as zero_pp_rank_3_mp_rank_00_...; 0 without one."""
    parts = path.name.split("_")
    return int(parts[parts.index("pp") + 2]) if "pp" in parts else 0
