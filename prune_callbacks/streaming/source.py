"""Reading a checkpoint of safetensors files, a few tensors at a time."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from prune_callbacks.streaming.files import DTYPES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECE_BYTES = 2**24
"""How much of a tensor that is only copied is held at a time."""

SAMPLES, SAMPLE_BYTES = 64, 4096
"""How much of a file tells it from another one of its size."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor is, and what it is like."""

    file: Path
    dtype: torch.dtype | None  # None: one that no weight of a model has that can be pruned
    shape: tuple[int, ...]
    dtype_name: str


class CheckpointFolder:
    """
    The tensors of a Hugging Face folder by name, none of which is read before it is asked for.

    Args:
        source: a folder with `config.json` and either `model.safetensors` or an index and its files.

    Raises:
        ValueError: it is no such folder, it is quantized or of adapters, its index does not fit, or one of its files is
            damaged.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = Path(source)
        self._check_folder()
        self.config = self._read_config()
        self.files = self._find_files()
        self.entries = self._read_entries()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors in memory of their own."""
        return {name: view.clone() for name, view in self.views(names).items()}

    def views(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors on the file itself, of which only what is looked at comes into memory."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        found: dict[str, Tensor] = {}
        for path, inside in by_file.items():
            with _opened(path) as file:
                found |= {name: file.get_tensor(name) for name in inside}
        return found

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor in consecutive pieces along its first dimension."""
        entry = self.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        row_bytes = max(1, (entry.dtype or torch.uint8).itemsize * torch.Size(entry.shape[1:]).numel())
        step = max(1, PIECE_BYTES // row_bytes)
        for begin in range(0, rows, step):
            # Opened anew every time: a file that stays open keeps all that was read of it in memory.
            with _opened(entry.file) as file:
                yield file.get_slice(name)[begin : begin + step] if entry.shape else file.get_tensor(name)

    def fingerprint(self) -> dict[str, str]:
        """A hash of the configuration, and of every file one of its size, when it was changed, and samples of it."""
        config = (self.folder / "config.json").read_bytes()
        marks = {"config.json": hashlib.sha256(config).hexdigest()[:16]}
        for path in self.files:
            size = path.stat().st_size
            digest = hashlib.sha256(f"{size} {path.stat().st_mtime_ns}".encode())
            with path.open("rb") as file:
                for sample in range(SAMPLES):
                    file.seek(sample * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
            marks[path.name] = digest.hexdigest()[:16]
        return marks

    def _check_folder(self) -> None:
        if not self.folder.is_dir():
            found = "is a file" if self.folder.is_file() else "does not exist"
            raise ValueError(
                f"source {self.folder} {found}; name a folder with config.json and safetensors files. A model of the "
                "Hub is downloaded first: huggingface_hub.snapshot_download(name)"
            )
        if (self.folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{self.folder} holds adapters (adapter_config.json), not a whole model: merge them into the model "
                "that they were trained on, save that, and name its folder"
            )
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"there is no config.json in {self.folder}; without it the model's shape is not known")

    def _read_config(self) -> PretrainedConfig:
        config: PretrainedConfig = AutoConfig.from_pretrained(self.folder)
        quantization: Any = getattr(config, "quantization_config", None)
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise ValueError(
                f"{self.folder} is quantized (quantization_config in config.json: {method}); quantized weights cannot "
                "be pruned. Load it dequantized and save that"
            )
        return config

    def _find_files(self) -> list[Path]:
        if (self.folder / SINGLE).is_file():  # as transformers, which looks for it first
            self._places: dict[str, str] | None = None
            return [self.folder / SINGLE]
        if not (self.folder / INDEX).is_file():
            others = sorted(
                p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5")
            )
            raise ValueError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}"
                + (f"; it has {', '.join(others[:3])}. Pickles can run code and are never loaded: " if others else ". ")
                + "write the model with save_pretrained, which makes safetensors files, and name that folder"
            )
        try:
            self._places = dict(json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / INDEX} is damaged: {error!r}; download it again") from error
        files = [self.folder / name for name in sorted(set(self._places.values()))]
        for path in files:
            if not path.is_file():
                raise ValueError(f"{path} is missing, and {INDEX} says that it has tensors; download it again")
        return files

    def _read_entries(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for path in self.files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if self._places is None or self._places.get(name) == path.name:
                        part = file.get_slice(name)
                        kind = part.get_dtype()
                        entries[name] = Entry(path, DTYPES.get(kind), tuple(part.get_shape()), kind)
        lost = [name for name in self._places or () if name not in entries]
        if lost:
            file_name = (self._places or {})[lost[0]]
            raise ValueError(
                f"{len(lost)} tensors are missing, first {lost[0]}: {INDEX} says that it is in "
                f"{self.folder / file_name}, and it is not; download both again"
            )
        return entries


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): it is truncated or damaged; download it again"
        ) from error
