"""Zero-shot accuracy: the prompts, the numbers, what is left as it was, and what is refused."""

import copy
import importlib.util
import json
import logging
import math
import os
import random
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from launch import good, train
from lightning.pytorch import Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prune_callbacks import NM, CausalLM, Magnitude, MaskEnforcer, OneShotPrune, RunReport, TokenDataModule
from prune_callbacks.callbacks.run_quality import RunQuality
from prune_callbacks.measure.zero_shot import HEADLINE, ZeroShot
from prune_callbacks.measure.zero_shot_tasks import hellaswag_query
from prune_callbacks.tasks import PythonDocs, tiny_llama

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install prune-callbacks[eval]"
)
ROOT = Path(__file__).parent.parent
FOLDER = os.environ.get("PRUNE_CALLBACKS_DATA")

ROWS = {
    "lambada/lambada_test.jsonl": [
        {"text": 'He said "no  way," and\n\nleft the house'},
        {"text": "One two three, one two"},
        {"text": "A dog and a cat"},
    ],
    "hellaswag/hellaswag_val.jsonl": [
        {"query": "Tea: A man boils water. he", "choices": ["pours it.", "eats the kettle.", "a", "b"], "gold": 0},
        {"query": 'Tea: A sign "go!" appears. the Two men', "choices": ["wave.", "fly off.", "c", "d"], "gold": 1},
        {"query": "Tea: How to boil it. Fill the pot.", "choices": ["Heat it.", "Drop it.", "e", "f"], "gold": 0},
    ],
    "piqa/valid.jsonl": [
        {"goal": "dresser", "sol1": "use a pin ", "sol2": "say 'please'"},
        {"goal": "Open a jar?", "sol1": "Twist the lid.", "sol2": "Twist the table, twice."},
        {"goal": "ice", "sol1": "freeze water", "sol2": "boil it"},
    ],
    "arc/arc_easy.jsonl": [
        {"query": "Question: Which is hot?", "choices": ["ice", "the sun", "snow", "a fridge"], "gold": 1},
        {"query": "Question: 2 + 2?", "choices": ["3", "4", "5", "6 or so"], "gold": 1},
        {"query": "Question: Wet?", "choices": ["sand", "stone", "sand", "rain water"], "gold": 3},
    ],
    "arc/arc_challenge.jsonl": [
        {"query": "Question: Why?", "choices": ["because", "gravity pulls", "no", "yes"], "gold": 1},
        {"query": "Question: How?", "choices": ["slowly", "well", "with care, mostly", "not"], "gold": 2},
        {"query": "Question: When?", "choices": ["now", "soon", "later on", "then"], "gold": 0},
    ],
    "winogrande/winogrande_dev.jsonl": [
        {"context_options": ["Sue saw Ann so Sue", "Sue saw Ann so Ann"], "continuation": "waved.", "gold": 0},
        {"context_options": ["He sat by the bed", "He sat by the fire"], "continuation": "'s side.", "gold": 1},
        {"context_options": ["It was in the box", "It was in the car"], "continuation": ".", "gold": 1},
    ],
}
LABELS = [0, 0, 1]

