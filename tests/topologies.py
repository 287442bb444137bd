"""Small models whose blocks are called in all kinds of ways, and the masks that re-running the whole model gives."""

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

WIDTH, WORDS = 8, 23


class Block(nn.Module):
    """Two layers, a nonlinearity, the residual inside."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x, scale=1.0):
        return x + scale * self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """An embedding, blocks, and a head; `walk(model, x, ids)` runs the blocks."""

    def __init__(self, walk, blocks=None, depth=3):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)] if blocks is None else blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in self.blocks)
        self.head = nn.Linear(WIDTH, WORDS)
        self.walk = walk

    def forward(self, ids):
        return self.head(self.walk(self, self.embedding(ids), ids))


def made(walk, blocks=None, depth=3, seed=0):
    """A model in float64 whose blocks change what passes through them."""
    torch.manual_seed(seed)
    model = Model(walk, blocks, depth).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def rerun_masks(model, order, batches, sparsity=0.5, only=None):
    """
    Wanda's masks, for every block by running the whole model again, pruned so far: names of weights and keep masks.

    Of all `nn.Linear` and GPT-2's `Conv1D` in the blocks, or of those named by `only`.

    Written without the package: norms summed in float64, every row's smallest scores removed, ties to the later ones.
    """
    model, masks = copy.deepcopy(model), {}
    blocks = dict(model.named_modules())
    for block in order:
        inner = blocks[block].named_modules()
        layers = {f"{block}.{n}".strip("."): m for n, m in inner if isinstance(m, (nn.Linear, Conv1D))}
        layers = {n: m for n, m in layers.items() if f"{n}.weight" not in masks and (only is None or n in only)}
        sums = {}

        def note(layer, args, kwargs, sums=sums):
            x = [*args, *kwargs.values()][0].double()
            sums[layer] = sums.get(layer, 0) + x.reshape(-1, x.shape[-1]).square().sum(0)

        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers.values()]
        with torch.no_grad():
            for batch in batches:
                model(**batch) if isinstance(batch, dict) else model(batch)
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            if layer in sums:
                weight = layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.T
                scores = weight.abs().double() * sums[layer].sqrt()
                kept = weight.shape[1] - round(sparsity * weight.shape[1])
                best = scores.sort(dim=1, descending=True, stable=True).indices[:, :kept]
                keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
                weight.mul_(keep)
                masks[f"{name}.weight"] = keep if isinstance(layer, nn.Linear) else keep.T
    return masks
