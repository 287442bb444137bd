"""
Prunes and trains what a YAML file names, with Lightning's own command line.

python examples/lightning_cli/main.py fit --config examples/lightning_cli/config.yaml
"""

from lightning.pytorch.cli import LightningCLI
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


# A YAML file may name a function if its annotation says what it returns; those of transformers do not say it.
def pretrained_model(path: str) -> PreTrainedModel:
    """Loads a causal language model from a folder or the hub."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    return model


def pretrained_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model from a folder or the hub."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return tokenizer


if __name__ == "__main__":
    LightningCLI(auto_configure_optimizers=False)  # CausalLM makes its own optimizer