# The requests of the first two examples of every task: context and continuation, and which is right.
PROMPTS = {
    "lambada_openai": [
        ([('He said "no  way," and\n\nleft the', " house")], " house"),
        ([("One two three, one", " two")], " two"),
    ],
    "hellaswag": [
        (
            [
                ("Tea: A man boils water. He", " pours it."),
                ("Tea: A man boils water. He", " eats the kettle."),
                ("Tea: A man boils water. He", " a"),
                ("Tea: A man boils water. He", " b"),
            ],
            0,
        ),
        (
            [
                ('Tea: A sign "go!" appears. The two men', " wave."),
                ('Tea: A sign "go!" appears. The two men', " fly off."),
                ('Tea: A sign "go!" appears. The two men', " c"),
                ('Tea: A sign "go!" appears. The two men', " d"),
            ],
            1,
        ),
    ],
    "piqa": [
        ([("Question: dresser\nAnswer:", " use a pin "), ("Question: dresser\nAnswer:", " say 'please'")], 0),
        (
            [
                ("Question: Open a jar?\nAnswer:", " Twist the lid."),
                ("Question: Open a jar?\nAnswer:", " Twist the table, twice."),
            ],
            0,
        ),
    ],
    "arc_easy": [
        (
            [
                ("Question: Which is hot?\nAnswer:", " ice"),
                ("Question: Which is hot?\nAnswer:", " the sun"),
                ("Question: Which is hot?\nAnswer:", " snow"),
                ("Question: Which is hot?\nAnswer:", " a fridge"),
            ],
            1,
        ),
        (
            [
                ("Question: 2 + 2?\nAnswer:", " 3"),
                ("Question: 2 + 2?\nAnswer:", " 4"),
                ("Question: 2 + 2?\nAnswer:", " 5"),
                ("Question: 2 + 2?\nAnswer:", " 6 or so"),
            ],
            1,
        ),
    ],
    "arc_challenge": [
        (
            [
                ("Question: Why?\nAnswer:", " because"),
                ("Question: Why?\nAnswer:", " gravity pulls"),
                ("Question: Why?\nAnswer:", " no"),
                ("Question: Why?\nAnswer:", " yes"),
            ],
            1,
        ),
        (
            [
                ("Question: How?\nAnswer:", " slowly"),
                ("Question: How?\nAnswer:", " well"),
                ("Question: How?\nAnswer:", " with care, mostly"),
                ("Question: How?\nAnswer:", " not"),
            ],
            2,
        ),
    ],
    "winogrande": [
        ([("Sue saw Ann so Sue", " waved."), ("Sue saw Ann so Ann", " waved.")], 0),
        ([("He sat by the bed", " 's side."), ("He sat by the fire", " 's side.")], 1),
    ],
}

# The same examples in the form in which the hub has them: lm_eval's own tasks make the same requests of them.
OFFICIAL = {
    "lambada_openai": ("lambada/lambada_openai.yaml", ROWS["lambada/lambada_test.jsonl"]),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        [
            {"ctx_a": a, "ctx_b": b, "activity_label": "Tea", "endings": row["choices"], "label": str(row["gold"])}
            for a, b, row in zip(
                ["A man boils water.", 'A sign "go!" appears.', "How to boil it. [step] Fill the pot."],
                ["he", "the Two men", ""],
                ROWS["hellaswag/hellaswag_val.jsonl"],
                strict=True,
            )
        ],
    ),
    "piqa": (
        "piqa/piqa.yaml",
        [row | {"label": label} for row, label in zip(ROWS["piqa/valid.jsonl"], LABELS, strict=True)],
    ),
    **{
        name: (
            f"arc/{name}.yaml",
            [
                {
                    "question": row["query"].removeprefix("Question: "),
                    "choices": {"text": row["choices"], "label": ["A", "B", "C", "D"]},
                    "answerKey": "ABCD"[row["gold"]],
                }
                for row in ROWS[f"arc/{name}.jsonl"]
            ],
        )
        for name in ("arc_easy", "arc_challenge")
    },
    "winogrande": (
        "winogrande/default.yaml",
        [
            {"sentence": "Sue saw Ann so _ waved.", "option1": "Sue", "option2": "Ann", "answer": "1"},
            {"sentence": "He sat by the _'s side.", "option1": "bed", "option2": "fire", "answer": "2"},
            {"sentence": "It was in the _.", "option1": "box", "option2": "car", "answer": "2"},
        ],
    ),
}


def write(folder, rows=ROWS, labels=LABELS):
    for name, examples in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(example) + "\n" for example in examples))
    (folder / "piqa/valid-labels.lst").write_text("".join(f"{label}\n" for label in labels))
    return folder


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "data")


