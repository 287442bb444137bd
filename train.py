"""Prunes a model, recovers its quality, and writes reports: python train.py recipe=NAME; --help says more."""

# What takes seconds to import is imported where it is used: help and misspelt keys are answered at once.
import os
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from prune_callbacks.command_line.arguments import check_arguments, check_named
from prune_callbacks.command_line.errors import first_lines, raiser, sentence
from prune_callbacks.command_line.help import help_text, recipe_list
from prune_callbacks.command_line.keys import missing_keys, no_such_flag
from prune_callbacks.command_line.words import Recipes, Word, check_choices, check_read, culprit, jobs, unreadable

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


def devices() -> int:
    """Returns the number of devices of this machine, 1 without any."""
    import torch

    return max(1, torch.cuda.device_count())


def needed(value: Any, key: str) -> Any:
    """Returns `value`; raises ValueError if it is None, for values that only some recipes need."""
    if value is None:
        raise ValueError(f"this needs {key}=...")
    return value


OmegaConf.register_new_resolver("half", lambda number: number // 2, replace=True)
OmegaConf.register_new_resolver("needed", needed, replace=True)
OmegaConf.register_new_resolver("processes", processes, replace=True)
OmegaConf.register_new_resolver("devices", devices, replace=True)


def composed_values(given: list[str]) -> Any:
    """Composes words to nested values, Hydra's own among them; raises ValueError where Hydra refuses them."""
    try:
        return OmegaConf.to_container(hydra.compose("train", given, return_hydra_config=True))
    except (HydraException, ValueError) as error:
        raise ValueError(first_lines(error)) from error


def loaded(file: Path) -> Any:
    """Reads a YAML file."""
    return OmegaConf.to_container(OmegaConf.load(file))


RECIPES = Recipes(Path(__file__).parent / "recipes", loaded, composed_values)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Instantiates the objects of a recipe, fits the model or runs the job, and returns them."""
    from lightning import seed_everything
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from prune_callbacks.storage.run_record import refuse_existing_run

    output = Path(cfg.output_dir)
    if cfg.ckpt_path is None and not cfg.goes_on:
        refuse_existing_run(output)
    seed_everything(cfg.seed, verbose=False)
    if rank_zero_only.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, output / "config.yaml")
    if cfg.job is not None:
        return {"job": (instantiate if cfg.on_all_ranks else rank_zero_only(instantiate))(cfg.job)}
    datamodule = instantiate(cfg.data)
    module = instantiate(cfg.module)
    callbacks = instantiate(cfg.callbacks)
    loggers = instantiate(cfg.logger)
    trainer = instantiate(cfg.trainer, callbacks=list(callbacks.values()), logger=list(loggers.values()))
    trainer.fit(module, datamodule=datamodule, ckpt_path=cfg.ckpt_path)
    return {"trainer": trainer, "module": module, "datamodule": datamodule, "callbacks": callbacks}


def words(given: list[str]) -> list[Word]:
    """Reads the words of a command; raises ValueError if one is not KEY=VALUE, or not a key of Hydra's grammar."""
    loader = GlobalHydra.instance().config_loader()
    groups = {*loader.list_groups(""), *(f"hydra/{group}" for group in loader.list_groups("hydra"))} - {"hydra"}
    paths = [word for word in given if word.startswith("hydra.searchpath=")]
    try:
        overrides = OverridesParser.create(loader).parse_overrides(given)
    except OverrideParseException as error:
        raise ValueError(unreadable(error.override, loader.get_group_options("recipe"))) from error
    found = []
    for override in overrides:
        if override.is_interval_sweep():
            raise ValueError(f"{override.input_line} names no values: {override.key_or_group}=0.5,0.6 does")
        name, group = override.get_key_element(), override.key_or_group in groups
        listed = tuple(override.sweep_string_iterator()) if override.is_discrete_sweep() else ()
        found.append(
            Word(
                line=override.input_line,
                sign=name[: len(name) - len(name.lstrip("+~"))],
                key=override.key_or_group,
                value=override.input_line.partition("=")[2] if override.is_sweep_override() else override.value(),
                several=tuple(f"{name}={value}" for value in listed) or (override.input_line,),
                options=tuple(loader.get_group_options(override.key_or_group, overrides=paths)) if group else None,
            )
        )
    return found


def checked(given: list[str]) -> DictConfig:
    """Composes words, Hydra's values too; raises ValueError, with the nearest, on what is not there or not read."""
    typed = words(given)
    check_choices(typed)
    if not any(word.key == "recipe" and word.sign != "~" for word in typed):
        recipes = recipe_list(RECIPES.folder, shutil.get_terminal_size().columns)
        raise ValueError(f"recipe=NAME is missing. There are:\n{recipes}\npython train.py --help lists the keys too")
    try:
        cfg = hydra.compose("train", given, return_hydra_config=True)
    except (HydraException, ValueError) as error:
        raise ValueError(culprit(typed, RECIPES, first_lines(error))) from error
    check_read(typed, OmegaConf.to_container(cfg), RECIPES)
    for word in typed:
        if "${" in word.line:
            resolve(cfg, word)
    return cfg


def resolve(cfg: DictConfig, word: Word) -> None:
    """Resolves the references in what a word sets; raises ValueError if one leads nowhere."""
    try:
        value = OmegaConf.select(cfg, word.key)
        if OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{word.line}: {first_lines(error).removeprefix(f'{word.key}: ')}") from error


def composed(given: list[str]) -> DictConfig:
    """Composes the recipe; smoke=true shrinks it, except for keys that were given on the command line."""
    cfg = checked(given)
    for name in ("smoke", "goes_on"):
        if not isinstance(cfg[name], bool):
            raise ValueError(f"{name} must be true or false, got {cfg[name]!r}")
    if isinstance(cfg.beside, str):
        raise ValueError(f"beside must be a list: beside=[{cfg.beside}]")
    if cfg.smoke:
        keys = {key(override) for override in given}
        shrunk = [o for o in [*cfg.smoke_overrides, *cfg.recipe_smoke_overrides] if key(o) not in keys]
        try:
            cfg = checked(shrunk + given)
        except ValueError as error:
            options = " ".join(override for override in shrunk if "." not in key(override))
            raise ValueError(f"{error} (smoke=true sets {options}.)") from error
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def key(override: str) -> str:
    """Returns the key that an override sets."""
    return override.lstrip("+~").split("=")[0]


def check_values(cfg: DictConfig, given: list[str]) -> None:
    """Raises ValueError if a key is missing, or a value does not fit the class that takes it."""

    def resolved(name: str) -> Any:
        value = OmegaConf.select(cfg, name)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    values = OmegaConf.to_container(cfg)
    missing = missing_keys(values)
    if missing:
        raise ValueError(f"recipe={cfg.name} needs {' and '.join(f'{name}=...' for name in missing)}")
    typed = words(given)
    for word in typed:
        resolve(cfg, word)
    check_named(values, ("callbacks", "logger"))
    check_arguments(values, {word.key for word in typed if not word.chooses}, resolved)


def run_beside(cfg: DictConfig) -> None:
    """Runs a recipe for comparison with another; resumes from its newest checkpoint, and skips a finished run."""
    from prune_callbacks.storage.checkpoints import newest_checkpoint
    from prune_callbacks.storage.run_record import read_record

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
    except (ValueError, InstantiationException) as error:
        said = told(error)
        if said is None:  # nobody foresaw it
            raise
        raise ValueError(f"{cfg.name}, which runs alongside: {said}") from error


def run(given: list[str]) -> None:
    """Runs the unfinished recipes in `beside`, then this recipe, and compares them all."""
    if "CROSS_SIZE" in os.environ:  # set by deepspeed's launcher; Lightning needs torchrun's variable
        os.environ.setdefault("TORCHELASTIC_RUN_ID", "deepspeed")
    cfg = composed(given)
    check_values(cfg, given)
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
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from prune_callbacks.reporting.comparison import write_comparison
    from prune_callbacks.reporting.pictures import compare
    from prune_callbacks.storage.run_record import read_record, refuse_existing_run

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


def told(error: BaseException, given: list[str] | None = None) -> str | None:
    """Returns what an error says to whoever typed the command; None if it needs its traceback."""
    built = None
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        found = re.search(r"^full_key: (\S+)$", str(error), re.MULTILINE)
        built, error = found and found[1], error.__cause__
    composing = isinstance(error, OmegaConfBaseException) and raiser(error) in ("hydra", "train", "__main__")
    if composing or isinstance(error, HydraException):
        return first_lines(error)
    return sentence(error, list(map(key, given or ())), None if built == "job" else built)


def say(error: BaseException, given: list[str], job: str = "") -> None:
    """Prints the sentence of an error that is meant for whoever typed the command, else (or if asked for) all of it."""
    said = None if os.environ.get("HYDRA_FULL_ERROR") == "1" else told(error, given)
    trace = "" if said else "".join(traceback.format_exception(error))
    if job:
        said = f"failed: {job}: {' '.join((said or str(error)).split())}"
    sys.stderr.write(
        "".join(f"{text}\n" for text in (said, trace.rstrip()) if text)
    )  # at once: there may be other ranks


def show_help(given: list[str]) -> None:
    """Prints the help, with the values of a recipe if one is named."""
    typed = words(given)
    check_choices(typed)
    options = RECIPES.defaults() | {word.key: word.value for word in typed if word.chooses}
    config = RECIPES.values(options)
    if options["recipe"] != "???":
        config = OmegaConf.to_container(checked(given))
        options = config.pop("hydra")["runtime"]["choices"]
    try:
        print(help_text(RECIPES.folder, config, options, shutil.get_terminal_size().columns), flush=True)
    except BrokenPipeError:  # into head, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_runs(given: list[str], multirun: bool) -> None:
    """Raises ValueError if one of the runs that a command makes cannot be composed."""
    typed = words(given)
    cfg = checked([word.several[0] for word in typed])
    if not multirun and cfg.hydra.mode != RunMode.MULTIRUN:
        check_choices(typed)
        return
    swept = cfg.hydra.sweeper.get("params") or {}
    own = words([f"{name}={values}" for name, values in swept.items() if name not in map(key, given)])
    for one in jobs([*own, *typed]):
        checked(one)


def check_command() -> bool:
    """Checks the command, or prints the help; returns whether something is left to do."""
    parser = get_args_parser()
    arguments, unknown = parser.parse_known_args()
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise ValueError(no_such_flag(unknown[0], flags))
    if arguments.config_name or arguments.config_path:
        raise ValueError("train.py has one configuration; --config-dir FOLDER adds recipes and options to it")
    unchecked = (arguments.hydra_help, arguments.shell_completion, arguments.experimental_rerun)
    if any(unchecked) or arguments.info == "plugins":
        return True
    given = arguments.overrides
    if arguments.config_dir:
        given = [f"hydra.searchpath=['file://{Path(arguments.config_dir).resolve(strict=True)}']", *given]
    with hydra.initialize_config_dir(str(RECIPES.folder), version_base="1.3"):
        if arguments.help:
            show_help(given)
        else:
            check_runs(given, arguments.multirun)
    return not arguments.help


def main() -> None:
    """Runs the command line; the exit code is 1 after an error."""
    failed = []

    def job(cfg: DictConfig) -> None:
        given = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        multirun = HydraConfig.get().mode == RunMode.MULTIRUN
        try:
            run(given)
        except Exception as error:
            say(error, given, " ".join(given) if multirun else "")
            if not multirun:
                sys.exit(1)
            failed.append(given)  # the other jobs run

    try:
        if check_command():
            hydra.main(version_base="1.3", config_path="recipes", config_name="train")(job)()
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        say(error, sys.argv[1:])
        sys.exit(1)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
