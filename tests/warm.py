"""What the server of `launch` imports once, so that the processes forked from it need not. See there."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for devices when it is imported

import importlib
import pkgutil

import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch.distributed.checkpoint
import torch.utils.tensorboard  # noqa: F401
import transformers.models.byt5.tokenization_byt5
import transformers.models.llama.modeling_llama  # noqa: F401

import prune_callbacks
import prune_callbacks.callbacks

for package in (prune_callbacks,):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
