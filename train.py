"""python train.py recipe=NAME [key=value ...]: prune a language model, bring its quality back, and report."""

from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf

from prune_callbacks.evaluation.report import refuse_existing_run


def train(cfg: DictConfig) -> dict[str, Any]:
    """Instantiates what the recipe names, fits it, and returns the objects."""
    output = Path(cfg.output_dir)
    if cfg.ckpt_path is None:
        refuse_existing_run(output)
    seed_everything(cfg.seed, verbose=False)
    output.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, output / "config.yaml")
    datamodule = instantiate(cfg.data)
    module = instantiate(cfg.module)
    callbacks = instantiate(cfg.callbacks)
    loggers = instantiate(cfg.logger)
    trainer = instantiate(cfg.trainer, callbacks=list(callbacks.values()), logger=list(loggers.values()))
    trainer.fit(module, datamodule=datamodule, ckpt_path=cfg.ckpt_path)
    return {"trainer": trainer, "module": module, "datamodule": datamodule, "callbacks": callbacks}


def shrink(cfg: DictConfig, given: list[str]) -> DictConfig:
    """The recipe again with `smoke_overrides`, except for keys that were given on the command line."""
    keys = {override.lstrip("+~").split("=")[0] for override in given}
    return hydra.compose("train", [o for o in cfg.smoke_overrides if o.split("=")[0] not in keys] + given)


@hydra.main(version_base="1.3", config_path="recipes", config_name="train")
def main(cfg: DictConfig) -> None:
    """The command line."""
    train(shrink(cfg, list(HydraConfig.get().overrides.task)) if cfg.smoke else cfg)


if __name__ == "__main__":
    main()
