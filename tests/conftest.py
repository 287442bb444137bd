import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need the network

import jaxtyping
import pytest
import torch

from prune_callbacks.tasks import byte_tokenizer, tiny_llama

SLOWEST = ("parallel", "smollm2", "pruners", "train", "train_ranks", "train_deploy", "sweep", "zero_shot")
"""Files that take minutes: begun last, one of them would run alone in the end. Those with ranks not side by side."""


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def unchecked():
    """Bad input meets our own checks, as it does for users, not the type checker that `make test` turns on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def tiny():
    """A Llama of two blocks with random weights, on bytes."""
    return tiny_llama(hidden_size=32, layers=2)


@pytest.fixture
def correlated():
    """Inputs (tokens, features) in float64 with correlated features, two of them dead, and one outlier."""

    def make(features: int, tokens: int = 300, dead: int = 2) -> torch.Tensor:
        x = torch.randn(tokens, features, dtype=torch.float64) @ torch.randn(features, features, dtype=torch.float64)
        x[:, 1] *= 20
        if dead:
            x[:, [3, features - 2][:dead]] = 0
        return x

    return make
