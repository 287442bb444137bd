"""Convolutions are pruned as the linear layers that they are on unfolded patches."""

import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from prune_callbacks import (
    ALPS,
    MRP,
    NM,
    Block,
    Columns,
    Gram,
    InputNorm,
    Magnitude,
    MaskSet,
    Rows,
    SparseGPT,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.anatomy.convolution import ConvTarget

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SETTINGS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": "same"},
    "valid": {"padding": "valid", "bias": False},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "replicated": {"padding": 1, "padding_mode": "replicate"},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 8, "padding": 1},
}
ROOM = {"zeros": "constant", "reflect": "reflect", "circular": "circular", "replicate": "replicate"}


def made(dims, setting, seed=0):
    torch.manual_seed(seed)
    layer = KINDS[dims](8, 16, 3, **SETTINGS[setting]).double()
    batches = [torch.randn(4, 8, *[9] * dims).double() for _ in range(2)]
    batches[0][:, 1] = 0  # a dead channel in a batch
    return layer, batches


def patches(layer, x):
    """All patches of an input by plain loops over places, (groups, patches, in): channels first, then the kernel."""
    dims = len(layer.kernel_size)
    gaps = layer.dilation
    if layer.padding == "same":
        total = [gap * (size - 1) for gap, size in zip(gaps, layer.kernel_size, strict=True)]
        room = [part for pad in reversed(total) for part in (pad // 2, pad - pad // 2)]
    else:
        width = (0,) * dims if layer.padding == "valid" else layer.padding
        room = [part for pad in reversed(width) for part in (pad, pad)]
    x = functional.pad(x, room, mode=ROOM[layer.padding_mode])
    places = [
        range(0, size - gap * (kernel - 1), step)
        for size, gap, kernel, step in zip(x.shape[2:], gaps, layer.kernel_size, layer.stride, strict=True)
    ]
    found = []
    for sample, *corner in itertools.product(x, *places):
        cut = [
            slice(at, at + gap * (kernel - 1) + 1, gap)
            for at, gap, kernel in zip(corner, gaps, layer.kernel_size, strict=True)
        ]
        found.append(sample[(slice(None), *cut)].flatten())
    return torch.stack(found).unflatten(1, (layer.groups, -1)).transpose(0, 1)


def by_channel(columns, layer):
    """Reorders columns from (channels, kernel) to (kernel, channels)."""
    channels = layer.in_channels // layer.groups
    return columns.unflatten(-1, (channels, -1)).transpose(-1, -2).flatten(-2)


def back(columns, layer):
    channels = layer.in_channels // layer.groups
    return columns.unflatten(-1, (-1, channels)).transpose(-1, -2).flatten(-2)


def expected(layer, batches, pruner):
    """The linear solver on the unfolded problem, group by group: the new weight and its mask."""
    inputs = torch.cat([patches(layer, x) for x in batches], 1)
    weights, keeps = [], []
    for weight, x in zip(layer.weight.detach().flatten(1).chunk(layer.groups), inputs, strict=True):
        channels_last = isinstance(pruner.pattern, NM)
        if channels_last:
            weight, x = by_channel(weight, layer), by_channel(x, layer)
        statistic = pruner.statistic(x.shape[1])
        if isinstance(statistic, Gram):
            statistic.matrix, statistic.tokens = x.T @ x, len(x)
        elif isinstance(statistic, InputNorm):
            statistic.squares, statistic.tokens = x.square().sum(0), len(x)
        pruned = pruner.prune(weight, statistic)
        weights.append(back(pruned.weight, layer) if channels_last else pruned.weight)
        keeps.append(back(pruned.keep, layer) if channels_last else pruned.keep)
    return torch.cat(weights).view_as(layer.weight), torch.cat(keeps).view(layer.weight.shape)


def cases():
    half = Unstructured(0.5)
    for pruner in (Magnitude(half), Wanda(half), SparseGPT(half), MRP(half, block_size=None), ALPS(half)):
        for dims, setting in itertools.product(KINDS, SETTINGS):
            # Every way of padding with every solver in two dimensions; the others with one solver.
            if dims == 2 or isinstance(pruner, SparseGPT):
                yield pruner, dims, setting
    for pruner in (Wanda(NM(2, 4)), SparseGPT(NM(1, 4)), MRP(NM(2, 4)), ALPS(NM(1, 4)), Magnitude(NM(1, 4))):
        for dims, setting in ((1, "strided"), (2, "plain"), (2, "grouped"), (3, "plain")):
            yield pruner, dims, setting
    for pattern in (Block(4, 0.5), Columns(0.25), Rows(0.25)):
        yield Wanda(pattern), 2, "plain"


@pytest.mark.parametrize(
    ("pruner", "dims", "setting"), list(cases()), ids=lambda value: str(value).replace("sparsity=", "")
)
def test_a_convolution_is_a_linear_layer_on_patches(pruner, dims, setting):
    layer, batches = made(dims, setting)
    weight, keep = expected(layer, batches, pruner)
    dense = layer.weight.detach().clone()
    report = prune_sequentially(nn.Sequential(layer), batches, pruner, targets="0", progress=False)
    assert torch.equal(report.masks["0.weight"], keep)
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-8, atol=1e-10)
    report.masks.check(pruner.pattern, convolutions=report.convolutions)
    assert report.convolutions == {"0.weight": layer.groups}
    if report.layers[0].loss is not None:
        inputs = torch.cat([patches(layer, x) for x in batches], 1)
        change = (weight - dense).flatten(1).chunk(layer.groups)
        lost = sum((x @ d.T).square().sum() for d, x in zip(change, inputs, strict=True))
        output = sum(
            (x @ w.T).square().sum() for w, x in zip(dense.flatten(1).chunk(layer.groups), inputs, strict=True)
        )
        assert report.layers[0].loss == pytest.approx(float(lost), rel=1e-6, abs=1e-9)
        assert report.layers[0].relative_loss == pytest.approx(float(lost / output), rel=1e-6, abs=1e-9)


def test_the_order_of_columns_matters_for_groups_of_weights():
    layer, batches = made(2, "plain")
    report = prune_sequentially(nn.Sequential(layer), batches, Magnitude(NM(2, 4)), targets="0", progress=False)
    keep = report.masks["0.weight"]
    # Two of every four neighbouring input channels are kept, at every place of the kernel: NVIDIA's convention.
    assert bool((keep.unflatten(1, (2, 4)).sum(2) == 2).all())
    assert not NM(2, 4).holds(keep.flatten(1))  # the control: along the kernel it is no 2:4
    with pytest.raises(ValueError, match=r"do not have NM\(n=2, m=4\): 0.weight"):
        MaskSet({"0.weight": keep.roll(1, 1)}).check(NM(2, 4))


def test_unbatched_inputs_and_small_strips_add_up(monkeypatch):
    import prune_callbacks.anatomy.convolution as module

    for setting in SETTINGS:
        layer, batches = made(2, setting)
        target = ConvTarget.of("layer", layer)
        whole = torch.cat(list(target.vectors(batches[0])))
        monkeypatch.setattr(module, "NUMBERS", 50)
        small = list(target.vectors(batches[0]))
        monkeypatch.undo()
        assert len(small) > 4
        torch.testing.assert_close(torch.cat(small).T @ torch.cat(small), whole.T @ whole)
        one = torch.cat(list(target.vectors(batches[0][1])))
        assert torch.equal(one, torch.cat(list(target.vectors(batches[0][1:2]))))
        ours = patches(layer, batches[0]).transpose(0, 1).flatten(1)
        torch.testing.assert_close(whole, ours)


class Allocated(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once and were made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and not any(
                    isinstance(a, torch.Tensor) and a.untyped_storage()._cdata == storage._cdata for a in args
                ):
                    self._count(tensor, storage.nbytes(), storage._cdata)
        return result

    def _count(self, tensor, size, key):
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._forget, size, key)

    def _forget(self, size, key):
        self.now -= size
        self.known.discard(key)


@pytest.mark.parametrize(("width", "side", "count"), [(64, 56, 16), (256, 14, 16), (512, 7, 32)])
def test_statistics_of_layers_of_a_resnet_50_take_a_gram_and_a_batch(width, side, count):
    layer = nn.Conv2d(width, width, 3, padding=1, bias=False)
    target, x = ConvTarget.of("layer", layer), torch.randn(count, width, side, side)
    gram = Gram(9 * width)
    allowed = gram.matrix.nbytes + x.nbytes
    gc.collect()
    with torch.no_grad(), Allocated() as seen:
        for vectors in target.vectors(x):
            gram.update(vectors)
            del vectors
    assert seen.peak + gram.matrix.nbytes <= allowed
    assert gram.tokens == count * side * side
    with torch.no_grad(), Allocated() as control:
        functional.unfold(x, 3, padding=1)
    assert control.peak > 8 * x.nbytes
