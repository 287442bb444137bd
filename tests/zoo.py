"""One small module of every kind, in float64, and masks from re-running the whole module for every stage."""

import copy

import torch
import transformers as hf
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

CLASSES = 4


class Step(LightningModule):
    """Trains a model on (inputs, classes), or on mappings of a forward of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        if isinstance(batch, dict):
            output = self.model(**batch)
            loss = output.loss if output.loss is not None else output.logits_per_text.square().mean()
        else:
            inputs, classes = batch
            output = self.model(inputs)
            output = output.flatten(2).mean(-1) if output.ndim > 2 else output
            loss = functional.cross_entropy(output, classes)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Residual(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(width, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        inner = functional.relu_(self.bn1(self.conv1(x)))
        return functional.relu_(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(Residual(8, 8, 1), Residual(8, 12, 2))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.layers(functional.relu(self.stem(x))).mean((2, 3)))


class UNet(nn.Module):
    """Its last layers run before those of the way up are defined: the order of execution is another."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up2, self.up1 = nn.Conv2d(14, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Conv2d(6, CLASSES, 1)

    def forward(self, x):
        first = torch.tanh(self.down1(x))
        second = self.middle(torch.tanh(self.down2(first)))
        joined = torch.cat([first, functional.interpolate(second, first.shape[2:])], 1)
        return self.out(torch.tanh(self.up1(torch.tanh(self.up2(joined)))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.gru = nn.Embedding(23, 8), nn.GRU(8, 12, 2, batch_first=True)
        self.middle, self.head = nn.Linear(12, 8), nn.Linear(8, CLASSES)

    def forward(self, ids):
        return self.head(torch.tanh(self.middle(self.gru(self.embedding(ids))[0][:, -1])))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1)  # (tokens, batch, width)
        self.embedding, self.encoder = nn.Embedding(23, 16), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids):
        return self.head(self.encoder(self.embedding(ids).transpose(0, 1)).mean(0))


def separable():
    def part(width, out):
        return [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, out, 1), nn.ReLU()]

    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), *part(8, 12), *part(12, 12)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES))


def images(count):
    return (torch.randn(count, 3, 9, 9).double(), torch.arange(count) % CLASSES)


def ids(count):
    return (torch.randint(3, 23, (count, 7)), torch.arange(count) % CLASSES)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SEQ = {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 30},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
PICTURE = {"image_size": 8, "patch_size": 4}


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=23, num_labels=CLASSES))


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL, **PICTURE, num_labels=CLASSES))


def t5():
    config = hf.T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config)


def bart():
    return hf.BartForConditionalGeneration(hf.BartConfig(**SEQ, max_position_embeddings=16))


def whisper():
    config = hf.WhisperConfig(**SEQ, num_mel_bins=6, max_source_positions=5, max_target_positions=9)
    return hf.WhisperForConditionalGeneration(config)


def clip():
    text = hf.CLIPTextConfig(**SMALL, vocab_size=30, max_position_embeddings=16, bos_token_id=1, eos_token_id=2)
    vision = hf.CLIPVisionConfig(**SMALL, **PICTURE)
    return hf.CLIPModel(hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))


def llava():
    text = hf.LlamaConfig(**SMALL, vocab_size=40, max_position_embeddings=32)
    vision = hf.CLIPVisionConfig(**SMALL, **PICTURE, projection_dim=16)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-1)
    )


def words(count, **more):
    return {"input_ids": torch.randint(3, 23, (count, 7)), **{key: make(count) for key, make in more.items()}}


def classes(count):
    return torch.arange(count) % CLASSES


def pixels(count):
    return torch.randn(count, 3, 8, 8).double()


def text(length):
    return lambda count: torch.randint(3, 23, (count, length))


def with_picture(count):
    ids = torch.randint(3, 23, (count, 9))
    ids[:, 1:5] = 39
    return {"input_ids": ids, "labels": ids.clone(), "pixel_values": pixels(count)}


def blocks(*lists):
    """The stages of two blocks each, of the lists in the order of their execution."""
    return [f"{name}.{index}" for name in lists for index in range(2)]


def mlp():
    layers = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, CLASSES))


# Every kind: the model, a batch of so many rows, its stages in the order of execution, and what else stays dense.
KINDS = {
    "MLP": (mlp, lambda count: (torch.randn(count, 12).double(), classes(count)), ["0", "2", "4"], {"6.weight"}),
    "ResNet": (
        ResNet,
        images,
        [
            *("stem", "layers.0.conv1", "layers.0.conv2", "layers.1.conv1", "layers.1.conv2"),
            "layers.1.shortcut",
        ],
        {"head.weight"},
    ),
    "U-Net with skips": (UNet, images, ["down1", "down2", "middle", "up2", "up1"], {"out.weight"}),
    "depthwise-separable CNN": (separable, images, ["0", "2", "3", "5", "6"], {"10.weight"}),
    "GRU": (Recurrent, ids, ["gru", "middle"], {"head.weight"}),
    "nn.TransformerEncoder": (Encoder, ids, blocks("encoder.layers"), {"head.weight"}),
    "BERT": (bert, lambda n: words(n, labels=classes), blocks("bert.encoder.layer"), {"classifier"}),
    "ViT": (vit, lambda n: {"pixel_values": pixels(n), "labels": classes(n)}, blocks("vit.layers"), {"classifier"}),
    "T5": (t5, lambda n: words(n, labels=text(5)), blocks("encoder.block", "decoder.block"), set()),
    "BART": (
        bart,
        lambda n: words(n, labels=text(5)),
        blocks("model.encoder.layers", "model.decoder.layers"),
        set(),
    ),
    "Whisper": (
        whisper,
        lambda n: {"input_features": torch.randn(n, 6, 10).double(), "labels": text(4)(n)},
        blocks("model.encoder.layers", "model.decoder.layers"),
        {"model.encoder.conv1"},
    ),
    "CLIP": (
        clip,
        lambda n: words(n, pixel_values=pixels),
        blocks("text_model.encoder.layers"),
        {"vision_model.encoder.layers", "visual_projection"},
    ),
    "LLaVA": (
        llava,
        with_picture,
        blocks("model.language_model.layers"),
        {"model.vision_tower.encoder.layers", "model.multi_modal_projector.linear_1"},
    ),
}


