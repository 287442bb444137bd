"""What train.py says: its help, the nearest keys, the sentence of an error and nothing else."""

import ast
import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
from launch import TRAIN, ranks
from launch import train as run_train
from lightning.pytorch.callbacks import Callback

from prune_callbacks import Unstructured
from prune_callbacks.command_line.arguments import check_arguments
from prune_callbacks.command_line.errors import sentence
from prune_callbacks.command_line.help import SETTING
from prune_callbacks.command_line.help import sentence as described
from prune_callbacks.command_line.keys import nearest
from prune_callbacks.command_line.words import culprit

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
OPTIONS = sorted(RECIPES.glob("*/*.yaml"))
_spec = importlib.util.spec_from_file_location("train", TRAIN)
train = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train)
ALONE = " A key that nothing reads cannot be added with +."
SPARSITY = (
    "Unstructured: sparsity is the fraction of weights removed and must lie in [0, 1), got 1.5. For 50 % write 0.5."
)


@pytest.fixture
def command(monkeypatch):
    """Checks a command as train.py does before it starts anything."""

    def check(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        return train.check_command()

    return check


@pytest.fixture
def refused(command):
    """What is said of a command that is refused."""

    def said(*words):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            command(*words)
        return str(error.value)

    return said


def values(*words):
    """Checks the values of a run as train.py does before it starts anything."""
    with hydra.initialize_config_dir(str(RECIPES), version_base="1.3"):
        train.check_values(train.composed(list(words)), list(words))


def refused_values(*words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        values(*words)
    return str(error.value)


# The help


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_names_recipes_options_and_keys_with_a_sentence_each(command, capsys, flag, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert not command(flag)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "python train.py recipe=NAME [GROUP=OPTION ...] [KEY=VALUE ...]"
    for file in OPTIONS:
        assert any(re.fullmatch(rf"  {file.stem} +{re.escape(described(file))}", line) for line in lines), file
    for group in sorted({file.parent.name for file in OPTIONS} - {"recipe"}):
        assert any(line.startswith(f"{group}=, here ") for line in lines), group
    assert "pruner=, here sparsegpt:" in lines
    assert "schedule=, here none of:" in lines
    for setting in ("data.seq_len=512", "pattern.sparsity=0.5", "pruner.block_size=128", "optimizer.lr=0.0001"):
        assert f"  {setting}" in lines
    assert any(re.fullmatch(r"  smoke=false +true: a tiny model, .*", line) for line in lines)
    assert not [line for line in lines if "_target_" in line or "hydra." in line]


@pytest.mark.parametrize("file", OPTIONS, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_recipe_and_option_says_in_a_sentence_what_it_is(file):
    said = described(file)
    assert re.match(r"\w", said), file
    assert len(said) > 8
    assert "python train.py" not in said
    assert "@package" not in said


def test_the_first_sentence_ends_at_a_full_stop_and_not_at_three(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("# @package _global_\n# python train.py recipe=a\n# A b=... of c.\n# It d.\nname: a # e\n# f\n")
    assert described(file) == "A b=... of c"
    file.write_text("name: a\n# no comment at the top\n")
    assert described(file) == ""


def test_the_keys_of_train_yaml_that_have_a_comment_are_in_the_help(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    command("--help")
    shown = capsys.readouterr().out
    lines = (RECIPES / "train.yaml").read_text().splitlines()
    settings = [found for line in lines if (found := SETTING.fullmatch(line))]
    assert {"seed", "output_dir", "smoke", "evaluate", "ckpt_path"} <= {found[1] for found in settings}
    assert [found[1] for found in settings if not re.search(rf"  {found[1]}=\S+ +{re.escape(found[2])}", shown)] == []


def test_the_help_of_a_recipe_has_its_own_values(command, capsys):
    command("--help", "recipe=sensitivity", "pattern=nm_2of4", "pattern.n=1")
    shown = capsys.readouterr().out.splitlines()
    assert "pattern=, here nm_2of4:" in shown
    for setting in ("pattern.n=1", "pattern.m=4", "unit=layer", "data.evaluation_windows=4"):
        assert f"  {setting}" in shown
    assert not [line for line in shown if line.startswith("  pattern.sparsity")]


def test_without_a_recipe_the_recipes_are_listed(refused):
    for words in ([], ["--cfg", "job"], ["--info"], ["smoke=true"]):
        said = refused(*words)
        assert said.startswith("recipe=NAME is missing. There are:\n")
        assert said.endswith("python train.py --help lists the keys too")
        assert [f.stem for f in OPTIONS if f.parent.name == "recipe" and f"\n  {f.stem} " not in said] == []


def test_the_other_ways_to_ask_still_answer():
    for words, answer in (
        (["--hydra-help"], "Hydra (1."),
        (["--cfg", "job", "recipe=wanda_50", "--package", "pruner"], "_target_: prune_callbacks.Wanda"),
        (["--info", "defaults", "recipe=wanda_50"], "| recipe/wanda_50 "),
        (["--info", "plugins"], "BasicSweeper"),
    ):
        done = run_train(*words)
        assert done.returncode == 0, done.output
        assert answer in done.stdout


def test_nothing_heavy_is_imported_for_an_answer():
    """By the names: a misspelt key is answered in less than a second, where torch and Lightning take eight."""
    tops = [node for node in ast.parse(TRAIN.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tops if isinstance(node, ast.ImportFrom)}
    own = {name for name in names if name.startswith("prune_callbacks")}
    assert own
    assert all(name.startswith("prune_callbacks.command_line.") for name in own)
    foreign = {name.partition(".")[0] for name in names - own} - set(sys.stdlib_module_names)
    assert foreign == {"hydra", "omegaconf"}
    for file in (ROOT / "prune_callbacks/command_line").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                top = node.module.partition(".")[0]
                assert top in sys.stdlib_module_names or node.module.startswith("prune_callbacks.command_line.")


# Misspelt words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["recipe=wanda50"],
            "Could not find 'recipe/wanda50'. The nearest is recipe=wanda_50. recipe= takes one of abl",
        ),
        (
            ["recipe=wanda_50", "pruner=wnda"],
            "Could not find 'pruner/wnda'. The nearest is pruner=wanda. pruner= takes",
        ),
        (["recipe=wanda_50", "allocation=null"], "Could not find 'allocation/null'. allocation= takes one of lagrang"),
        (
            ["recipe=best_2of4", "reconstruction=null"],
            "Could not find 'reconstruction/null'. reconstruction= takes one of blocks, blocks_3_passes. "
            "~reconstruction leaves it out.",
        ),
        (["recipe=[wanda_50,demo]"], "recipe=[wanda_50,demo] names several recipes: --multirun recipe=a,b runs one"),
        (
            ["recipe=wanda_50", "+pruner=mrp"],
            "+pruner=mrp: a group has one option, which pruner=mrp chooses, without +",
        ),
        (
            ["recipe=wanda_50", "pruner=mrp,alps"],
            "pruner=mrp,alps names several values: --multirun runs once with each",
        ),
        (["--multirun", "recipe=sweep", "pruner=wanda,mpr"], "Could not find 'pruner/mpr'. The nearest is pruner=mrp."),
        (["wanda_50"], "wanda_50 is not KEY=VALUE, without spaces: write recipe=wanda_50. python train.py --help"),
        (["recipe=wanda_50", "seed==3"], "seed==3 cannot be read. A value with spaces, commas, brackets or = needs"),
        (
            ["--recipe=wanda_50"],
            "There is no option --recipe=wanda_50. Recipes and keys are written without dashes: rec",
        ),
        (["--multirn", "recipe=sweep"], "There is no option --multirn. The nearest is --multirun."),
        (
            ["recipe=sweep", "--multirun", "pruner=wanda"],
            "pruner=wanda cannot be read there: write options with dashes",
        ),
        (["--multirun", "recipe=sweep", "output_dir=${a}/b"], "output_dir=${a}/b: Interpolation key 'a' not found"),
        (["--multirun", "recipe=sweep", "seed=interval(0,1)"], "seed=interval(0,1) names no values: seed=0.5,0.6 does"),
        (["--config-name", "x", "recipe=wanda_50"], "train.py has one configuration; --config-dir FOLDER adds recipes"),
    ],
)
def test_words_that_are_not_there_get_the_nearest(refused, words, said):
    assert refused(*words)[: len(said)] == said


@pytest.fixture(scope="module")
def wanda():
    """What is said of a word that Hydra refuses beside recipe=wanda_50, which is composed once."""
    with hydra.initialize_config_dir(str(RECIPES), version_base="1.3"):
        base = train.composed_values(["recipe=wanda_50"])

    def compose(lines):
        if lines != ["recipe=wanda_50"]:
            raise ValueError("refused")
        return base

    def said(word):
        with hydra.initialize_config_dir(str(RECIPES), version_base="1.3"):
            typed = train.words(["recipe=wanda_50", word])
        return culprit(typed, replace(train.RECIPES, compose=compose), "all")

    return said


@pytest.mark.parametrize(
    ("word", "nearest_words", "alone"),
    [
        ("patern.sparsity=0.5", "pattern.sparsity=0.5", ALONE),
        ("sparsity=0.5", "pattern.sparsity=0.5", ALONE),
        ("pattern_sparsity=0.5", "pattern.sparsity=0.5", ALONE),
        ("patern=nm_2of4", "pattern=nm_2of4", ALONE),
        ("lr=0.1", "optimizer.lr=0.1", ALONE),
        ("epochs=2", "trainer.max_epochs=2", ALONE),
        ("callbacks.oneshot.targets=a", "callbacks.one_shot.targets=a", ALONE),
        ("hydra.verbos=true", "hydra.verbose=true", ALONE),
        ("pattern.sparsty=0.5", "pattern.sparsity=0.5", ""),  # of a class, which may take more than the recipe sets
        ("pattern={sparsty:0.5}", "pattern.sparsity=0.5", ""),
        ("data.sequence_length=8", "data.seq_len=8", ""),
        ("trainer.fast_dev_rn=true", "+trainer.fast_dev_run=true", ""),
        ("~callbacks.progres", "~callbacks.progress", ""),
    ],
)
def test_the_nearest_keys_are_written_as_they_are_typed(wanda, word, nearest_words, alone):
    key = "pattern.sparsty" if "{" in word else word.lstrip("~").partition("=")[0]
    assert wanda(word) == f"There is no key {key} in recipe=wanda_50. The nearest is {nearest_words}.{alone}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["recipe=wanda_2of4", "pattern.sparsity=0.5"],
            "There is no key pattern.sparsity in recipe=wanda_2of4; it is a key of pattern=columns, "
            "pattern=unstructured, recipe=digits_imp_90, recipe=gradual_cubic_80, recipe=imp_90. pattern has n, m.",
        ),
        (
            ["--multirun", "recipe=sweep", "pruner=mrp,wanda", "pruner.variant=SM"],
            "There is no key pruner.variant in recipe=sweep; it is a key of pruner=mrp. pruner has pattern.",
        ),
        (
            ["recipe=ablate_damping", "pruner=ria"],
            "There is no key pruner.damping in recipe=ablate_damping; it is a key of pruner=alps, pruner=mrp, "
            "pruner=sparsegpt, pruner=sparsegptq, pruner=structured. pruner has pattern, power.",
        ),
        (["recipe=wanda_50", "+seed=3"], "+seed=3: seed is there already; write seed=3"),
        (
            ["recipe=wanda_50", "~logger"],
            "~logger: a run needs logger; ~logger.tensorboard and ~logger.csv leave out parts of it",
        ),
    ],
)
def test_keys_that_this_recipe_does_not_have(refused, words, said):
    assert refused(*words) == said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "source=a",
            "There is no key source in recipe=wanda_50; it is a key of recipe=prune_streaming. python train.py --help "
            "recipe=wanda_50 lists its keys." + ALONE,
        ),
        (
            "~callbacks.foo",
            "There is no key callbacks.foo in recipe=wanda_50. callbacks has report, one_shot, enforcer, checkpoint, "
            "progress.",
        ),
        (
            "trainer.fast_dev_run=true",
            "recipe=wanda_50 does not set trainer.fast_dev_run; write +trainer.fast_dev_run=true to add it",
        ),
        (
            "pruner.pattern.sparsity=0.4",
            "pruner.pattern.sparsity stands for pattern.sparsity: write pattern.sparsity=0.4",
        ),
    ],
)
def test_keys_that_wanda_50_does_not_have(wanda, word, said):
    assert wanda(word) == said


