"""The two ends of a model: its embeddings and its output layer, which are not pruned."""

from torch import nn
from transformers import PreTrainedModel


def embedded_weights(model: nn.Module) -> set[int]:
    """Returns the ids of the weights of a model's embeddings, which an output layer may share."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def output_layer(model: nn.Module) -> nn.Module | None:
    """Returns the output layer of a model of transformers, if it has one that transformers can find."""
    try:
        return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # type: ignore[no-untyped-call]
    except (AttributeError, NotImplementedError):  # a custom model
        return None
