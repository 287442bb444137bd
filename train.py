"""Prunes a language model, recovers its quality, and writes reports: python train.py recipe=NAME [key=value ...]."""

import os
import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import seed_everything
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from prune_callbacks.reporting.comparison import write_comparison
from prune_callbacks.reporting.pictures import compare
from prune_callbacks.storage.checkpoints import newest_checkpoint
from prune_callbacks.storage.run_record import read_record, refuse_existing_run

SHARED = (
    *("smoke", "seed", "model", "data", "evaluate", "zero_shot", "pattern", "allocation"),
    *("objective", "optimizer", "trainer", "logger"),
)
"""Keys that compared recipes share: their overrides also apply to the recipes in `beside`."""

OUTPUT_DIR = "PRUNE_CALLBACKS_OUTPUT_DIR"
"""Names rank 0's folder for other ranks that Lightning starts, which would compute one with a later time."""


def processes(devices: Any, nodes: int) -> int:
    """Returns the number of processes on all nodes; raises ValueError if `devices` is not a positive number."""
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices must be a number of devices here, got {devices!r}")
    return devices * nodes


def needed(value: Any, key: str) -> Any:
    """Returns `value`; raises ValueError if it is None, for values that only some recipes need."""
    if value is None:
        raise ValueError(f"this needs {key}=...")
    return value


OmegaConf.register_new_resolver("half", lambda number: number // 2, replace=True)
OmegaConf.register_new_resolver("needed", needed, replace=True)
OmegaConf.register_new_resolver("processes", processes, replace=True)
OmegaConf.register_new_resolver("devices", lambda: max(1, torch.cuda.device_count()), replace=True)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Instantiates the objects of a recipe, fits the model or runs the job, and returns them."""
    output = Path(cfg.output_dir)
    if cfg.ckpt_path is None and not cfg.goes_on:
        refuse_existing_run(output)
    seed_everything(cfg.seed, verbose=False)
    if rank_zero_only.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, output / "config.yaml")
    if cfg.job is not None:
        return {"job": rank_zero_only(instantiate)(cfg.job)}
    datamodule = instantiate(cfg.data)
    module = instantiate(cfg.module)
    callbacks = instantiate(cfg.callbacks)
    loggers = instantiate(cfg.logger)
    trainer = instantiate(cfg.trainer, callbacks=list(callbacks.values()), logger=list(loggers.values()))
    trainer.fit(module, datamodule=datamodule, ckpt_path=cfg.ckpt_path)
    return {"trainer": trainer, "module": module, "datamodule": datamodule, "callbacks": callbacks}


def key(override: str) -> str:
    """Returns the key that an override sets."""
    return override.lstrip("+~").split("=")[0]


def missing_keys(values: Any, path: str = "") -> list[str]:
    """Returns keys that the command line must set; OmegaConf's own version fails on references to such keys."""
    if isinstance(values, dict):
        return [found for name, value in values.items() for found in missing_keys(value, f"{path}.{name}".lstrip("."))]
    return [path] if values == "???" else []


def composed(given: list[str]) -> DictConfig:
    """Composes the recipe; smoke=true shrinks it, except for keys that were given on the command line."""
    cfg = hydra.compose("train", given)
    if cfg.smoke:
        keys = {key(override) for override in given}
        shrunk = [o for o in [*cfg.smoke_overrides, *cfg.recipe_smoke_overrides] if key(o) not in keys]
        cfg = hydra.compose("train", shrunk + given)
    return cfg


def run_beside(cfg: DictConfig) -> None:
    """Runs a recipe for comparison with another; resumes from its newest checkpoint, and skips a finished run."""
    folder = Path(cfg.output_dir)
    checkpoint = newest_checkpoint(folder / "checkpoints")
    record = read_record(folder)
    if checkpoint or record is not None:
        before = OmegaConf.load(folder / "config.yaml")
        if OmegaConf.merge(before, {"ckpt_path": None}) != cfg:
            raise ValueError(f"{folder} holds a {cfg.name} of another configuration. Choose another output_dir")
        if record is not None and record.stage == "recovered":
            return
    try:
        cfg.ckpt_path = str(checkpoint) if checkpoint else None
        train(cfg)
    except ValueError as error:
        raise ValueError(f"{cfg.name}, which runs alongside: {error}") from error


def run(given: list[str]) -> None:
    """Runs the unfinished recipes in `beside`, then this recipe, and compares them all."""
    if "CROSS_SIZE" in os.environ:  # set by deepspeed's launcher; Lightning needs torchrun's variable
        os.environ.setdefault("TORCHELASTIC_RUN_ID", "deepspeed")
    cfg = composed(given)
    missing = missing_keys(OmegaConf.to_container(cfg))
    if missing:
        raise ValueError(f"recipe={cfg.name} needs {' and '.join(f'{name}=...' for name in missing)}")
    if cfg.ckpt_path is not None and "output_dir" not in map(key, given):
        raise ValueError("a run that resumes from ckpt_path= resumes in its own folder: name it with output_dir=")
    started = max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_NTASKS"))
    several = started > 1 or cfg.trainer.get("num_nodes", 1) > 1
    if several and OUTPUT_DIR not in os.environ and "output_dir" not in map(key, given):
        raise ValueError("processes that are not started by this one need one folder for all of them: output_dir=")
    cfg.output_dir = os.environ.get(OUTPUT_DIR, cfg.output_dir)  # its default contains the time: read once
    os.environ[OUTPUT_DIR] = cfg.output_dir
    try:
        run_all(cfg, given)
    finally:
        del os.environ[OUTPUT_DIR]


def run_all(cfg: DictConfig, given: list[str]) -> None:
    """Runs all recipes and their comparison, once the folder is known."""
    folders = {cfg.name: Path(cfg.output_dir)}
    if cfg.beside:  # reports errors now, not after the other recipes
        instantiate(cfg.callbacks)
        if cfg.ckpt_path is None:
            refuse_existing_run(folders[cfg.name])
        elif not Path(cfg.ckpt_path).exists():
            raise ValueError(f"no checkpoint at {cfg.ckpt_path}")
    shared = [override for override in given if key(override).split(".")[0] in SHARED]
    for name in cfg.beside:
        other = composed([*shared, f"recipe={name}"])
        other.output_dir = str(Path(cfg.output_dir) / name)
        folders[name] = Path(other.output_dir)
        run_beside(other)
    train(cfg)
    if cfg.beside and cfg.job is None:
        records = {name: read_record(folder) for name, folder in folders.items()}
        rank_zero_only(compare)(records, Path(cfg.output_dir) / "compared.png")
        rank_zero_only(write_comparison)(list(folders.values()), Path(cfg.output_dir) / "compare.html")


@hydra.main(version_base="1.3", config_path="recipes", config_name="train")
def main(cfg: DictConfig) -> None:
    """Runs the command line."""
    given = list(HydraConfig.get().overrides.task)
    try:
        run(given)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # Hydra reports the first failure only, after all jobs
            print(f"failed: {' '.join(given)}: {' '.join(str(error).split())}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
