"""Measures zero-shot accuracy of a model in memory with EleutherAI's lm_eval."""

import copy
import importlib.util
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEADLINE = {
    "lambada_openai": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "winogrande": "acc",
}
"""The headline metric of every task, by lm_eval's names."""


@dataclass(frozen=True)
class ZeroShot:
    """
    A measurement of zero-shot accuracy on LAMBADA, HellaSwag, PIQA, ARC and WinoGrande by `lm_eval` (extra: `eval`).

    Equivalent to `lm_eval --model hf --batch_size N` on the same examples. The headline metric is the accuracy. For
    HellaSwag and ARC-Challenge it is the accuracy normalised by the length of the answers, as on the Open LLM
    Leaderboard and as is customary for these six tasks (Gu and Dao, Mamba, 2023). Pruning papers differ: Wanda's tables
    (Sun et al. 2024) give the plain accuracy for all tasks. Results include both.

    With local files, prompts and answers are those of `lm_eval`'s own tasks, except for ARC questions with five choices
    (see `zero_shot_tasks/local_arc_easy.yaml`). LAMBADA's perplexity is not measured.

    Args:
        tasks: names of tasks in `HEADLINE`.
        root: a folder with `lambada/lambada_test.jsonl` and the other files named in `zero_shot_tasks/*.yaml`; None for
            lm_eval's own tasks, with data from the Hugging Face Hub.
        limit: number of examples per task, from the start of the file; None for all.
        batch_size: requests per forward pass.

    Raises:
        ValueError: a task is unknown, a number is less than 1, or lm_eval is not installed.
    """

    tasks: Sequence[str] = tuple(HEADLINE)
    root: str | Path | None = None
    limit: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        tasks = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)
        object.__setattr__(self, "tasks", tasks)
        unknown = [task for task in tasks if task not in HEADLINE]
        if unknown or not tasks:
            raise ValueError(f"zero-shot tasks are some of {', '.join(HEADLINE)}; got {unknown or 'none'}")
        for name, number in (("limit", self.limit), ("batch_size", self.batch_size)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"zero-shot {name} must be a whole number, at least 1, got {number}")
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError(
                "zero-shot accuracy needs lm_eval, which is not installed: pip install prune-callbacks[eval]"
            )

    def check(self) -> None:
        """
        Reads the data of all tasks, so that missing data is reported before any work is done.

        Raises:
            ValueError: a local file is missing or has another format.
        """
        with _isolated(logging.ERROR):
            self._load()

    def __call__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
        """
        Measures a causal LM of `transformers` on its own device; restores its training mode and the random state.

        Returns:
            for each task: `metric` (name of the headline metric), `value`, `stderr` (None for a single example),
            `limit`, `examples` (number of examples), `data` ("local" or "hub"), and `all`, which maps each metric to
            its `value` and `stderr`.

        Raises:
            ValueError: the model is not a `transformers` model, or as in `check`.
        """
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"lm_eval measures models of transformers, got {type(model).__name__}")
        modes = [(module, module.training) for module in model.modules()]
        try:
            results = self._evaluate(model, tokenizer)
        finally:
            for module, training in modes:
                module.training = training
        return {task: self._result(task, results) for task in self.tasks}

    def _evaluate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _isolated(logging.ERROR):  # hides warnings about a model in memory and local data
            manager, tasks = self._load()
            # lm_eval may give the tokenizer a padding token.
            lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=self.batch_size)
        with _isolated(logging.WARNING):
            results: dict[str, Any] = simple_evaluate(
                lm,
                tasks=tasks,
                task_manager=manager,
                limit=self.limit,
                log_samples=False,
                bootstrap_iters=1000,  # of LAMBADA's perplexity, which is not reported; accuracies have a closed form
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        return results

    def _load(self) -> tuple[Any, list[Any]]:
        """Returns lm_eval's task manager, and the tasks of this measurement with their data."""
        from lm_eval.tasks import TaskManager

        if self.root is None:
            manager = TaskManager()
        else:
            yaml = Path(__file__).parent / "zero_shot_tasks"
            manager = TaskManager(include_path=str(yaml), include_defaults=False, metadata={"root": str(self.root)})
        return manager, list(manager.load([self._name(task) for task in self.tasks])["tasks"].values())

    def _name(self, task: str) -> str:
        return task if self.root is None else f"local_{task}"

    def _result(self, task: str, results: dict[str, Any]) -> dict[str, Any]:
        name = self._name(task)
        values = results["results"][name]
        # Keys have the name of the answer filter as a suffix, which is "none" here: "acc,none", "acc_stderr,none".
        metrics = {
            metric: {
                "value": float(values[f"{metric},none"]),
                "stderr": None if values[f"{metric}_stderr,none"] == "N/A" else float(values[f"{metric}_stderr,none"]),
            }
            for metric in ("acc", "acc_norm")
            if f"{metric},none" in values
        }
        return {
            "metric": HEADLINE[task],
            **metrics[HEADLINE[task]],
            "limit": self.limit,
            "examples": results["n-samples"][name]["effective"],
            "data": "hub" if self.root is None else "local",
            "all": metrics,
        }


@contextmanager
def _isolated(level: int) -> Iterator[None]:
    """Temporarily sets the log level of lm_eval; restores it on exit, and the state of Python's random numbers."""
    logger, state = logging.getLogger("lm_eval"), random.getstate()
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        random.setstate(state)
