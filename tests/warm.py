"""What the server of `launch` imports once, so that the processes forked from it need not. See there."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for devices when it is imported

import gc
import importlib
import io
import pkgutil

import prune_callbacks
from prune_callbacks.reporting.drawing import subplots

NAMES = (
    "deepspeed.module_inject",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # brings torch's compiler, which every ZeRO optimizer asks for
    "hydra._internal.hydra",
    "hydra.core.override_parser.overrides_parser",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.strategies",
    "matplotlib.backends.backend_agg",
    "peft",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.profiler",
    "torch.utils.tensorboard",
    "transformers.models.byt5.tokenization_byt5",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer_utils",
)

for name in (*NAMES, *(found.name for found in pkgutil.walk_packages(prune_callbacks.__path__, "prune_callbacks."))):
    importlib.import_module(name)

# Fonts are found and read by the first picture.
subplots(figsize=(1, 1))[0].savefig(io.BytesIO())

# No collection in a forked process looks at all this again, which took a tenth of its time.
gc.collect()
gc.freeze()