def test_where_smoke_takes_another_option_it_says_so():
    with hydra.initialize_config_dir(str(RECIPES), version_base="1.3"):
        train.composed(["recipe=wanda_50", "model.path=a"])  # control
        with pytest.raises(ValueError, match=r"no key model.path .* \(smoke=true sets model=tiny_llama data=python_d"):
            train.composed(["recipe=wanda_50", "smoke=true", "model.path=a"])


@pytest.mark.parametrize("word", ["+patern.sparsity=0.5", "++patern.sparsity=0.5"])
def test_a_key_that_nothing_reads_is_not_added(refused, word):
    assert refused("recipe=wanda_50", word) == (
        f"Nothing in recipe=wanda_50 reads a key patern.sparsity: {word} would be ignored, and is refused. "
        "The nearest is pattern.sparsity=0.5."
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe=wanda_50", "++x=1"], "reads a key x: ++x=1 would be ignored"),
        (["recipe=wanda_50", "+model.foo=1"], "reads a key model.foo: +model.foo=1 would be ignored"),
        (["recipe=wanda_50", "+x._target_=prune_callbacks.Wanda"], "reads a key x._target_: +x._target_="),
        (["recipe=sweep", "+trainer.fast_dev_run=true"], "Nothing in recipe=sweep reads a key trainer.fast_dev_run"),
        (["recipe=wanda_50", "schedule=constant"], "schedule=constant would be ignored: nothing in recipe=wanda_50 re"),
        (["recipe=imp_90", "allocation=owl"], "allocation=owl would be ignored: nothing in recipe=imp_90 reads allo"),
        (["recipe=digits_imp_90", "objective=logits"], "objective=logits would be ignored: nothing in recipe=digits_i"),
        (["recipe=wanda_50", "+callbacks.one_shot.pruner.damping=1"], "what is behind callbacks.one_shot.pruner.damp"),
    ],
)
def test_what_would_be_ignored_is_refused(refused, words, said):
    assert said in refused(*words)


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=wanda_50", "+trainer.fast_dev_run=true"],
        [
            "recipe=wanda_50",
            "+callbacks.timer._target_=lightning.pytorch.callbacks.Timer",
            "+callbacks.timer.duration=1",
        ],
        ["recipe=wanda_50", "+callbacks.timer={_target_:lightning.pytorch.callbacks.Timer}", "~callbacks.progress"],
        ["recipe=wanda_50", "+mine=3", "seed=${mine}"],
        ["recipe=sweep", "+mine=a", "output_dir=runs/${mine}/b"],
        ["recipe=wanda_50", "++seed=3"],
        ["recipe=wanda_50", "+model.network.attn_implementation=eager"],
        ["recipe=wanda_50", "pruner.power=1.0", "pruner=ria"],  # in any order
        ["recipe=wanda_50", "trainer=deepspeed_zero3", "+trainer.strategy.config.zero_optimization.overlap_comm=true"],
        ["recipe=imp_90", "+callbacks.iterative.rewind.optimizer=false"],
        ["recipe=sweep", "+job.batch_size=2", "allocation=owl"],
        ["--multirun", "recipe=sweep", "pruner=glob(w*)", "pattern.sparsity=0.1,0.2"],
        ["recipe=wanda_50", "hydra/job_logging=disabled", "hydra.job.name=a"],
        ["--cfg", "job", "recipe=consolidate"],
    ],
)
def test_control_what_is_read_is_accepted(command, words):
    assert command(*words)


