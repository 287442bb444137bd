"""Every causal-LM class of transformers that can be built small: pruned as re-running it would, or refused by name."""

import re
from pathlib import Path

import pytest
from every_class import Outcome, build, check, classes, summary
from tiers import slow

FEW = ("CpmAnt", "DeepseekV4", "Gemma4Text", "GlmMoeDsa", "OpenAIGPT", "ProphetNet", "XLM", "Zaya", "Git", "InternLM3")
"""Classes whose blocks do or get what those of others do not; the rest only in make test-all."""

KINDS = {kind.__name__.removesuffix("Config"): kind for kind in classes()}


@pytest.mark.parametrize("name", [name if name in FEW else slow(name) for name in KINDS])
def test_it_is_pruned_as_by_running_it_again_or_refused_by_name(name):
    model = build(KINDS[name])
    if model is None:
        assert name not in FEW
        pytest.skip("cannot be built with fewer than 30 M parameters")
    outcome = check(KINDS[name], model)
    if outcome.kind == "refused":
        assert name in ("Git", "HrmText")
        assert re.search(r"GitForCausalLM|HrmTextForCausalLM", outcome.reason)
    else:
        assert outcome.streamed in ("same bytes", "refused")
        assert outcome.streamed == "same bytes" or outcome.kind == "whole model"


def test_control_another_order_of_blocks_gives_other_masks(monkeypatch):
    model = build(KINDS["OpenAIGPT"])
    monkeypatch.setattr("every_class.order_of", lambda model, blocks: [name for name, _ in blocks][::-1])
    with pytest.raises(AssertionError, match="transformer.h"):
        check(KINDS["OpenAIGPT"], model)


def test_the_readme_quotes_the_page():
    root = Path(__file__).parents[1]
    rows = re.findall(r"^\| (\w+) \| ([\w ]+) \| ([\w -]+) \|", (root / "docs/families.md").read_text(), re.MULTILINE)
    found = {name: Outcome(kind, "", streamed) for name, kind, streamed in rows[1:]}
    assert len(found) > 150
    line = summary(found)
    for text in (root / "docs/families.md", root / "README.md"):
        assert line in " ".join(text.read_text().split()), text.name
