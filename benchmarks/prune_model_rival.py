"""
llm-compressor's run of benchmarks/prune_model.py, with the interpreter of its own virtual environment.

    PYTHON prune_model_rival.py Wanda|SparseGPT MODEL_FOLDER WINDOWS.safetensors TARGET_FOLDER
"""

import json
import resource
import sys
import time
from importlib.metadata import version

import torch
from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main() -> None:
    method, folder, windows, target = sys.argv[1:]
    if method == "Wanda":
        from llmcompressor.modifiers.pruning import WandaPruningModifier as Modifier
    else:
        from llmcompressor.modifiers.pruning import SparseGPTModifier as Modifier
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = time.perf_counter()
    ids = load_file(windows)["calibration"].long()
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=Modifier(sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )
    pruned = time.perf_counter()
    model.save_pretrained(target)
    seconds = {"load": loaded - begin, "prune": pruned - loaded, "save": time.perf_counter() - pruned}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    versions = {name: version(name) for name in ("llmcompressor", "torch", "transformers")}
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "versions": versions}))


if __name__ == "__main__":
    main()
