import math

import pytest
import torch
from torchmetrics.text import Perplexity as Reference

from prune_callbacks.measure.perplexity import Perplexity, perplexity
from prune_callbacks.tasks.causal_lm import CausalLM


def test_equals_torchmetrics_and_a_float64_reference():
    logits, labels = torch.randn(3, 9, 20), torch.randint(20, (3, 9))
    labels[1, 4:] = -100
    ours = Perplexity()
    ours.update(logits[:2], labels[:2])
    ours.update(logits[2:], labels[2:])
    theirs = Reference(ignore_index=-100)
    theirs.update(logits[:, :-1], labels[:, 1:])
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-5)
    log_p = logits.double().log_softmax(-1)
    terms = [-float(log_p[i, t, labels[i, t + 1]]) for i in range(3) for t in range(8) if labels[i, t + 1] != -100]
    assert float(ours.compute()) == pytest.approx(math.exp(sum(terms) / len(terms)), rel=1e-6)


def test_an_underflowing_probability_is_not_infinite():
    logits = torch.tensor([[[0.0, 200.0], [0.0, 0.0]]])
    metric = Perplexity()
    metric.update(logits, torch.tensor([[0, 0]]))
    assert float(metric.compute()) == pytest.approx(math.exp(200))


def test_perplexity_over_windows_is_the_models_own_loss(tiny):
    tiny.train()
    windows = torch.randint(3, 200, (5, 12))
    value = perplexity(tiny, windows, progress=False)
    with torch.no_grad():
        losses = [float(tiny(input_ids=w[None], labels=w[None]).loss) for w in windows]
    assert value == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    assert perplexity(tiny, windows, batch_size=2, progress=False) == pytest.approx(value, rel=1e-5)
    assert tiny.training
    with pytest.raises(ValueError, match=r"windows of two or more tokens, got \(5, 1\)"):
        perplexity(tiny, windows[:, :1])


def test_causal_lm_does_not_predict_padding(tiny):
    module = CausalLM(tiny)
    ids = torch.randint(3, 200, (2, 10))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    loss = module.training_step({"input_ids": ids, "attention_mask": mask}, 0)
    first, second = (float(tiny(input_ids=i, labels=i).loss) for i in (ids[:1], ids[1:, :6]))
    assert float(loss) == pytest.approx((9 * first + 5 * second) / 14, rel=1e-4)
