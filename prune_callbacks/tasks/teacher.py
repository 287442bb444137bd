"""The frozen dense model that a student learns from: whole, or in rows over all processes."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from prune_callbacks.streaming.source import CheckpointFolder
from prune_callbacks.tasks.batches import taken
from prune_callbacks.tasks.from_path import FromPath, local_folder, shard_by_blocks

Given = PreTrainedModel | str | Path


class Teacher:
    """
    A frozen dense model that is no submodule of any module, so that checkpoints do not include it.

    Args:
        given: the model; or a folder, or a name on the Hub, from which it is built when it is first used. Of several
            processes each then holds only its rows of every weight, whatever the strategy (FSDP2).
        dtype: dtype to which it is converted; None: its own.

    Raises:
        ValueError: it is neither a model nor a path, or there is no such dtype.
    """

    def __init__(self, given: Given, dtype: torch.dtype | str | None) -> None:
        if not isinstance(given, Given):
            raise ValueError(f"a teacher is a model of transformers, or the path of one, got {given!r}")
        self.dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise ValueError(f'a teacher\'s dtype is a torch.dtype or its name, such as "bfloat16", got {dtype!r}')
        self.model = given if isinstance(given, PreTrainedModel) else None
        self._path = None if isinstance(given, PreTrainedModel) else given

    def prepare(self, student: PreTrainedModel, fields: tuple[str, ...]) -> None:
        """Checks that the teacher fits the student, then freezes it and converts its dtype."""
        configs = [each.get_text_config(decoder=True) for each in (student.config, self._config(student))]
        for field in fields:
            ours, theirs = (getattr(config, field) for config in configs)
            if ours != theirs:
                raise ValueError(
                    f"the teacher has {field}={theirs} and the model {ours}: they cannot be compared. Use the dense "
                    "model that was pruned, or another one with the same vocabulary and shape"
                )
        if self.model is not None:
            _freeze(self.model)
            if self.dtype is not None:
                self.model.to(dtype=self.dtype)  # type: ignore[call-arg]

    def _config(self, student: PreTrainedModel) -> Any:
        """Returns the configuration; raises ValueError for a model that shares weights with the student."""
        if self.model is None:
            assert self._path is not None
            return CheckpointFolder(local_folder(self._path)).config
        if {id(p) for p in student.parameters()} & {id(p) for p in self.model.parameters()}:
            raise ValueError(
                "the teacher is the model that is trained; load it a second time, or copy it before pruning"
            )
        return self.model.config

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any], **kwargs: Any) -> Any:
        """Returns the teacher's output; where it is in rows, a collective of all processes."""
        device = inputs["labels"].device
        model = self._on(device)
        given = taken(model, {key: value for key, value in inputs.items() if key != "labels"})
        if "inputs_embeds" in given:
            width = given["inputs_embeds"].shape[-1]
            if width != (own := model.config.get_text_config(decoder=True).hidden_size):
                raise ValueError(
                    f"a batch has inputs_embeds of width {width}, and the teacher's are {own} wide; give input_ids, or "
                    "use a teacher of the model's width"
                )
            given["inputs_embeds"] = given["inputs_embeds"].to(model.dtype)
        with torch.autocast(device.type, enabled=False):  # use the dtype of the teacher, not the precision of training
            return model(**given, use_cache=False, **kwargs)

    def _on(self, device: torch.device) -> PreTrainedModel:
        """Returns the model on a device; builds it if it is not there yet."""
        if self.model is None:
            assert self._path is not None
            # Not in prepare, which may run inside of DeepSpeed's own init.
            self.model = _built(FromPath(self._path, self.dtype), device)
            _freeze(self.model)
        self.model.to(device)  # type: ignore[arg-type]
        return self.model


def _built(source: FromPath, device: torch.device) -> PreTrainedModel:
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if count == 1:
        return source.whole()
    mesh = init_device_mesh(device.type, (count,))
    return source.in_rows(partial(shard_by_blocks, mesh=mesh, reshard_after_forward=True), device)


def _freeze(model: PreTrainedModel) -> None:
    model.requires_grad_(False).eval()  # type: ignore[no-untyped-call]