def test_a_folder_of_ones_own_recipes(command, refused, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/mine.yaml").write_text("# @package _global_\nname: mine\n")
    assert command("--config-dir", str(tmp_path), "recipe=mine", "pattern.sparsity=0.4")
    assert "nearest is pattern.sparsity=" in refused("--config-dir", str(tmp_path), "recipe=mine", "patern.sparsity=1")


def test_nearest_prefers_what_is_behind_the_last_dot():
    keys = ["pattern.sparsity", "data.train.part", "optimizer.lr", "trainer.max_steps", "pattern", "pattern.per"]
    assert nearest("patern.sparsity", keys) == ["pattern.sparsity"]
    assert nearest("lr", keys) == ["optimizer.lr"]
    assert nearest("PATTERN", keys) == ["pattern"]
    assert nearest("steps", keys) == ["trainer.max_steps"]
    assert nearest("zzz", keys) == []
    assert nearest("a", []) == []


# Values


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pattern.sparsity=abc"], "pattern.sparsity must be a number, got 'abc'"),
        (["pattern.sparsity=[0.5]"], "pattern.sparsity must be a number, got [0.5]"),
        (["data.seq_len=64.5"], "data.seq_len must be a whole number, got 64.5"),
        (["data.train_windows=many"], "data.train_windows must be a whole number or null, got 'many'"),
        (["seed=abc"], "seed must be a whole number, got 'abc'"),
        (["seed=null"], "seed must be a whole number, got null"),
        (["optimizer.lr=fast"], "optimizer.lr must be a number, got 'fast'"),
        (["trainer.max_steps=true"], "trainer.max_steps must be a whole number, got true"),
        (["pattern.per=3"], 'pattern.per must be "row" or "even" or "tensor" or null, got 3'),
        (["output_dir=5"], "output_dir must be text or null, got 5. Text of digits needs quotes within quotes: "
         "\"output_dir='5'\""),
        (["smoke=yes"], "smoke must be true or false, got 'yes'"),
        (["beside=oneshot_90"], "beside must be a list: beside=[oneshot_90]"),
        (["seed=${sed}"], "seed=${sed}: Interpolation key 'sed' not found"),
        (["zero_shot=local"], "zero_shot=local: zero_shot.root: this needs data.root=..."),
        (["callbacks.progress=null"], "callbacks.progress has no _target_ that names a class, got null. "
         "~callbacks.progress leaves it out"),
        (["~pattern.sparsity"], "pattern.sparsity is missing: prune_callbacks.Unstructured needs it"),
        (["+pruner.dampin=0.1"], "pruner.dampin: prune_callbacks.Wanda has no argument dampin. It takes pattern"),
        (["pruner=sparsegpt", "+pruner.dampng=1"], "pruner.dampng: prune_callbacks.SparseGPT has no argument dampng. "
         "The nearest is pruner.damping. It takes pattern, block_size, damping"),
        (["pruner._target_=prune_callbacks.Wnda"], "pruner._target_=prune_callbacks.Wnda: prune_callbacks has no Wnda. "
         "The nearest: prune_callbacks.Wanda"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(words, said):
    assert refused_values("recipe=wanda_50", *words) == said


def test_what_the_recipe_sets_for_another_pruner_is_named():
    assert refused_values("recipe=demo", "pruner=wanda") == (
        "pruner.block_size: prune_callbacks.Wanda has no argument block_size. The recipe sets pruner.block_size: "
        "choose another recipe, or other options of its groups. It takes pattern"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.lr=1", "trainer.max_steps=-1", "trainer.devices=auto", "trainer.precision=16"],
        ["data.train_windows=null", "data.calibration=my.txt", "evaluate=a.txt", "callbacks.one_shot.targets=[a,b]"],
        ["pruner=mrp", "pruner.block_size=null", "pattern.per=row", "seed=3", "output_dir='5'"],
        ["trainer=fsdp2", "trainer.devices=2", "logger=wandb", "+logger.wandb.offline=true"],
    ],
)
def test_control_values_that_fit(words):
    values("recipe=wanda_50", *words)


def test_types_are_checked_where_the_annotation_says_enough_and_of_given_keys_only():
    node = {"_target_": f"{__name__}.taking", "count": "a", "ratio": 1, "anything": "a", "unknown": "a", "names": ["a"]}
    keys = {f"a.{name}" for name in node}
    check_arguments({"a": node}, keys - {"a.count", "a._target_"}, lambda key: node[key[2:]])
    with pytest.raises(ValueError, match="a.count must be a whole number, got 'a'"):
        check_arguments({"a": node}, {"a.count"}, lambda key: node[key[2:]])


def taking(count: int, ratio: float, anything, unknown: "NotThere", names: list[str]):  # noqa: F821
    """What the test above calls in name."""


# Errors


def raised(act):
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_our_errors_are_sentences_and_those_that_nobody_foresaw_are_not():
    assert sentence(raised(lambda: Unstructured(1.5)), []) == SPARSITY
    ours = {"__name__": "prune_callbacks.made_up"}
    exec(compile("def slip(): a, b = [1]\ndef say(): raise ValueError('a sentence')", "made_up", "exec"), ours)
    assert sentence(raised(ours["say"]), []) == "a sentence"
    assert sentence(raised(ours["slip"]), []) is None  # in our code, but not on purpose
    for act in (lambda: int("a"), lambda: {}["a"], lambda: [][1], lambda: 1 / 0, lambda: subprocess.run(["/"])):
        found = sentence(raised(act), [])
        assert (found is None) == (not isinstance(raised(act), OSError)), act
    assert sentence(AssertionError("a"), []) is None


def test_files_that_are_not_there_are_named(tmp_path):
    assert sentence(raised((tmp_path / "a").read_text), []) == f"No such file or directory: {tmp_path / 'a'}"
    assert sentence(raised(tmp_path.read_text), []) == f"Is a directory: {tmp_path}"
    assert sentence(OSError(28, "No space left on device"), []) is None


def test_an_argument_that_was_passed_on_is_named():
    error = raised(lambda: Unstructured(0.5, windows=3))
    assert sentence(error, ["data.windows"]).startswith("data.windows: ")
    assert sentence(error, ["data.seq_len"]) is None


def test_a_value_out_of_range_gets_its_sentence_and_nothing_else(tmp_path):
    words = ["recipe=wanda_50", "smoke=true", "pattern.sparsity=1.5", f"output_dir={tmp_path / 'a'}"]
    done = run_train(*words)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{SPARSITY}\n")
    full = run_train(*words, environment={"HYDRA_FULL_ERROR": "1"})
    assert full.returncode == 1
    assert "Traceback (most recent call last)" in full.stderr
    assert SPARSITY in full.stderr


def test_a_misspelt_key_gets_its_sentence_and_nothing_else():
    done = run_train("recipe=wanda_50", "patern.sparsity=0.5")
    said = "There is no key patern.sparsity in recipe=wanda_50. The nearest is pattern.sparsity=0.5."
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{said}{ALONE}\n")


class Broken(Callback):
    """Fails when the fit starts, as nobody foresaw."""

    def on_fit_start(self, trainer, pl_module):
        raise KeyError("nobody foresaw this")


def test_an_error_that_nobody_foresaw_keeps_its_traceback(tmp_path):
    words = ["recipe=wanda_50", "smoke=true", f"output_dir={tmp_path}", "~callbacks.one_shot", "~callbacks.report"]
    done = run_train(*words, f"+callbacks.broken._target_={__name__}.Broken")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert re.search(r"line \d+, in on_fit_start\n", done.stderr)
    assert done.stderr.rstrip().endswith("KeyError: 'nobody foresaw this'")


def test_every_job_that_fails_is_named_in_one_line(tmp_path):
    words = ["--multirun", "recipe=sweep", "pruner=magnitude", "pattern.sparsity=1.5,abc", "smoke=true"]
    done = run_train(*words, f"output_dir={tmp_path}")
    assert done.returncode == 1
    head, tail = "failed: recipe=sweep pruner=magnitude pattern.sparsity=", f"smoke=True output_dir={tmp_path}: "
    assert done.stderr.splitlines() == [
        f"{head}1.5 {tail}{SPARSITY}",
        f"{head}abc {tail}pattern.sparsity must be a number, got 'abc'",
    ]


def test_every_rank_says_what_is_wrong(tmp_path):
    words = ["recipe=wanda_50", "smoke=true", "pattern.sparsity=1.5", f"output_dir={tmp_path / 'a'}"]
    with ranks(TRAIN, *words, "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu") as processes:
        ended = [process.wait() for process in processes]
    assert [(done.returncode, SPARSITY in done.stderr, "Traceback" in done.stderr) for done in ended] == [
        (1, True, False),
        (1, True, False),
    ]
