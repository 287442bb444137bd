"""ShrinkModel: writes the smaller model when a fit ends."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_callbacks.anatomy.blocks import find_blocks, find_language_model
from prune_callbacks.anatomy.targets import find_targets, parameters_of
from prune_callbacks.callbacks.kinds import PrunesOnce, PruningCallback
from prune_callbacks.callbacks.lightning_internals import resumed_checkpoint
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.callbacks.lora_recovery import LoRARecovery
from prune_callbacks.callbacks.one_shot_prune import OneShotPrune
from prune_callbacks.deploy.shrinking import changed_settings, logits_difference, shrink
from prune_callbacks.memory import model_bytes
from prune_callbacks.pruners.questions import coupled
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.storage.model_card import write_model_card
from prune_callbacks.writing import replaced_folder, write_json


class ShrinkModel(PruningCallback):
    """
    Takes the removed channels and heads out of the model that `OneShotPrune(Structured(...))` pruned; see `shrink`.

    At the end of the fit it writes the smaller model into `dirpath/shrunk` (`save_pretrained`) and compares its logits
    with the logits of the module. It writes `dirpath/shrunk.json`: the parameters and bytes of both models, and the
    largest difference of the logits. The module stays unchanged.

    Args:
        dirpath: the run's folder.
        tokenizer: saved alongside the model.

    Attributes:
        model: the smaller model, on rank 0; None before the end of the fit.
        record: the content of `shrunk.json`; {} before.
    """

    needs_whole_weights = True

    def __init__(self, dirpath: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.dirpath = Path(dirpath)
        self.tokenizer = tokenizer
        self.model: PreTrainedModel | None = None
        self.record: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        lineup = Lineup(trainer)
        if not lineup.begins_fit(self, stage):
            return
        found = [callback.pruner for callback in lineup.all(PrunesOnce)]
        if found and not any(coupled(pruner) for pruner in found):
            raise ValueError(f"ShrinkModel needs OneShotPrune(Structured(Columns(...))), found {found}")
        self._check_adapters(trainer)
        if resumed_checkpoint(trainer) is None and trainer.is_global_zero:
            self._shrunk(trainer, pl_module)  # reports an error now, not after training

    @staticmethod
    def _check_adapters(trainer: Trainer) -> None:
        """Raises ValueError for a LoRARecovery that does not merge its update."""
        if any(not callback.masked for callback in Lineup(trainer).all(LoRARecovery)):
            raise ValueError(
                "ShrinkModel shrinks whole weights, and LoRARecovery(masked=False) keeps its adapter apart; use "
                "masked=True, which merges it"
            )

    @staticmethod
    def _blocks(trainer: Trainer) -> str | None:
        """Returns the name of the list of decoder blocks that OneShotPrune was given."""
        prune = Lineup(trainer).first(OneShotPrune)
        blocks = None if prune is None else prune.blocks
        if blocks is not None and not isinstance(blocks, str):
            raise ValueError(
                f"ShrinkModel shrinks the blocks of one list, and OneShotPrune was given blocks={blocks!r}"
            )
        return blocks

    @classmethod
    def _shrunk(cls, trainer: Trainer, pl_module: LightningModule) -> PreTrainedModel:
        """Returns the smaller model; ValueError if it cannot be made."""
        prune = Lineup(trainer).first(OneShotPrune)
        assert prune is not None
        if prune.report is None:
            raise ValueError("OneShotPrune has pruned nothing: the checkpoint was written without it")
        return shrink(find_language_model(pl_module), prune.report.masks, blocks=cls._blocks(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or Lineup(trainer).trial() is not None:
            return
        whole = find_language_model(pl_module)
        self.model = self._shrunk(trainer, pl_module)
        windows = getattr(trainer.datamodule, "evaluation_windows", None)
        tokens = torch.arange(64)[None] if windows is None else windows[:1]
        folder = self.dirpath / "shrunk"
        with replaced_folder(folder) as partial:
            self.model.save_pretrained(partial)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(partial)
            blocks = find_blocks(self.model, self._blocks(trainer))
            zeros = MaskSet.from_nonzero(parameters_of(find_targets(blocks).values()))
            write_model_card(partial, zeros.sparsity(), len(zeros), note="Removed channels and heads are taken out.")
        self.record = {
            "parameters": {name: _parameters(m) for name, m in (("whole", whole), ("shrunk", self.model))},
            "parameter_bytes": {name: model_bytes(m) for name, m in (("whole", whole), ("shrunk", self.model))},
            "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "configuration": changed_settings(whole, self.model),
            "logits_difference": logits_difference(whole, self.model, tokens),
        }
        write_json(self.dirpath / "shrunk.json", self.record)
        counts = self.record["parameters"]
        changes = ", ".join(f"{name} {old} to {new}" for name, (old, new) in self.record["configuration"].items())
        rank_zero_info(
            f"{counts['whole']:,} parameters shrunk to {counts['shrunk']:,}, logits differ by at most "
            f"{self.record['logits_difference']:.1e}; {changes}; in {folder}"
        )


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
