"""Random small models, batches and trainings for test_fuzz.py, and what must come out of them."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional

RECORD = []
"""Where products are noted while `recording`: (layer, its input, rows of real tokens or None)."""
_LISTENING = []


@contextmanager
def recording():
    """Notes every product with a layer's weight and every call of a block, as the models themselves tell it."""
    RECORD.clear()
    _LISTENING.append(True)
    try:
        yield RECORD
    finally:
        _LISTENING.pop()


def tell(what, x=None):
    if _LISTENING:
        RECORD.append((what, x))


@dataclass(frozen=True)
class BlockPlan:
    """How a block is built: inner width, and what is odd about it."""

    inner: int
    bias: bool
    by_keyword: bool  # layers are called as layer(input=x)
    by_weight: bool  # `down` is used by F.linear, without a call
    twice: bool  # `mid` is called twice
    tied: bool  # `down` and `up` of equal shape share one weight
    unused: bool  # a layer that nothing uses
    returns: str  # "tensor", "tuple", "list", "pair"


@dataclass(frozen=True)
class ModelPlan:
    """How a model is built, and how its blocks are called."""

    width: int
    blocks: tuple[BlockPlan, ...]
    order: tuple[int, ...]  # indices of blocks, in the order of their calls; may repeat, skip, go back
    style: str  # how a block gets its input
    between: str  # what happens to what it returns
    dead: bool
    duplicate: bool
    batches: str
    count: int
    seed: int
    shared: bool  # the first block stands in the list a second time


class Block(nn.Module):
    """A block by plan; `extra` is what else it may get."""

    def __init__(self, width, plan):
        super().__init__()
        self.plan = plan
        self.up = nn.Linear(width, plan.inner, plan.bias)
        self.mid = nn.Linear(plan.inner, plan.inner, plan.bias)
        self.down = nn.Linear(plan.inner, width, plan.bias)
        if plan.tied and plan.inner == width:
            self.down.weight = self.up.weight
        if plan.unused:
            self.unused = nn.Linear(width, 3)

    def _product(self, layer, x):
        tell(layer, x)
        if layer is self.down and self.plan.by_weight:
            return functional.linear(x, layer.weight, layer.bias)
        return layer(input=x) if self.plan.by_keyword else layer(x)

    def forward(self, x, extra=None, scale=1.0):
        tell(self)
        y = torch.tanh(self._product(self.up, x))
        for _ in range(1 + self.plan.twice):
            y = torch.tanh(self._product(self.mid, y))
        y = x + scale * self._product(self.down, y)
        if torch.is_tensor(extra):
            y = y + 0.1 * extra
        return {"tensor": y, "tuple": (y,), "list": [y, None], "pair": (y, y - x)}[self.plan.returns]


class Model(nn.Module):
    """A model by plan."""

    def __init__(self, plan):
        super().__init__()
        self.plan = plan
        self.embedding = nn.Embedding(17, plan.width)
        blocks = [Block(plan.width, block) for block in plan.blocks]
        self.layers = nn.ModuleList([*blocks, blocks[0]] if plan.shared else blocks)
        self.norm = nn.LayerNorm(plan.width)
        self.head = nn.Linear(plan.width, 17)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(1.5)
            if plan.dead:
                self.embedding.weight[:, 0] = 0
            if plan.duplicate:
                self.embedding.weight[:, -1] = self.embedding.weight[:, 1 % plan.width]

    def _call(self, block, x, first, carried):
        style = self.plan.style
        if style == "keyword":
            return block(x=x)
        if style == "keywords turned round":
            return block(scale=0.5, x=x)
        if style == "forward":
            return block.forward(x)
        if style == "constant beside":
            return block(x, first)
        if style == "earlier output beside":
            return block(x, carried)
        return block(x)

    def forward(self, ids, attention_mask=None, **others):
        x = first = self.embedding(ids)
        carried = None
        for place in self.plan.order:
            block = self.layers[place]
            output = self._call(block, x, first, carried)
            y = output[0] if isinstance(output, tuple | list) else output
            carried = output[1] if isinstance(output, tuple) and len(output) > 1 else y
            between = self.plan.between
            if between == "residual outside":
                x = x + y
            elif between == "norm":
                x = self.norm(y)
            elif between == "skip from the start":
                x = y + first
            elif between == "pair carried":
                x = y + 0.5 * carried
            else:
                x = y
        return self.head(x)


