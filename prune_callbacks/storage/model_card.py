"""The model card (`README.md`) of a sparse model's folder."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

CARD = "README.md"
TAGS = ("sparse", "pruned", "prune-callbacks")
BEGIN, END = "<!-- prune-callbacks -->", "<!-- /prune-callbacks -->"
"""The marks around the section that this module writes and replaces."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_model_card(folder: Path, sparsity: float, layers: int, *, source: str | None = None, note: str = "") -> None:
    """
    Writes or completes `folder/README.md`: how sparse the model is, how to load it, and how to keep its zeros.

    The metadata and the text of an existing card (the dense model's) are kept.

    Args:
        folder: the model's folder, complete except for the card.
        sparsity: the fraction of zeros in the pruned layers.
        layers: the number of pruned layers.
        source: the dense model's name on the hub, `owner/name`. Any other text, such as a local path, is ignored.
        note: a further sentence.
    """
    path = folder / CARD
    written = path.read_text(encoding="utf-8") if path.is_file() else ""
    card = ModelCard(written, ignore_metadata_errors=True) if written.startswith("---\n") else None
    data: Any = ModelCardData() if card is None else card.data
    data.library_name = data.library_name or "transformers"
    data.tags = [*(data.tags or []), *(tag for tag in TAGS if tag not in (data.tags or []))]
    named = source is not None and HUB_ID.fullmatch(source) is not None and not Path(source).exists()
    if named and data.base_model is None:
        data.base_model = source
    before = re.sub(f"{BEGIN}.*?{END}\n*", "", written if card is None else card.text, flags=re.DOTALL).strip()
    section = _section(sparsity, layers, source if named else None, note)
    text = "\n\n".join(part for part in (section, before) if part)
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")


def _section(sparsity: float, layers: int, source: str | None, note: str) -> str:
    """Returns the section of the card that is marked by `BEGIN` and `END`."""
    of = f" of {source}" if source else ""
    sentences = [
        f"A pruned model{of}: {sparsity:.2%} of the weights of {layers} layers are zero.",
        "Weights are stored dense, with their zeros: `AutoModelForCausalLM.from_pretrained` loads the folder as any",
        "other, and no special format or configuration is needed. Dense kernels run it at the dense model's speed.",
        "Training overwrites the zeros unless the masks are held, e.g. by `MaskEnforcer` of prune-callbacks, which",
        "reads them from the zeros.",
        note,
        f"Written by prune-callbacks {version('prune-callbacks')}.",
    ]
    return "\n".join([BEGIN, "# Sparse model", "", *(sentence for sentence in sentences if sentence), END])
