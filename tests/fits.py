"""Small fits that several test files share."""

import torch
from lightning.pytorch import Trainer


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def trainer_of(callbacks, tmp_path, **settings):
    defaults = {
        "max_steps": 20,
        "gradient_clip_val": 0.5,
        "accumulate_grad_batches": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
    }
    return Trainer(default_root_dir=tmp_path, callbacks=callbacks, **(defaults | settings))