def built(plan):
    """The model in float64."""
    torch.manual_seed(plan.seed)
    return Model(plan).double().eval()


def batches_of(plan):
    """Calibration batches in one of their forms, and the same as (ids, real) pairs."""
    generator = torch.Generator().manual_seed(plan.seed + 1)
    given, pairs = [], []
    for number in range(plan.count):
        ids = torch.randint(17, (2, 4 + number % 3), generator=generator)
        real = torch.ones_like(ids, dtype=torch.bool)
        if "padded" in plan.batches:
            real[0, 2:] = False
        forms = {
            "tensor": lambda ids=ids: ids,
            "tuple of one": lambda ids=ids: (ids,),
            "mapping": lambda ids=ids: {"ids": ids},
            "mapping with more": lambda ids=ids: {"ids": ids, "labels": ids, "idx": [1, 2]},
            "padded mapping": lambda ids=ids, real=real: {"ids": ids, "attention_mask": real.long()},
            "padded tuple": lambda ids=ids, real=real: (ids, real.long()),
            "nested": lambda ids=ids: {"inputs": {"ids": ids}},
        }
        given.append(forms[plan.batches]())
        pairs.append((ids, real))
    return given, pairs


def names_of(model):
    """The names of all linear layers in the blocks, each weight once, by block: the first name counts."""
    found, seen = {}, set()
    for place, block in enumerate(model.layers):
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and id(layer.weight) not in seen:
                seen.add(id(layer.weight))
                found.setdefault(place, {})[f"layers.{place}.{name}"] = layer
    return found


def expected_scores(model, pairs):
    """
    What Wanda must see: for every layer the scores on the model pruned so far, in the order of the blocks' first calls.

    Prunes the model. Yields (name, scores, keep).
    """
    named = names_of(model)
    with recording() as record, torch.no_grad():
        model(pairs[0][0])
    first = [next(i for i, b in enumerate(model.layers) if b is w) for w, _ in record if isinstance(w, Block)]
    order = [*dict.fromkeys(first), *range(len(model.layers))]
    for place in dict.fromkeys(order):
        sums = {}
        for ids, real in pairs:
            with recording() as record, torch.no_grad():
                model(ids)
            for layer, x in record:
                if isinstance(layer, nn.Linear):
                    sums[layer] = sums.get(layer, 0) + x[real].double().square().sum(0)
        for name, layer in named.get(place, {}).items():
            if layer in sums:
                weight = layer.weight.data
                scores = weight.abs() * sums[layer].sqrt()
                kept = weight.shape[1] - round(0.5 * weight.shape[1])
                best = scores.sort(dim=1, descending=True, stable=True).indices[:, :kept]
                keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
                weight.mul_(keep)
                yield name, scores, keep


def agree(scores, keep, found):
    """Whether two masks keep the same, but for scores that are equal to rounding."""
    different = keep != found
    if not different.any():
        return True
    for row in different.any(1).nonzero()[:, 0]:
        values = scores[row][different[row]]
        if float(values.max() - values.min()) > 1e-6 * float(values.max()):
            return False
    return bool((keep.sum(1) == found.sum(1)).all())


widths = st.integers(2, 7)
block_plans = st.builds(
    BlockPlan,
    inner=widths,
    bias=st.booleans(),
    by_keyword=st.booleans(),
    by_weight=st.booleans(),
    twice=st.booleans(),
    tied=st.booleans(),
    unused=st.booleans(),
    returns=st.sampled_from(["tensor", "tuple", "list", "pair"]),
)