def made(kind, seed=0):
    """A module of a kind with weights that change what passes, three batches, its stages and what stays dense."""
    build, batch, stages, dense = KINDS[kind]
    torch.manual_seed(seed)
    model = build().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(0, 0.4)
    return Step(model), [batch(5) for _ in range(3)], stages, dense


def patches(layer, x):
    """The patches of a convolution's input by torch's unfold, (groups, patches, in)."""
    if isinstance(layer, nn.Conv1d):
        x = x.unsqueeze(2)
        kernel, gap = (1, layer.kernel_size[0]), (1, layer.dilation[0])
        room, step = (0, layer.padding[0]), (1, layer.stride[0])
    else:
        kernel, gap, room, step = layer.kernel_size, layer.dilation, layer.padding, layer.stride
    return (
        functional.unfold(x, kernel, gap, room, step).mT.flatten(0, 1).unflatten(1, (layer.groups, -1)).transpose(0, 1)
    )


def matrices(name, layer):
    """The matrices of a layer, each as (name of the parameter, view of it as (groups, out, in), key of its inputs)."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        yield f"{name}.weight", layer.weight.data.flatten(1).unflatten(0, (layer.groups, -1)), name
    elif isinstance(layer, nn.MultiheadAttention):
        for role, part in zip("qkv", layer.in_proj_weight.data.chunk(3), strict=True):
            yield f"{name}.in_proj_weight", part[None], f"{name}.{role}"
        yield f"{name}.out_proj.weight", layer.out_proj.weight.data[None], f"{name}.o"
    elif isinstance(layer, nn.GRU):
        for own, parameter in layer.named_parameters():
            if own.startswith("weight"):
                yield f"{name}.{own}", parameter.data[None], None
    elif isinstance(layer, (nn.Linear, Conv1D)):
        yield f"{name}.weight", (layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.T)[None], name


def entering(name, layer, args, kwargs):
    """What the matrices of a layer are multiplied with, (groups, vectors, in), by the keys of `matrices`."""
    x = [*args, *kwargs.values()][0]
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        yield name, patches(layer, x)
    elif isinstance(layer, nn.MultiheadAttention):
        assert not layer.batch_first
        yield from ((f"{name}.{role}", x.flatten(0, 1)[None]) for role in "qkv")
        yield f"{name}.o", by_hand(layer, x).flatten(0, 1)[None]
    elif isinstance(layer, (nn.Linear, Conv1D)):
        yield name, x.flatten(0, -2)[None]


def by_hand(layer, x):
    """What the heads of a self-attention return, (tokens, batch, width), before the output's matrix."""
    tokens, batch, width = x.shape
    q, k, v = (x @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, -1)
    q, k, v = (part.reshape(tokens, batch, layer.num_heads, -1).permute(1, 2, 0, 3) for part in (q, k, v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).permute(2, 0, 1, 3).reshape(tokens, batch, width)


def names(step, found):
    """The names of masks in a report: those of a model of transformers, else those of the whole module."""
    prefix = "" if isinstance(step.model, hf.PreTrainedModel) else "model."
    return {f"{prefix}{name}": value for name, value in found.items()}


def layers_of(model, stage):
    """The layers with matrices in a stage, by name; an attention stands for the layer inside of it."""
    found = {f"{stage}.{n}".strip("."): m for n, m in model.get_submodule(stage).named_modules()}
    found = {name: m for name, m in found.items() if next(matrices(name, m), None) is not None}
    inner = {f"{name}.out_proj" for name, m in found.items() if isinstance(m, nn.MultiheadAttention)}
    return {name: m for name, m in found.items() if name not in inner}


def rerun(step, batches, stages, prune):
    """
    Prunes a copy of a module stage by stage, running all of it again for every stage; returns the copy and the masks.

    `prune(weight, inputs)` gets a matrix (out, in) and all input vectors (vectors, in) or None, and returns the pruned
    matrix and its mask.
    """
    step = copy.deepcopy(step).eval()
    step.log = lambda *args, **settings: None
    masks = {}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for stage in stages:
        layers = layers_of(step.model, stage)
        seen = {}

        def note(layer, args, kwargs, layers=layers, seen=seen):
            name = next(name for name, known in layers.items() if known is layer)
            for key, vectors in entering(name, layer, args, kwargs):
                seen.setdefault(key, []).append(vectors.double())

        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers.values()]
        with torch.no_grad():
            for batch in batches:
                step.training_step(batch, 0)
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            for parameter_name, matrix, key in matrices(name, layer):
                inputs = torch.cat(seen[key], 1) if key is not None else [None] * len(matrix)
                done = [prune(part, vectors) for part, vectors in zip(matrix, inputs, strict=True)]
                matrix.copy_(torch.stack([weight for weight, _ in done]))
                keep = torch.cat([keep for _, keep in done])
                masks.setdefault(parameter_name, []).append(keep.T if isinstance(layer, Conv1D) else keep)
    torch.backends.mha.set_fastpath_enabled(fast)
    shapes = dict(step.model.named_parameters())
    return step, {name: torch.cat(parts).view(shapes[name].shape) for name, parts in masks.items()}
