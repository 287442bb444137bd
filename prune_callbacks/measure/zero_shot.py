"""Zero-shot accuracy of a model in memory, measured by EleutherAI's lm_eval."""

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
"""The tasks, by lm_eval's names, and the metric that is quoted of each."""


@dataclass(frozen=True)
class ZeroShot:
    """
    Zero-shot accuracy on LAMBADA, HellaSwag, PIQA, ARC and WinoGrande through `lm_eval` (an extra: `eval`).

    The numbers are those of `lm_eval --model hf --batch_size N` on the same examples. The headline is the accuracy; for
    HellaSwag and ARC-Challenge it is the one normalised by the length of the answers, as the Open LLM Leaderboard has
    it and as is customary for these six tasks together (Gu and Dao, Mamba, 2023). The pruning papers differ: Wanda's
    tables (Sun et al. 2024) have the plain accuracy everywhere. Results hold both.

    On local files the prompts and answers are those of `lm_eval`'s own tasks, but for questions of ARC with five
    choices (`zero_shot_tasks/local_arc_easy.yaml`); LAMBADA's perplexity is left out.

    Args:
        tasks: some of `HEADLINE`'s.
        root: a folder with `lambada/lambada_test.jsonl` and the other files that `zero_shot_tasks/*.yaml` name; None
            for lm_eval's own tasks, whose data comes from the Hugging Face hub.
        limit: examples per task, from the front of the file; None for all.
        batch_size: requests per forward pass.

    Raises:
        ValueError: a task is unknown, a number is smaller than 1, or lm_eval is not installed.
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
        Reads the data of all tasks, so that what is missing is said before there is work to lose.

        Raises:
            ValueError: a local file is missing or holds something else.
        """
        with _isolated(logging.ERROR):
            self._load()

    def __call__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
        """
        Measures a causal LM of `transformers`, which runs where it is and is left as it was, as is random state.

        Returns:
            task -> `metric` (the headline's name), `value`, `stderr` (None of one example), `limit`, `examples` (how
            many there were), `data` ("local" or "hub"), and `all`: metric -> `value` and `stderr`.

        Raises:
            ValueError: the model is not one of transformers, or as `check`.
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

        with _isolated(logging.ERROR):  # that a model in memory and data of one's own are unusual
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
        """lm_eval's index of tasks, and ours with their data."""
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
        # Keys are "acc,none" and "acc_stderr,none", after the filter of answers, of which there is none.
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
    """Nothing below this level is said by lm_eval, and Python's random numbers, which it draws, go on as before."""
    logger, state = logging.getLogger("lm_eval"), random.getstate()
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        random.setstate(state)