@st.composite
def model_plans(draw):
    blocks = draw(st.lists(block_plans, min_size=1, max_size=3))
    if draw(st.booleans()):  # most models return the same from all of their blocks
        returns = draw(st.sampled_from(["tensor", "tuple", "pair"]))
        blocks = [BlockPlan(**{**vars(block), "returns": returns}) for block in blocks]
    shared = draw(st.integers(0, 7)) == 0
    places = range(len(blocks) + shared)
    order = draw(
        st.one_of(st.just(tuple(places)), st.lists(st.sampled_from(places), min_size=1, max_size=5).map(tuple))
    )
    return ModelPlan(
        width=draw(widths),
        blocks=tuple(blocks),
        order=order,
        style=draw(
            st.sampled_from(
                ["plain", "keyword", "keywords turned round", "forward", "constant beside", "earlier output beside"]
            )
        ),
        between=draw(
            st.sampled_from(["nothing", "nothing", "residual outside", "norm", "skip from the start", "pair carried"])
        ),
        dead=draw(st.booleans()),
        duplicate=draw(st.booleans()),
        batches=draw(
            st.sampled_from(
                [
                    *("tensor", "tuple of one", "mapping", "mapping with more", "padded mapping", "padded tuple"),
                    "nested",
                ]
            )
        ),
        count=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 1000)),
        shared=shared,
    )


OPTIMIZERS = {
    "ASGD": {"lr": 1e-2, "t0": 0, "weight_decay": 0.1},
    "Adadelta": {"lr": 1e-1, "weight_decay": 0.1},
    "Adafactor": {"lr": 1e-2, "weight_decay": 0.1},
    "Adagrad": {"lr": 1e-2, "weight_decay": 0.1, "initial_accumulator_value": 0.5},
    "Adam": {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1, "maximize": True},
    "Adamax": {"lr": 1e-2, "weight_decay": 0.1},
    "LBFGS": {"lr": 1e-2, "max_iter": 3},
    "Muon": {"lr": 1e-2, "weight_decay": 0.1},
    "NAdam": {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "RAdam": {"lr": 1e-2, "weight_decay": 0.1},
    "RMSprop": {"lr": 1e-2, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
    "Rprop": {"lr": 1e-2},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}
"""Every optimizer of `torch.optim` that takes dense parameters, with what could bring a pruned weight back."""


class PrunedPlaces(Callback):
    """The largest value at a pruned place after every batch, in weights and in what the optimizer keeps of them."""

    def __init__(self, masks):
        self.masks, self.worst, self.steps = masks, 0.0, 0

    def on_train_batch_end(self, trainer, pl_module, *args):
        for name, parameter in self.masks().matching(dict(pl_module.named_parameters())).items():
            kept = self.masks()[name]
            state = trainer.optimizers[0].state.get(parameter, {}).values()
            for value in (parameter, *(v for v in state if torch.is_tensor(v) and v.shape == parameter.shape)):
                self.worst = max(self.worst, float(value.detach().masked_fill(kept, 0).abs().max()))
        self.steps += 1


@dataclass(frozen=True)
class Training:
    """How a small model is trained."""

    optimizer: str
    precision: str
    accumulate: int
    clip: float | None
    clip_by: str
    prune: str  # "before", "rounds", "both"
    steps: int
    seed: int
    blocks: int = field(default=2)


trainings = st.builds(
    Training,
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    precision=st.sampled_from(["32-true", "64-true", "bf16-true", "bf16-mixed"]),
    accumulate=st.integers(1, 3),
    clip=st.sampled_from([None, 0.1, 1.0]),
    clip_by=st.sampled_from(["norm", "value"]),
    prune=st.sampled_from(["before", "rounds", "both"]),
    steps=st.integers(2, 4),
    seed=st.integers(0, 1000),
    blocks=st.integers(1, 2),
)
