"""CausalLM: a LightningModule over any causal language model of `transformers`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from prune_callbacks.measure.perplexity import Perplexity
from prune_callbacks.tasks.batches import model_inputs, predicted, taken
from prune_callbacks.tasks.from_path import FromPath, local_folder, shard_by_blocks
from prune_callbacks.tasks.objectives import LanguageModeling, Objective


def adamw(parameters: Iterable[torch.nn.Parameter]) -> Optimizer:
    """Returns AdamW with learning rate 1e-4; a function, because a file of settings can name one."""
    return torch.optim.AdamW(parameters, lr=1e-4)


class CausalLM(LightningModule):
    """
    A LightningModule that trains a language model on text, or on text and a teacher, and validates by perplexity.

    Batches are token ids (batch, tokens), or mappings or named tuples with `input_ids` or `inputs_embeds` and
    optionally `attention_mask` (padding is not predicted) and `labels` (-100 is ignored). Other keys that the model's
    forward pass takes are passed on; the rest are left out, with a warning. A batch in which nothing is predicted
    counts nothing: its losses and gradients are zero.

    Logs `train_loss`, its terms as `train_loss_NAME` if there are several, `val_loss`, which is the mean over all
    predicted tokens, and `val_perplexity`.

    With `path` in place of `model`, the model is built in `configure_model`, and no process holds more of it than it
    trains: under FSDP2 and ZeRO-3 every rank reads only its part of the files. Elsewhere it is `from_pretrained`.

    Args:
        model: e.g. `AutoModelForCausalLM.from_pretrained(...)`. The same object becomes `self.model`.
        optimizer: function that returns the optimizer for the parameters; AdamW with learning rate 1e-4 by default.
        scheduler: function that returns a learning-rate scheduler for the optimizer and `num_training_steps`, e.g.
            `partial(transformers.get_cosine_schedule_with_warmup, num_warmup_steps=10)`. It is stepped at every
            optimizer step.
        objective: the training loss, e.g. `SquareHead(teacher)`. A teacher is not part of the module's `state_dict`.
        scheduler_steps: the scheduler's `num_training_steps`; None: the length of the whole training. For
            `IterativePrune` with rewinding, the length of one round.
        path: a folder with `config.json` and safetensors files, or a name on the Hub.
        dtype: dtype of the weights of a model from `path`; None: that of its configuration.

    Raises:
        ValueError: there is neither a model nor a path, or both; `scheduler_steps` is less than 1, `objective` is not
            an `Objective`, or it does not fit the model. When a fit begins: `path` cannot be read in parts.
    """

    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], Optimizer] = adamw,
        scheduler: Callable[..., LRScheduler] | None = None,
        objective: Objective | None = None,
        scheduler_steps: int | None = None,
        *,
        path: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__()
        if (model is None) == (path is None):
            raise ValueError(f"CausalLM takes a model or the path of one, got {'neither' if model is None else 'both'}")
        if scheduler_steps is not None and scheduler_steps < 1:
            raise ValueError(f"CausalLM: scheduler_steps must be at least 1, or None, got {scheduler_steps}")
        self.objective = LanguageModeling() if objective is None else objective
        if not isinstance(self.objective, Objective):
            raise ValueError(f"CausalLM: objective is one such as SquareHead(teacher), got {objective!r}")
        self.path, self.dtype_of_path = path, dtype
        self._source: FromPath | None = None
        if model is not None:
            self._take(model)
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._scheduler_steps = scheduler_steps
        self.val_perplexity = Perplexity()
        self._left_out: set[str] = set()

    def _take(self, model: PreTrainedModel) -> None:
        self.objective.prepare(model)
        self.model = model.train()  # from_pretrained returns models in evaluation mode, which Lightning keeps

    def unbuilt(self) -> Path | None:
        """Returns the folder that `configure_model` will build the model from; None if the model is there."""
        if self.path is None or "model" in self._modules:
            return None
        self.path = local_folder(self.path)  # a name on the Hub is looked up once
        return self.path

    def build_from(self, folder: str | Path) -> None:
        """Makes `configure_model` build the model from this folder, in place of one that it may have built."""
        self.path = folder
        self._modules.pop("model", None)

    def setup(self, stage: str) -> None:
        """Reads what the files at `path` hold, but no weights; they may have been pruned by a callback just now."""
        folder = self.unbuilt()
        if folder is not None:
            self._source = FromPath(folder, self.dtype_of_path)

    def configure_model(self) -> None:
        """
        Builds the model from `path`, if there is one, and shards it under `ModelParallelStrategy` (FSDP2).

        Every decoder block is a group of its own.
        """
        if "model" not in self._modules:
            assert self._source is not None
            self._take(self._built(self._source))
            self._source = None
        elif self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            self._shard(self.model)

    def _built(self, source: FromPath) -> PreTrainedModel:
        strategy = self.trainer.strategy
        if self.device_mesh is not None:
            return source.in_rows(self._shard, strategy.root_device)
        if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
            return source.partitioned(strategy)
        return source.whole()

    def _shard(self, model: PreTrainedModel) -> None:
        assert self.device_mesh is not None
        shard_by_blocks(model, self.device_mesh["data_parallel"])

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Returns the output of the model's forward pass."""
        return self.model(input_ids=input_ids, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns and logs the loss of the objective."""
        terms = self.objective(self.model, self._inputs(batch))
        loss = torch.stack(list(terms.values())).sum()
        self.log("train_loss", loss, prog_bar=True)
        if len(terms) > 1:
            self.log_dict({f"train_loss_{name}": term.detach() for name, term in terms.items()})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds the batch to the perplexity, and logs it and the loss."""
        inputs = self._inputs(batch)
        output = self.model(**inputs, use_cache=False)
        self.val_perplexity.update(output.logits, inputs["labels"])
        count = int(predicted(inputs).sum())
        if count:
            self.log("val_loss", output.loss, batch_size=count)
        self.log("val_perplexity", self.val_perplexity, prog_bar=True)

    def _inputs(self, batch: Any) -> dict[str, Any]:
        """Returns the arguments of the model in a batch; warns, once per name, of what the model does not take."""
        inputs = model_inputs(batch)
        known = taken(self.model, inputs) | {"labels": inputs["labels"]}
        unknown = [str(name) for name in inputs if name not in known]
        if not self._left_out.issuperset(unknown):
            self._left_out.update(unknown)
            rank_zero_warn(
                f"batches have {', '.join(unknown)}, which the forward pass of {type(self.model).__name__} does not "
                "take: left out"
            )
        return known

    def configure_optimizers(self) -> Any:
        """Returns one optimizer over all trainable parameters, with the scheduler if one is given."""
        optimizer = self._optimizer(p for p in self.parameters() if p.requires_grad)
        if self._scheduler is None:
            return optimizer
        steps = self._scheduler_steps or int(self.trainer.estimated_stepping_batches)
        scheduler = self._scheduler(optimizer, num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