@pytest.fixture
def letters():
    """A tokenizer whose tokens are bytes, with one for the end that it adds nowhere, and none for padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>")


@pytest.fixture
def data(tokenizer):
    corpora = [PythonDocs(part) for part in ("train", "calibration", "evaluation")]
    sizes = {"train_windows": 8, "calibration_windows": 4, "evaluation_windows": 2}
    return TokenDataModule(tokenizer, *corpora, seq_len=32, **sizes)


def requests(task, limit=None):
    """What a task asks of a model, example by example, and the right answer."""
    task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(0)
    task.build_all_requests(limit=limit)
    found = {}
    for instance in task.instances:
        gold = task.doc_to_text(instance.doc) if task.multiple_input else task.doc_to_target(instance.doc)
        found.setdefault(instance.doc_id, ([], gold))[0].append(tuple(instance.args))
    return list(found.values())


def local_tasks(root, **settings):
    return dict(zip(HEADLINE, ZeroShot(root=root, **settings)._load()[1], strict=True))


@pytest.mark.parametrize("name", HEADLINE)
def test_prompts_are_as_typed(root, name):
    assert requests(local_tasks(root)[name], limit=2) == PROMPTS[name]


@pytest.mark.parametrize("name", HEADLINE)
def test_prompts_and_metrics_are_those_of_lm_evals_own_tasks(root, name):
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    file, rows = OFFICIAL[name]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / file)
    assert config["task"] == name
    for key in ("tag", "training_split"):
        config.pop(key, None)
    split = config.get("test_split") or config["validation_split"]
    config |= {"validation_split": None, "test_split": split}
    official = ConfigurableTask(config=config | {"custom_dataset": lambda **_: {split: Dataset.from_list(rows)}})
    ours = local_tasks(root)[name]
    asked, expected = requests(ours), requests(official)
    assert len(asked) == 3
    assert [r for r, _ in asked] == [r for r, _ in expected]
    assert [str(gold) for _, gold in asked] == [str(gold) for _, gold in expected]
    assert ours.OUTPUT_TYPE == official.OUTPUT_TYPE
    assert set(official._metric_fn_list) - set(ours._metric_fn_list) == (
        {"perplexity"} if name == "lambada_openai" else set()
    )
    assert HEADLINE[name] in ours._metric_fn_list


@pytest.mark.skipif(FOLDER is None, reason="PRUNE_CALLBACKS_DATA does not name a folder of corpora")
def test_real_files():
    tasks = local_tasks(FOLDER)
    assert {name: len(task.eval_docs) for name, task in tasks.items()} == {
        "lambada_openai": 5153,
        "hellaswag": 10042,
        "piqa": 1838,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "winogrande": 1267,
    }
    firsts = {name: requests(task, limit=2) for name, task in tasks.items()}
    assert firsts["lambada_openai"][1][0][0][1] == " Shane"
    assert firsts["lambada_openai"][1][0][0][0].endswith('"I can make it there on my own,')
    bar = "Clean and jerk: A lady walks to a barbell. She bends down and grabs the pole. The lady"
    assert firsts["hellaswag"][1] == (
        [
            (bar, " swings and lands in her arms."),
            (bar, " pulls the barbell forward."),
            (bar, " pulls a rope attached to the barbell."),
            (bar, " stands and lifts the weight over her head."),
        ],
        3,
    )
    dresser = "Question: dresser\nAnswer:"
    pins = [(dresser, " replace drawer with bobby pin "), (dresser, " finish, woodgrain with  bobby pin ")]
    assert firsts["piqa"][1] == (pins, 1)
    mold = (
        "Question: Which piece of safety equipment is used to keep mold spores from entering the respiratory system?"
        "\nAnswer:"
    )
    gear = [(mold, f" {thing}") for thing in ("safety goggles", "breathing mask", "rubber gloves", "lead apron")]
    assert firsts["arc_easy"][1] == (gear, 1)
    assert firsts["arc_challenge"][0][0][2][1] == " Planetary days will become shorter."
    assert firsts["arc_challenge"][0][1] == 2
    surgeon = "Sarah was a much better surgeon than Maria so "
    cases = " always got the easier cases."
    assert firsts["winogrande"][0] == ([(surgeon + "Sarah", cases), (surgeon + "Maria", cases)], 1)
    changed = [hellaswag_query(doc) != doc["query"] for doc in tasks["hellaswag"].eval_docs]
    assert sum(changed) == sum(changed[:3243]) == 3243 - 7  # seven begin with a number or a mark
    # A question that had three choices has a wrong one twice; the right one stands once, so no accuracy changes.
    for name, doubled in (("arc_easy", 7), ("arc_challenge", 4)):
        docs = [doc for doc in tasks[name].eval_docs if len(set(doc["choices"])) < 4]
        assert len(docs) == doubled
        assert all(doc["choices"].count(doc["choices"][doc["gold"]]) == 1 for doc in docs)


def trained(letters):
    """A tiny Llama that knows one sentence by heart, so that some answers are right and some wrong."""
    model = tiny_llama(hidden_size=32, layers=2)
    ids = torch.tensor([letters("one two three, one two three. a cat and a dog. " * 4).input_ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def generated():
    """Examples out of the words of that sentence, with answers of unlike lengths."""
    choose = random.Random(0)

    def words(number):
        return " ".join(choose.choices(["one", "two", "three,", "a", "cat", "and", "dog."], k=number))

    def several():
        return [words(choose.randint(1, 4)) for _ in range(4)]

    rows = {
        "lambada/lambada_test.jsonl": [
            {"text": f"{words(3)} one two three, one {choose.choice(['two', 'two', 'dog'])}"} for _ in range(24)
        ],
        "hellaswag/hellaswag_val.jsonl": [
            {"query": words(5), "choices": several(), "gold": choose.randrange(4)} for _ in range(24)
        ],
        "piqa/valid.jsonl": [{"goal": words(4), "sol1": words(1), "sol2": words(4)} for _ in range(24)],
        "winogrande/winogrande_dev.jsonl": [
            {"context_options": [words(3), words(3)], "continuation": words(2), "gold": choose.randrange(2)}
            for _ in range(24)
        ],
    }
    for name in ("arc_easy", "arc_challenge"):
        rows[f"arc/{name}.jsonl"] = [
            {"query": f"Question: {words(4)}", "choices": several(), "gold": choose.randrange(4)} for _ in range(24)
        ]
    return rows, [choose.randrange(2) for _ in range(24)]


def reference(model, letters, rows, labels):
    """Accuracies, task by task, from log-likelihoods summed here in float64."""
    double = copy.deepcopy(model).double()

    def score(context, continuation):
        head, tail = letters(context).input_ids, letters(continuation).input_ids
        with torch.no_grad():
            logits = double(input_ids=torch.tensor([head + tail])).logits[0]
        predicted = functional.log_softmax(logits, -1)[len(head) - 1 : -1]
        greedy = predicted.argmax(-1).tolist() == tail
        return sum(float(row[token]) for row, token in zip(predicted, tail, strict=True)), greedy

    def best(scores, lengths):
        return int(np.argmax([s / n for s, n in zip(scores, lengths, strict=True)]))

    def choice(context, answers, gold):
        scores = [score(context, " " + answer)[0] for answer in answers]
        return {
            "acc": best(scores, [1] * len(answers)) == gold,
            "acc_norm": best(scores, [len(answer) for answer in answers]) == gold,
        }

    outcomes = {name: [] for name in HEADLINE}
    for row in rows["lambada/lambada_test.jsonl"]:
        *head, last = row["text"].split(" ")
        outcomes["lambada_openai"].append({"acc": score(" ".join(head), " " + last)[1]})
    for row in rows["hellaswag/hellaswag_val.jsonl"]:
        sentence, mark, begun = row["query"].rpartition(". ")  # the words are in small letters, but for the begun one
        query = row["query"] if row["query"].endswith(".") or not mark else f"{sentence}. {begun.capitalize()}"
        outcomes["hellaswag"].append(choice(query, row["choices"], row["gold"]))
    for row, label in zip(rows["piqa/valid.jsonl"], labels, strict=True):
        prompt = f"Question: {row['goal']}\nAnswer:"
        outcomes["piqa"].append(choice(prompt, [row["sol1"], row["sol2"]], label))
    for name in ("arc_easy", "arc_challenge"):
        for row in rows[f"arc/{name}.jsonl"]:
            outcomes[name].append(choice(row["query"] + "\nAnswer:", row["choices"], row["gold"]))
    for row in rows["winogrande/winogrande_dev.jsonl"]:
        scores = [score(context, " " + row["continuation"])[0] for context in row["context_options"]]
        outcomes["winogrande"].append({"acc": int(np.argmax(scores)) == row["gold"]})
    return {
        name: {metric: float(np.mean([one[metric] for one in found])) for metric in found[0]}
        for name, found in outcomes.items()
    }


def test_accuracies_and_errors_are_those_of_a_reference(tmp_path, letters):
    model, (rows, labels) = trained(letters), generated()
    results = ZeroShot(root=write(tmp_path, rows, labels))(model, letters)
    expected = reference(model, letters, rows, labels)
    for name, result in results.items():
        measured = {metric: entry["value"] for metric, entry in result["all"].items()}
        assert measured == pytest.approx(expected[name]), name
        for entry in result["all"].values():
            p = entry["value"]
            assert entry["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (24 - 1)))
        assert result["metric"] == HEADLINE[name]
        assert result["value"] == result["all"][HEADLINE[name]]["value"]
        assert result["stderr"] == result["all"][HEADLINE[name]]["stderr"]
        assert (result["limit"], result["examples"], result["data"]) == (None, 24, "local")
    assert 0 < results["lambada_openai"]["value"] < 1
    assert results["hellaswag"]["all"]["acc"] != results["hellaswag"]["all"]["acc_norm"]
    first = ZeroShot("lambada_openai", root=tmp_path, limit=1)(model, letters)["lambada_openai"]
    assert (first["examples"], first["stderr"]) == (1, None)
    few = ZeroShot(["piqa"], root=tmp_path, limit=10, batch_size=4)(model, letters)["piqa"]
    short = {name: examples[:10] for name, examples in rows.items()}
    assert few["all"]["acc"]["value"] == reference(model, letters, short, labels[:10])["piqa"]["acc"]
    assert few["examples"] == 10


def test_the_model_and_random_state_are_left_as_they_were(root, tiny, letters, unchecked):  # beartype draws numbers
    before, config = {name: value.clone() for name, value in tiny.state_dict().items()}, tiny.config.to_dict()
    tiny.train()
    tiny.model.layers[0].eval()
    modes = [module.training for module in tiny.modules()]
    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    random.seed(3)
    np.random.seed(3)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    ZeroShot(("piqa", "lambada_openai"), root=root, limit=2)(tiny, letters)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert [module.training for module in tiny.modules()] == modes
    assert tiny.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tiny.parameters())
    assert (letters.pad_token, len(letters)) == (None, 257)
    assert logger.level == level


def test_a_changed_file_is_read_anew(root, tiny, letters):
    zero_shot = ZeroShot(["arc_easy"], root=root)
    assert zero_shot(tiny, letters)["arc_easy"]["examples"] == 3
    with (root / "arc/arc_easy.jsonl").open("a") as file:
        file.write(json.dumps({"query": "Question: New?", "choices": ["yes", "no", "x", "y"], "gold": 0}) + "\n")
    assert zero_shot(tiny, letters)["arc_easy"]["examples"] == 4


@pytest.mark.slow  # lm_eval reads the 14,000 tasks that it has
def test_without_a_folder_the_data_comes_from_the_hub(root, letters, monkeypatch):
    """All but the download, whose place the same examples take; no number differs, LAMBADA's perplexity is left out."""
    import datasets

    asked = []

    def load(path, name=None, **_):
        asked.append(path)
        task = "lambada_openai" if "lambada" in path else "winogrande"
        return dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(OFFICIAL[task][1]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    model, tasks = trained(letters), ("lambada_openai", "winogrande")
    hub = ZeroShot(tasks)(model, letters)
    assert asked == ["EleutherAI/lambada_openai", "allenai/winogrande"]
    assert {result.pop("data") for result in hub.values()} == {"hub"}
    local = ZeroShot(tasks, root=root)(model, letters)
    assert {result.pop("data") for result in local.values()} == {"local"}
    assert hub == local


def test_bad_settings_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"zero-shot tasks are some of lambada_openai, .*winogrande; got \['boolq'\]"):
        ZeroShot(["piqa", "boolq"])
    with pytest.raises(ValueError, match="zero-shot tasks are some of lambada_openai, .*; got none"):
        ZeroShot([])
    for limit in (0, -1, 0.5):
        with pytest.raises(ValueError, match=f"zero-shot limit must be a whole number, at least 1, got {limit}"):
            ZeroShot(limit=limit)
    with pytest.raises(ValueError, match="zero-shot batch_size must be a whole number, at least 1, got 0"):
        ZeroShot(batch_size=0)


