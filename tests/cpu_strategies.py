"""Strategies on CPU processes over gloo, for tests: two cores are enough for the real DeepSpeed."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeedStrategy without its refusal of CPUs; all parameters are partitioned, small ones too."""

    strategy_name = "deepspeed_cpu"

    def __init__(self, *args, persistence=0, **kwargs):
        super().__init__(*args, **kwargs)
        if self.config["zero_optimization"]["stage"] == 3:
            self.config["zero_optimization"]["stage3_param_persistence_threshold"] = persistence
        # Its client optimizers are torch's, since DeepSpeed's own would be compiled.
        self.config["zero_force_ds_cpu_optimizer"] = False

    def setup_environment(self):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled on first use; gloo does as well
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]
        super(DeepSpeedStrategy, self).setup_environment()


def strategy_of(name, processes=2, **settings):
    """A strategy by its short name: auto, ddp, fsdp2, zero1, zero2, zero3."""
    if name == "auto":
        return "auto"
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo", **settings)
    if name == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=processes, tensor_parallel_size=1, process_group_backend="gloo", **settings
        )
    return CPUDeepSpeedStrategy(stage=int(name[-1]), process_group_backend="gloo", **settings)
