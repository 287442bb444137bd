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

from prune_callbacks.storage.model_parts import INDEX
from prune_callbacks.streaming.files import DTYPES

SINGLE = "model.safetensors"
PIECE_BYTES = 2**24
"""Bytes per piece of a tensor that is only copied."""

SAMPLES, SAMPLE_BYTES = 64, 4096
"""The number and the bytes of the samples of a file that go into its fingerprint."""


@dataclass(frozen=True)
class Entry:
    """The file of a tensor, its shape, and its dtype."""

    file: Path
    dtype: torch.dtype | None  # None: a dtype that is not in `DTYPES`, so the tensor cannot be pruned
    shape: tuple[int, ...]
    dtype_name: str


class CheckpointFolder:
    """
    The tensors of a Hugging Face folder by name, read on demand.

    Args:
        source: a folder with `config.json` and either `model.safetensors` or an index and its files.

    Attributes:
        config: the configuration of the model.
        files: the safetensors files.
        entries: file, dtype and shape of every tensor, by name.

    Raises:
        ValueError: the folder has no such files, holds a quantized model or adapters, its index does not fit the files,
            or a file is damaged.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = Path(source)
        self._check_folder()
        self.config = self._read_config()
        self.files = self._find_files()
        self.entries = self._read_entries()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns copies of tensors, by name."""
        return {name: view.clone() for name, view in self.views(names).items()}

    def views(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns memory-mapped tensors by name; pages are read from the file on access."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        found: dict[str, Tensor] = {}
        for path, inside in by_file.items():
            with opened(path) as file:
                found |= {name: file.get_tensor(name) for name in inside}
        return found

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yields a tensor in consecutive pieces of about `PIECE_BYTES` along its first dimension."""
        entry = self.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        row_bytes = max(1, (entry.dtype or torch.uint8).itemsize * torch.Size(entry.shape[1:]).numel())
        step = max(1, PIECE_BYTES // row_bytes)
        for begin in range(0, rows, step):
            # Reopened for every piece: an open file keeps all pages that were read in memory.
            with opened(entry.file) as file:
                yield file.get_slice(name)[begin : begin + step] if entry.shape else file.get_tensor(name)

    def fingerprint(self) -> dict[str, str]:
        """Returns hashes by file name: of the configuration, and of size, mtime and samples of every file."""
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
                f"source {self.folder} {found}; name a folder with config.json and safetensors files. Download a model "
                "from the Hub first: huggingface_hub.snapshot_download(name)"
            )
        if (self.folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{self.folder} holds adapters (adapter_config.json), not a whole model: merge them into the model "
                "that they were trained on, save the result, and name its folder"
            )
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"there is no config.json in {self.folder}; it is needed for the shape of the model")

    def _read_config(self) -> PretrainedConfig:
        config: PretrainedConfig = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        quantization: Any = getattr(config, "quantization_config", None)
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise ValueError(
                f"{self.folder} is quantized (quantization_config in config.json: {method}); quantized weights cannot "
                "be pruned. Load the model dequantized, save it, and name that folder"
            )
        return config

    def _find_files(self) -> list[Path]:
        if (self.folder / SINGLE).is_file():  # transformers also looks for it first
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
            with opened(path) as file:
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
                f"{self.folder / file_name}, but it is not; download both again"
            )
        return entries


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens a safetensors file; raises ValueError, naming it, if it is truncated or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({error}): it is truncated or damaged; download it again"
        ) from error
