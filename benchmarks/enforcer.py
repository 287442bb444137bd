"""
What MaskEnforcer costs: one training step with it and without it, taken in turns in one run, per strategy.

    python benchmarks/enforcer.py                                   # SmolLM2-135M, one device, 4 x 256 tokens
    torchrun --standalone --nproc-per-node 2 benchmarks/enforcer.py --strategy ddp        # fsdp2, zero1, zero2, zero3

Every step is a whole optimizer step of Lightning (forward, backward, clipping, AdamW). In every second one the enforcer
is switched off, and in the others its own time is taken; the ratio of the medians and the enforcer's share of the step
are both reported, since on a noisy machine the first is the noisier one. DeepSpeed on CPUs: --cpu-deepspeed.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from prune_callbacks import CausalLM, MaskEnforcer, MaskSet
from prune_callbacks.anatomy.blocks import find_blocks
from prune_callbacks.anatomy.targets import find_targets
from prune_callbacks.sparsity import keep_largest
from prune_callbacks.tasks import smollm2_135m, tiny_llama


class Timed(MaskEnforcer):
    """The enforcer, with a switch and a clock."""

    on = True
    spent = 0.0

    def timed(self, work, *arguments):
        if self.on:
            wait()
            begin = time.perf_counter()
            work(*arguments)
            wait()
            self.spent += time.perf_counter() - begin

    def on_before_optimizer_step(self, *arguments):
        self.timed(super().on_before_optimizer_step, *arguments)

    def _after_step(self, *arguments):
        self.timed(super()._after_step, *arguments)


class Clock(Callback):
    """Takes the time of every step, and switches the enforcer from step to step."""

    def __init__(self, enforcer):
        self.enforcer = enforcer
        self.rows = []

    def on_train_batch_start(self, trainer, *_):
        self.enforcer.on, self.enforcer.spent = trainer.global_step % 2 == 0, 0.0
        wait()
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *_):
        wait()
        self.rows.append((self.enforcer.on, time.perf_counter() - self.begin, self.enforcer.spent))


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def strategy_of(name, cpu_deepspeed):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if name == "one":
        return "auto"
    if name == "ddp":
        return DDPStrategy()
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)
    if cpu_deepspeed:
        sys.path.append(str(Path(__file__).parents[1] / "tests"))
        from cpu_strategies import CPUDeepSpeedStrategy

        return CPUDeepSpeedStrategy(stage=int(name[-1]))
    return DeepSpeedStrategy(stage=int(name[-1]))


def half_masks(model):
    masks = []
    for name, target in find_targets(find_blocks(model)).items():
        scores = target.stored.abs()
        keep = keep_largest(scores.flatten(), scores.numel() // 2).view(scores.shape)
        masks.append(MaskSet({f"{name}.weight": keep}))
    return MaskSet.join(masks)


def memory_of(enforcer):
    """Bytes of the masks on the device, and how many weights they are for; bits shared with the MaskSet count once."""
    access = enforcer.weights
    bits = {keep._bits.untyped_storage().data_ptr(): keep._bits.numel() for keep in access._keep.values()}
    return sum(bits.values()), sum(keep._count for keep in access._keep.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="one", choices=["one", "ddp", "fsdp2", "zero1", "zero2", "zero3"])
    parser.add_argument("--model", default="smollm2_135m", help="smollm2_135m, tiny, or a folder")
    parser.add_argument("--batch", type=int, default=4, help="windows of a step, on every process")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12, help="measured steps; two more come first")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cpu-deepspeed", action="store_true")
    parser.add_argument("--output", default="benchmarks/results/enforcer.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    path = smollm2_135m() if options.model == "smollm2_135m" else options.model
    model = tiny_llama() if options.model == "tiny" else AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    masks = half_masks(model)
    enforcer = Timed(masks)
    clock = Clock(enforcer)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    data = torch.randint(3, model.config.vocab_size, (options.batch * processes * (options.steps + 2), options.tokens))
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(
        accelerator=accelerator,
        devices=processes,
        strategy=strategy_of(options.strategy, options.cpu_deepspeed),
        precision=options.precision,
        max_steps=options.steps + 2,
        gradient_clip_val=1.0,
        callbacks=[enforcer, clock],
        logger=False,
        log_every_n_steps=10**6,  # counting violations is logging, not enforcing
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    memory = {}
    clock.on_train_start = lambda *_: memory.update(zip(("bytes", "weights"), memory_of(enforcer), strict=True))
    clock.on_train_end = lambda *_: enforcer.weights.project()  # every other step was made without it
    trainer.fit(CausalLM(model, partial(torch.optim.AdamW, lr=1e-5)), DataLoader(data, options.batch))
    rows = clock.rows[2:]
    held, free = ([seconds for on, seconds, _ in rows if on is which] for which in (True, False))
    spent = [spent / seconds for on, seconds, spent in rows if on]
    result = {
        "strategy": options.strategy,
        "processes": processes,
        "model": options.model,
        "tokens": [options.batch, options.tokens],
        "precision": options.precision,
        "threads": torch.get_num_threads(),
        "step_seconds_without": round(statistics.median(free), 4),
        "step_seconds_with": round(statistics.median(held), 4),
        "ratio_of_medians": round(statistics.median(held) / statistics.median(free), 4),
        "share_of_step": round(statistics.median(spent), 5),
        "largest_share": round(max(spent), 5),
        "mask_bytes_here": memory["bytes"],
        "bits_per_weight_here": round(8 * memory["bytes"] / max(1, memory["weights"]), 4),
        "device": torch.cuda.get_device_name() if accelerator == "cuda" else platform.machine(),
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
        "command": " ".join(["benchmarks/enforcer.py", *sys.argv[1:]]),
    }
    if trainer.is_global_zero:
        print(json.dumps(result, indent=1))
        output = Path(options.output)
        known = json.loads(output.read_text()) if output.exists() else []
        same = ("strategy", "processes", "model", "precision", "device", "tokens")
        known = [row for row in known if any(row[key] != result[key] for key in same)]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps([*known, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
