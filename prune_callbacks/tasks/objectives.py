"""Training losses for recovery after pruning: the text alone, or the text and a dense teacher."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prune_callbacks.interfaces import compared_by_name
from prune_callbacks.tasks.batches import counted
from prune_callbacks.tasks.teacher import Given, Teacher

Losses = dict[str, Tensor]


@compared_by_name
@runtime_checkable
class Objective(Protocol):
    """A training loss for a causal LM."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Prepares the loss before training; raises ValueError if `model` cannot be trained with it."""

    def __call__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Losses:
        """
        Returns the weighted terms of the loss by name, as scalars; training minimises their sum.

        Where nothing is predicted, all terms are zero, and part of the graph, so that gradients are zeros too.

        Args:
            model: the model that is trained.
            inputs: keyword arguments of the model: `input_ids` (or `inputs_embeds`, with a further dimension),
                optionally `attention_mask`, and `labels` (-100 is ignored), each (batch, tokens).
        """


class LanguageModeling:
    """The mean cross-entropy of the next token."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Does nothing: every causal LM is supported."""

    def __call__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Losses:
        inputs, tokens, counts = counted(inputs)
        output = model(**inputs, use_cache=False)
        return {"task": output.loss * counts} if tokens.numel() else _nothing(output, "task")


class LogitsDistillation:
    """
    A loss with the teacher's predictions as soft labels (Hinton et al. 2015), added to that of the text.

    Computes `task_weight * CE + weight * T^2 * KL(softmax(t / T) || softmax(s / T))`, averaged over the predicted
    tokens, with the logits `t` of the teacher and `s` of the model.

    Args:
        teacher: the dense model; frozen here, kept out of checkpoints, moved to the device of the batches. A folder, or
            a name on the Hub: it is built when training begins, and of several processes each holds its rows alone.
        temperature: the temperature `T`, positive.
        weight: weight of the divergence, positive.
        task_weight: weight of the cross-entropy, not negative.
        dtype: dtype to which the teacher is converted, e.g. "bfloat16"; None: its own dtype.

    Raises:
        ValueError: the teacher, its dtype, the temperature or a weight is invalid.
    """

    def __init__(
        self,
        teacher: Given,
        *,
        temperature: float = 1.0,
        weight: float = 1.0,
        task_weight: float = 1.0,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"LogitsDistillation: temperature must be positive, got {temperature}")
        _check_weights("LogitsDistillation", weight, task_weight)
        self.teacher = Teacher(teacher, dtype)
        self.temperature = temperature
        self.weight = weight
        self.task_weight = task_weight

    def prepare(self, model: PreTrainedModel) -> None:
        """Prepares the teacher; raises ValueError unless both models have the same vocabulary size."""
        self.teacher.prepare(model, ("vocab_size",))

    def __call__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Losses:
        inputs, tokens, counts = counted(inputs)
        output, target = model(**inputs, use_cache=False), self.teacher(inputs).logits
        if not tokens.numel():
            return _nothing(output, "task", "logits")
        student = output.logits[:, :-1][tokens].float() / self.temperature
        teacher = target[:, :-1][tokens].float() / self.temperature
        divergence = nn.functional.kl_div(
            student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True
        ) / len(student)
        return {
            "task": self.task_weight * output.loss * counts,
            "logits": self.weight * self.temperature**2 * divergence * counts,
        }


class SquareHead:
    """
    A loss with the teacher's hidden states as targets, layer by layer (Kurtic et al. 2023), added to that of the text.

    Computes `task_weight * CE + weight * sum over layers of sum (s - t)^2 / sum t^2`. The inner sums run over features
    and the real tokens of rows in which something is predicted. The hidden states `t` of the teacher and `s` of the
    model are the outputs of the decoder layers; that of the last one is taken after the final norm, as transformers
    reports it.

    Args:
        teacher: the dense model, of the same vocabulary, depth and width, or its path, as for `LogitsDistillation`;
            frozen here, kept out of checkpoints, moved to the device of the batches.
        weight: weight of the sum over layers, positive.
        task_weight: weight of the cross-entropy, not negative.
        dtype: dtype to which the teacher is converted, e.g. "bfloat16"; None: its own dtype.

    Raises:
        ValueError: the teacher, its dtype or a weight is invalid.
    """

    def __init__(
        self,
        teacher: Given,
        *,
        weight: float = 1.0,
        task_weight: float = 1.0,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        _check_weights("SquareHead", weight, task_weight)
        self.teacher = Teacher(teacher, dtype)
        self.weight = weight
        self.task_weight = task_weight

    def prepare(self, model: PreTrainedModel) -> None:
        """Prepares the teacher; raises ValueError unless vocabulary size, depth and width are equal."""
        self.teacher.prepare(model, ("vocab_size", "num_hidden_layers", "hidden_size"))

    def __call__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Losses:
        inputs, tokens, counts = counted(inputs)
        output = model(**inputs, use_cache=False, output_hidden_states=True)
        targets = self.teacher(inputs, output_hidden_states=True).hidden_states
        if not tokens.numel():
            return _nothing(output, "task", "features")
        rows = tokens.any(dim=1, keepdim=True)
        mask = inputs.get("attention_mask", rows) if counts else rows
        if mask.ndim != 2:
            raise ValueError(
                f"SquareHead compares real tokens, which an attention_mask {tuple(mask.shape)} does not name; accepted "
                "is (batch, tokens)"
            )
        real = (rows & mask.bool()).expand_as(inputs["labels"])
        features = output.loss.new_zeros(())
        for student, teacher in zip(output.hidden_states[1:], targets[1:], strict=True):
            target = teacher[real].float()
            features = features + (student[real].float() - target).square().sum() / target.square().sum()
        return {"task": self.task_weight * output.loss * counts, "features": self.weight * features * counts}


def _nothing(output: Any, *names: str) -> Losses:
    """Returns terms of zero for windows of one token; all parameters are in their graph, as DDP needs it."""
    zero = (output.logits[:, :1].float() * 0).sum()
    return dict.fromkeys(names, zero)


def _check_weights(name: str, weight: float, task_weight: float) -> None:
    if weight <= 0 or task_weight < 0:
        raise ValueError(
            f"{name}: weight must be positive and task_weight not negative, got {weight} and {task_weight}"
        )
