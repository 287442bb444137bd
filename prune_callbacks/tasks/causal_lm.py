"""CausalLM: a LightningModule over any causal language model of `transformers`."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from prune_callbacks.anatomy.blocks import find_blocks
from prune_callbacks.measure.perplexity import Perplexity
from prune_callbacks.tasks.objectives import LanguageModeling, Objective


class CausalLM(LightningModule):
    """
    A language model trained on text, or on text and a teacher; validated by perplexity.

    Batches are token ids (batch, tokens), or mappings with `input_ids` and maybe `attention_mask` (padding is not
    predicted) and `labels`. Logs `train_loss` (and its terms, `train_loss_NAME`, if there are several), `val_loss` and
    `val_perplexity`.

    Args:
        model: e.g. `AutoModelForCausalLM.from_pretrained(...)`. Kept as it is, under `self.model`.
        optimizer: makes the optimizer from the parameters; AdamW with learning rate 1e-4 by default.
        scheduler: makes a learning-rate scheduler, stepped every optimizer step, from the optimizer and
            `num_training_steps`, e.g. `partial(transformers.get_cosine_schedule_with_warmup, num_warmup_steps=10)`.
        objective: the training loss, e.g. `SquareHead(teacher)`. A teacher is not part of the module's `state_dict`.
        scheduler_steps: the scheduler's `num_training_steps`; None: the length of the whole training. For
            `IterativePrune` with rewinding, the length of one round.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], Optimizer] = partial(torch.optim.AdamW, lr=1e-4),  # noqa: B008
        scheduler: Callable[..., LRScheduler] | None = None,
        objective: Objective | None = None,
        scheduler_steps: int | None = None,
    ) -> None:
        super().__init__()
        if scheduler_steps is not None and scheduler_steps < 1:
            raise ValueError(f"CausalLM: scheduler_steps must be at least 1, or None, got {scheduler_steps}")
        self.objective = LanguageModeling() if objective is None else objective
        if not isinstance(self.objective, Objective):
            raise ValueError(f"CausalLM: objective is one such as SquareHead(teacher), got {objective!r}")
        self.objective.prepare(model)
        self.model = model.train()  # from_pretrained returns models in evaluation mode, which Lightning keeps
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._scheduler_steps = scheduler_steps
        self.val_perplexity = Perplexity()

    def configure_model(self) -> None:
        """Under `ModelParallelStrategy` (FSDP2), shards the parameters, those of every decoder block together."""
        mesh = self.device_mesh
        if mesh is None or isinstance(self.model, FSDPModule):
            return
        for _, block in find_blocks(self.model):
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.model(input_ids=input_ids, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The objective's loss."""
        terms = self.objective(self.model, _with_labels(batch))
        loss = torch.stack(list(terms.values())).sum()
        self.log("train_loss", loss, prog_bar=True)
        if len(terms) > 1:
            self.log_dict({f"train_loss_{name}": term.detach() for name, term in terms.items()})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds the batch to the perplexity."""
        inputs = _with_labels(batch)
        labels = inputs["labels"]
        output = self.model(**inputs, use_cache=False)
        self.val_perplexity.update(output.logits, labels)
        self.log("val_loss", output.loss, batch_size=len(labels))
        self.log("val_perplexity", self.val_perplexity, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """One optimizer over all trainable parameters, and the scheduler if there is one."""
        optimizer = self._optimizer(p for p in self.parameters() if p.requires_grad)
        if self._scheduler is None:
            return optimizer
        steps = self._scheduler_steps or int(self.trainer.estimated_stepping_batches)
        scheduler = self._scheduler(optimizer, num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _with_labels(batch: Any) -> dict[str, Tensor]:
    if isinstance(batch, tuple | list):  # of a TensorDataset
        batch = batch[0]
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    if "labels" not in inputs:
        labels = inputs["input_ids"]
        padding = inputs.get("attention_mask")
        inputs["labels"] = labels if padding is None else labels.masked_fill(padding == 0, -100)
    return inputs
