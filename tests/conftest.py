import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need the network

import gc
import random
import re
from pathlib import Path
from typing import get_args

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

FIRST = (
    "parallel",
    "train_ranks",
    "smollm2",
    "train_deploy",
    "train",
    "zero_shot",
    "sweep",
    "streaming_families",
    "iterative",
    "experts",
    "streaming",
    "sensitivity",
    "families",
)
"""Files that take longest, which begin first: one that began last would run alone in the end."""

BY_TEST = ("train_ranks", "train", "sweep", "smollm2", "benchmarks", "sensitivity", "iterative")
"""Files whose tests are handed to the workers one by one; those of other files stay together, with what they share."""

RANKS = ("train_ranks", "parallel", "ddp")
"""Files that start sets of processes, of which the machine bears one at a time (`launch.one_set`)."""


def _stem(nodeid):
    return Path(nodeid.partition("::")[0]).stem.removeprefix("test_")


class Units(LoadScopeScheduling):
    """
    Hands units of tests to the workers in the order of collection: files, tests, or the fits of a strategy.

    Those of `RANKS` go to the first worker while there are others for the second, which would only wait.
    """

    def _split_scope(self, nodeid):
        stem = _stem(nodeid)
        file, _, test = nodeid.partition("::")
        if stem == "parallel":
            strategy = re.search(r"ddp|fsdp2|zero\d", test.partition("[")[2])
            return f"{file}::{strategy[0]}" if strategy else nodeid
        return nodeid if stem in BY_TEST else file

    def _assign_work_unit(self, node):
        def suits(unit):
            return (_stem(unit) in RANKS) == (node is self.nodes[0])

        self.workqueue.move_to_end(next(filter(suits, self.workqueue), next(iter(self.workqueue))), last=False)
        super()._assign_work_unit(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return Units(config, log)


@pytest.hookimpl(tryfirst=True)  # before the slow ones are left out
def pytest_collection_modifyitems(session, items):
    session.all_collected = tuple(items)
    places = {f"test_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish():
    """All that was imported stays: no collection of garbage need look at it again."""
    gc.collect()
    gc.freeze()


def _holds_arrays(annotation):
    return any(map(_holds_arrays, get_args(annotation))) or (
        isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)
    )


def _jaxtyped_where_arrays_are(*, typechecker, jaxtyped=jaxtyping.jaxtyped):
    """Checks signatures with shapes and dtypes only: the others are mypy's, and took half the time of the tests."""

    def decorate(decorated):
        annotations = getattr(decorated, "__annotations__", {}).values()
        return jaxtyped(decorated, typechecker=typechecker) if any(map(_holds_arrays, annotations)) else decorated

    return decorate


jaxtyping.jaxtyped = _jaxtyped_where_arrays_are  # which jaxtyping puts on all functions of the package


hypothesis.settings.register_profile("same examples", derandomize=True, deadline=None)
hypothesis.settings.register_profile("other examples", deadline=None, print_blob=True)


def pytest_configure(config):
    """`make test` tries the same examples in every run, `make test-all` others in each."""
    hypothesis.settings.load_profile("same examples" if "not slow" in config.option.markexpr else "other examples")


UNSEEDED = 20_261_129
"""The seed that the global generators have while nobody has seeded them."""


def _seed(value):
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def _states():
    """Of torch and numpy; from Python's own, libraries draw when they are imported."""
    return torch.get_rng_state(), *np.random.get_state()[1:3]


def _same(a, b):
    return torch.equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and a[2] == b[2]


_seed(UNSEEDED)
_untouched = _states()


@pytest.fixture(autouse=True)
def _precise():
    """Restores the precision of products, which benchmarks set for their whole process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _seeded():
    """Seeds every test; fails one before which a module or a fixture of many tests drew without a seed."""
    drawn = torch.initial_seed() == UNSEEDED and not _same(_states(), _untouched)
    _seed(0)
    assert not drawn, (
        "a module, or a fixture of more than one test, drew from a global generator without seeding it: what it draws "
        "depends on which tests run. Seed it, or give it a generator of its own"
    )
    yield
    _seed(UNSEEDED)


@pytest.fixture
def unchecked():
    """Bad input meets our own checks, as it does for users, not the type checker that `make test` turns on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tokenizer():
    # Imported here: it takes seconds, which the process that only hands out tests need not pay.
    from prune_callbacks.tasks import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture
def tiny():
    """A Llama of two blocks with random weights, on bytes."""
    from prune_callbacks.tasks import tiny_llama

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