def test_that_lm_eval_is_not_installed_is_said(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    with pytest.raises(ValueError, match=r"lm_eval, which is not installed: pip install prune-callbacks\[eval\]"):
        ZeroShot()


def test_bad_files_are_refused(root, tiny, letters):
    zero_shot = ZeroShot(["piqa"], root=root)
    labels, examples = root / "piqa/valid-labels.lst", root / "piqa/valid.jsonl"
    labels.write_text("0\n1\n")
    with pytest.raises(ValueError, match=r"valid-labels.lst has 2 labels for the 3 examples of .*valid.jsonl"):
        zero_shot.check()
    labels.unlink()
    with pytest.raises(ValueError, match=r"reads .*valid-labels.lst, which does not exist: root= names a folder that"):
        zero_shot(tiny, letters)
    examples.write_text('{"goal": "a"}\n{"goal"\n')
    with pytest.raises(ValueError, match=r"valid.jsonl, line 2: Expecting"):
        zero_shot.check()
    examples.write_text("3\n")
    with pytest.raises(ValueError, match=r"valid.jsonl, line 1: an example is a JSON object, got '3'"):
        zero_shot.check()
    examples.write_text("\n")
    with pytest.raises(ValueError, match=r"valid.jsonl holds no examples"):
        zero_shot.check()
    with pytest.raises(ValueError, match="lm_eval measures models of transformers, got Linear"):
        zero_shot(torch.nn.Linear(2, 2), letters)


def fit(callbacks, tmp_path, module, data, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 1}
    trainer = Trainer(callbacks=callbacks, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, datamodule=data, **settings)
    return trainer


@pytest.mark.slow
def test_a_run_reports_every_stage(tmp_path, root, tiny, data, tokenizer):
    zero_shot = ZeroShot(("lambada_openai", "hellaswag"), root=root, limit=2)
    expected = {"dense": zero_shot(tiny, tokenizer)}
    one_shot = OneShotPrune(Magnitude(NM(1, 4)), dirpath=tmp_path / "pruned", progress=False)
    report = RunReport(tmp_path / "run", tokenizer=tokenizer, zero_shot=zero_shot, progress=False)
    module = CausalLM(tiny, lambda p: torch.optim.AdamW(p, lr=3e-2))
    trainer = fit([report, one_shot, MaskEnforcer()], tmp_path, module, data)
    for stage, folder in (("pruned", "pruned"), ("recovered", "run")):
        expected[stage] = zero_shot(AutoModelForCausalLM.from_pretrained(tmp_path / folder / "model"), tokenizer)
    written = json.loads((tmp_path / "run/report.json").read_text())["zero_shot"]
    assert list(written) == ["lambada_openai", "hellaswag"]
    for task, entry in written.items():
        assert {key: entry[key] for key in ("metric", "limit", "examples", "data")} == {
            "metric": HEADLINE[task],
            "limit": 2,
            "examples": 2,
            "data": "local",
        }
        for stage, results in expected.items():
            assert entry[stage] == {key: results[task][key] for key in ("value", "stderr", "all")}
    assert {"lm_eval"} <= set(report.record["versions"])
    # A checkpoint brings what was measured; with other examples it does not count.
    again = RunReport(tmp_path / "run", zero_shot=zero_shot, tokenizer=tokenizer, progress=False)
    again.load_state_dict(copy.deepcopy(report.state_dict()))
    assert again.record["zero_shot"] == written
    other = ZeroShot("hellaswag", root=root, limit=1)
    RunQuality(tokenizer, 1, other, progress=False).measure(trainer, module, "recovered", again.run)
    assert "dense" not in again.record["zero_shot"]["hellaswag"]
    assert again.record["zero_shot"]["lambada_openai"] == written["lambada_openai"]


def test_what_cannot_be_measured_is_said_before_work(tmp_path, root, tiny, data, tokenizer, monkeypatch):
    zero_shot = ZeroShot("winogrande", root=root)
    with pytest.raises(ValueError, match="RunReport needs a tokenizer to measure zero-shot accuracy"):
        RunReport(tmp_path, zero_shot=zero_shot)
    report = RunReport(tmp_path / "run", tokenizer=tokenizer, zero_shot=zero_shot, progress=False)
    callbacks = [report, OneShotPrune(Magnitude(NM(2, 4)), progress=False), MaskEnforcer()]
    (root / "winogrande/winogrande_dev.jsonl").rename(root / "elsewhere.jsonl")
    with pytest.raises(ValueError, match=r"reads .*winogrande_dev.jsonl, which does not exist"):
        fit(callbacks, tmp_path, CausalLM(tiny), data)
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ValueError, match="zero-shot accuracy is measured on one process, and this fit has 2. Leave"):
        fit(callbacks, tmp_path, CausalLM(tiny), data)
    assert report.record["perplexity"]["dense"] is None
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_recipe_with_local_files(tmp_path, root):
    arguments = ["recipe=wanda_50", "smoke=true", "zero_shot=local"]
    failed = train(*arguments, f"output_dir={tmp_path / 'failed'}")
    assert failed.returncode == 1
    assert "this needs data.root=..." in failed.stderr
    arguments.append(f"data.root={root}")
    done = train(*arguments, f"output_dir={tmp_path / 'run'}", "zero_shot.limit=2")
    good(done)
    written = json.loads((tmp_path / "run/report.json").read_text())["zero_shot"]
    assert set(written) == set(HEADLINE)
    for entry in written.values():
        assert entry["examples"] == 2
        for stage in ("dense", "pruned", "recovered"):
            assert 0 <= entry[stage]["value"] <= 1
            assert entry[stage]["stderr"] >= 0
    assert "dense hellaswag acc_norm " in done.stderr + done.stdout
    assert "lm_eval.models.huggingface" not in done.stderr
    failed = train(*arguments, f"output_dir={tmp_path / 'failed'}", "zero_shot.limit=0")
    assert failed.returncode == 1
    assert "zero-shot limit must be a whole number, at least 1, got 0" in failed.stderr
    assert not (tmp_path / "failed/masks.safetensors").exists()


