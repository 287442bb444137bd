"""SparsityBenchmark: measures the speed and the size of the sparse model when a fit has ended."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from prune_callbacks.anatomy.blocks import find_blocks, find_language_model
from prune_callbacks.anatomy.target import Target
from prune_callbacks.anatomy.targets import find_targets, sparse_experts
from prune_callbacks.callbacks.kinds import PruningCallback
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.deploy.conversion import Conversion, is_converted
from prune_callbacks.deploy.csr import CSRReport, convert_to_csr_
from prune_callbacks.deploy.latency import BASE, layer_sweep, model_sweep, with_compiled
from prune_callbacks.deploy.low_precision import two_four_name
from prune_callbacks.deploy.semi_structured import convert_, revert_
from prune_callbacks.deploy.shrinking import shrink
from prune_callbacks.reporting.latency import latency_table, setting, verdict
from prune_callbacks.reporting.latency_picture import draw_latency
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.writing import write_json


class SparsityBenchmark(PruningCallback):
    """
    Times dense and sparse variants of the module's language model in turns, and reports where sparse is slower.

    It acts in `on_fit_end`, on rank 0 and on the fit's device. It measures copies; the module stays unchanged. Put it
    last. After `SemiStructuredConvert` it measures the converted model. It measures one layer of every shape, and the
    whole model, prefill and decode separately. The dense model is compared with these variants, where they apply:

    - on a GPU "2:4" (`convert_`); all variants in bfloat16 if the weights are float32, which 2:4 kernels do not take
    - on a CPU "CSR" (`convert_to_csr_`); all variants in float32
    - on both "shrunk" (`shrink`), if whole channels or heads are zero

    The record has the reason for every variant that does not apply. Writes `latency.json` and `latency.png`, and prints
    a table and the verdict.

    Args:
        dirpath: folder of the files; None: the trainer's `default_root_dir`.
        batches: the numbers of sequences for the whole model.
        tokens: the numbers of tokens for single layers.
        prompt_tokens: the lengths of prompts for the whole model, in tokens.
        targets: patterns of layer names; None for all linear layers of the decoder blocks.
        blocks: name of the list of decoder blocks, where it cannot be found.
        repeats: the number of timed turns.
        warmup: the number of untimed calls before them.
        compiled: measure all variants under `torch.compile` too; every cell is compiled by itself. None: on a GPU only.

    Attributes:
        record: the content of `latency.json`; {} before.

    Raises:
        ValueError: a number is below 1.
    """

    needs_whole_weights = True

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        batches: Sequence[int] = (1, 4),
        tokens: Sequence[int] = (1, 16, 64, 256),
        prompt_tokens: Sequence[int] = (16, 128),
        targets: Sequence[str] | str | None = None,
        blocks: str | None = None,
        repeats: int = 10,
        warmup: int = 2,
        compiled: bool | None = None,
    ) -> None:
        for name, counts in (("batches", batches), ("tokens", tokens), ("prompt_tokens", prompt_tokens)):
            if not counts or min(counts) < 1:
                raise ValueError(f"SparsityBenchmark: {name} must be positive numbers, got {counts!r}")
        if repeats < 1 or warmup < 1:
            raise ValueError(f"SparsityBenchmark: repeats and warmup must be at least 1, got {repeats} and {warmup}")
        self.dirpath = dirpath
        self.batches = batches
        self.tokens = tokens
        self.prompt_tokens = prompt_tokens
        self.targets = targets
        self.blocks = blocks
        self.repeats = repeats
        self.warmup = warmup
        self.compiled = compiled
        self.record: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not Lineup(trainer).begins_fit(self, stage):
            return
        where = trainer.strategy.root_device.type
        if where not in ("cpu", "cuda"):
            raise ValueError(
                f"SparsityBenchmark times CPUs and CUDA devices, and this fit runs on {where}; leave it out"
            )
        self.record = {}
        if next(pl_module.parameters(), None) is not None:
            # Reports a wrong name now, not at the end of the fit.
            self._targets(find_language_model(pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or Lineup(trainer).trial() is not None:
            return
        rank_zero_info("SparsityBenchmark: measuring dense and sparse layers and models in turns")
        self.record = self.measure(find_language_model(pl_module), trainer.strategy.root_device)
        folder = Path(self.dirpath or trainer.default_root_dir)
        write_json(folder / "latency.json", self.record)
        draw_latency(self.record, folder / "latency.png")
        console = Console()
        console.print(latency_table(self.record))
        for sentence in self.record["verdict"]:
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Measures a model on a device and returns the content of `latency.json`; the model stays unchanged."""
        models, record = self.variants(model, device)
        dense = models[BASE]
        record["setting"] = setting(device, next(dense.parameters()).dtype)
        compiled = device.type == "cuda" if self.compiled is None else self.compiled
        sweep: dict[str, Any] = {"repeats": self.repeats, "warmup": self.warmup}
        layers = self.layers(models)
        if compiled:
            layers = {title: with_compiled(variants) for title, variants in layers.items()}
        record["cells"] = layer_sweep(layers, self.tokens, **sweep)
        if isinstance(dense, PreTrainedModel):
            positions = getattr(dense.config.get_text_config(decoder=True), "max_position_embeddings", None)
            prompts = [length for length in self.prompt_tokens if positions is None or length < positions]
            for length in sorted(set(self.prompt_tokens) - set(prompts)):
                record["left_out"][f"a prompt of {length} tokens"] = f"the model has {positions} positions"
            both = with_compiled(models) if compiled else models
            record["cells"] += model_sweep(both, self.batches, prompts, **sweep)
        else:
            record["left_out"]["the whole model"] = f"{type(dense).__name__} is no model of transformers"
        record["verdict"] = verdict(record)
        return record

    def variants(self, model: nn.Module, device: torch.device) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        """
        Returns the models to compare, by variant, and a record.

        The models are on the device and in evaluation mode, the dense one first. The record has `zeros` (a fraction),
        `left_out` (the reason for every missing variant) and, for a CSR variant, `csr` (its bytes and sparsity).
        """
        dense = copy.deepcopy(model).to(device).eval()
        converted = any(is_converted(layer) for layer in dense.modules())
        kernels = two_four_name(dense)
        if converted:
            revert_(dense)
        if device.type == "cpu" or next(dense.parameters()).dtype == torch.float32:
            dense.to(torch.float32 if device.type == "cpu" else torch.bfloat16)
        weights = {f"{name}.weight": dense.get_submodule(name).weight for name in self._targets(dense)}
        masks = MaskSet.from_nonzero(weights)  # type: ignore[arg-type]
        models: dict[str, nn.Module] = {BASE: dense}
        record: dict[str, Any] = {"zeros": masks.sparsity(), "left_out": {}}
        if experts := list(sparse_experts(find_blocks(dense, self.blocks), self.targets)):
            record["left_out"][f"{experts[0]}{f' and {len(experts) - 1} more' if experts[1:] else ''}"] = (
                "experts in one tensor, which stay dense in every variant; 2:4 and CSR take linear layers only"
            )

        def attempt(name: str, build: Callable[[], nn.Module]) -> None:
            try:
                models[name] = build().eval()
            except (ValueError, RuntimeError) as error:  # does not apply; out of memory
                record["left_out"][name] = str(error)

        if device.type == "cpu":
            record["left_out"]["2:4"] = "its kernels run on NVIDIA GPUs only, and this is a CPU"
            attempt("CSR", lambda: self._csr(dense, record))
        else:
            record["left_out"]["CSR"] = "it is for CPUs, and this is a GPU"
            attempt(kernels, lambda: copy.deepcopy(model).to(device) if converted else self._two_four(dense))
        attempt("shrunk", lambda: shrink(dense, masks, blocks=self.blocks))
        return models, record

    def _csr(self, dense: nn.Module, record: dict[str, Any]) -> nn.Module:
        """Returns a copy with CSR layers, and adds its report to the record."""
        sparse = copy.deepcopy(dense)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the verdict reports a CSR model larger than the dense one
            report: CSRReport = convert_to_csr_(sparse, targets=self.targets, blocks=self.blocks)
        record["csr"] = {
            name: getattr(report, name)
            for name in ("dense_bytes", "csr_bytes", "sparsity", "break_even_sparsity", "skipped")
        }
        return sparse

    def _two_four(self, dense: nn.Module) -> nn.Module:
        """Returns a copy with 2:4 layers; ValueError if no layer can be converted."""
        sparse = copy.deepcopy(dense)
        made: Conversion = convert_(sparse, targets=self.targets, blocks=self.blocks, progress=False)
        if not made.converted:
            raise ValueError(made.reason or f"no layer could be converted: {dict(made.skipped)}")
        return sparse

    def layers(self, models: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
        """Returns, for every shape, one layer from the middle of the model, in all variants that changed it."""
        dense = models[BASE]
        shapes: dict[tuple[int, int], list[str]] = {}
        for name, target in self._targets(dense).items():
            shapes.setdefault(target.shape, []).append(name)
        chosen: dict[str, dict[str, nn.Module]] = {}
        for (out, inputs), names in shapes.items():
            kinds = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            same = {variant: model.get_submodule(names[len(names) // 2]) for variant, model in models.items()}
            chosen[f"{kinds} ({out} x {inputs})"] = {
                variant: layer for variant, layer in same.items() if variant == BASE or _changed(layer, same[BASE])
            }
        return chosen

    def _targets(self, model: nn.Module) -> dict[str, Target]:
        return find_targets(find_blocks(model, self.blocks), self.targets)


def _changed(layer: nn.Module, dense: nn.Module) -> bool:
    """Returns whether a layer has another class, weight class or shape than the dense one."""
    if type(layer) is not type(dense):
        return True
    ours, theirs = layer.get_parameter("weight"), dense.get_parameter("weight")
    return type(ours) is not type(theirs) or ours.shape != theirs.shape
