"""The model card (`README.md`) of a sparse model's folder."""

import json
import re
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from yaml import YAMLError  # type: ignore[import-untyped]

from prune_callbacks.writing import write_text

CARD = "README.md"
TAGS = ("sparse", "pruned", "prune-callbacks")
BEGIN, END = "<!-- prune-callbacks -->", "<!-- /prune-callbacks -->"
"""The marks around the section that this module writes and replaces."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_model_card(
    folder: Path,
    sparsity: float,
    layers: int,
    *,
    source: str | None = None,
    module: str | None = None,
    note: str = "",
    durable: bool = False,
) -> None:
    """
    Writes or completes `folder/README.md`: how sparse the model is, how to load it, and how to keep its zeros.

    The metadata and the text of an existing card (the dense model's) are kept.

    Args:
        folder: the model's folder, complete except for the card.
        sparsity: the fraction of zeros in the pruned layers.
        layers: the number of pruned layers.
        source: the dense model's name on the hub, `owner/name`. Any other text, such as a local path, is ignored.
        module: the class of a module that is no model of `transformers`; None: a model of `transformers`.
        note: a further sentence.
        durable: also sync the file to the disk.
    """
    path = folder / CARD
    written = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    card = _parsed(written)
    data: Any = ModelCardData() if card is None else card.data
    if module is None:
        data.library_name = data.library_name or "transformers"
    data.tags = [*(data.tags or []), *(tag for tag in TAGS if tag not in (data.tags or []))]
    named = source is not None and HUB_ID.fullmatch(source) is not None and _came_from_the_hub(source)
    if named and data.base_model is None:
        data.base_model = source
    before = re.sub(f"{BEGIN}.*?{END}\n*", "", written if card is None else card.text, flags=re.DOTALL).strip()
    loading = _by_transformers(folder / "config.json") if module is None else _by_safetensors(module)
    section = _section(sparsity, layers, source if named else None, loading, note)
    text = "\n\n".join(part for part in (section, before) if part)
    write_text(path, f"---\n{data.to_yaml()}\n---\n\n{text}\n", durable=durable)


def _parsed(written: str) -> ModelCard | None:
    """Returns an existing card; None, with a warning, if its metadata cannot be read: all of it is text then."""
    if not written.startswith("---"):
        return None
    try:
        return ModelCard(written)
    except (ValueError, TypeError, YAMLError) as error:
        warnings.warn(f"the metadata of the model's {CARD} cannot be read and is kept as text: {error}", stacklevel=3)
        return None


def _came_from_the_hub(source: str) -> bool:
    """Returns whether a model of this name is in the hub's cache; a local path may look like a name, too."""
    return isinstance(try_to_load_from_cache(source, "config.json"), str)


def _by_transformers(config: Path) -> str:
    """Says how `transformers` loads a model: by its own class, if it is no causal language model."""
    named = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    kind: str = named[0] if named else "ForCausalLM"
    loader = "AutoModelForCausalLM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else kind
    return (
        f"`{loader}.from_pretrained` loads the folder as any\nother, and no special format or configuration is needed."
    )


def _by_safetensors(module: str) -> str:
    """Says how a module of any other class is loaded."""
    return (
        f"the folder holds\nno code: build the `{module}` they belong to and load them by\n"
        '`safetensors.torch.load_model(module, "model.safetensors")`.'
    )


def _section(sparsity: float, layers: int, source: str | None, loading: str, note: str) -> str:
    """Returns the section of the card that is marked by `BEGIN` and `END`."""
    of = f" of {source}" if source else ""
    sentences = [
        f"A pruned model{of}: {sparsity:.2%} of the weights of {layers} layers are zero.",
        f"Weights are stored dense, with their zeros: {loading} Dense kernels run it at the dense model's speed.",
        "Training overwrites the zeros unless the masks are held, e.g. by `MaskEnforcer` of prune-callbacks, which",
        "reads them from the zeros.",
        note,
        f"Written by prune-callbacks {version('prune-callbacks')}.",
    ]
    return "\n".join([BEGIN, "# Sparse model", "", *(sentence for sentence in sentences if sentence), END])