@pytest.mark.slow
def test_the_benchmark_finds_what_lm_eval_by_itself_finds_and_goes_on(tmp_path, root, letters, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("zero_shot_benchmark", ROOT / "benchmarks/zero_shot.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    trained(letters).save_pretrained(tmp_path / "model")
    letters.save_pretrained(tmp_path / "model")
    command = ["zero_shot.py", str(root), "--model", str(tmp_path / "model"), "--results", str(tmp_path / "r.json")]
    command += ["--limit", "2", "--tasks", "hellaswag"]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    monkeypatch.setattr(bench, "ours", None)  # nothing is measured again
    monkeypatch.setattr(sys, "argv", [*command, "--against-lm-eval"])
    bench.main()
    (cell,) = json.loads((tmp_path / "r.json").read_text())["cells"].values()
    assert cell["lm_eval"] == cell["ours"]["all"]
    assert set(cell["lm_eval"]) == {"acc", "acc_norm"}
    assert "| hellaswag | 2 | acc_norm |" in capsys.readouterr().out


def test_recipes_are_instantiated(tmp_path):
    def compose(*overrides):
        with hydra.initialize_config_dir(str(ROOT / "recipes"), version_base="1.3"):
            return hydra.compose("train", ["recipe=wanda_50", "model=tiny_llama", f"output_dir={tmp_path}", *overrides])

    report = instantiate(compose("zero_shot=hub").callbacks.report)
    assert report.zero_shot == ZeroShot()
    local = compose("zero_shot=local", "zero_shot.root=somewhere", "zero_shot.limit=500", "callbacks=iterate_and_hold")
    assert instantiate(local.callbacks.report).zero_shot == ZeroShot(root="somewhere", limit=500)
    assert instantiate(compose().callbacks.report).zero_shot is None
