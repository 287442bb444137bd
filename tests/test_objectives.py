"""Objectives against float64 references; the teacher frozen, in its precision, and in no checkpoint."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from prune_callbacks import CausalLM, LanguageModeling, LogitsDistillation, SquareHead
from prune_callbacks.tasks import tiny_llama


def llama(seed=0, **settings):
    return tiny_llama(seed, **({"hidden_size": 32, "layers": 2} | settings))


def batch(padded=True):
    ids = torch.randint(3, 200, (3, 12))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 7:] = 0
        mask[2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def reference(student, teacher, inputs, temperature):
    """Position by position, in float64."""
    with torch.no_grad():
        s = student.double()(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True
        )
        t = teacher.double()(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True
        )
    ce, kl, count = 0.0, 0.0, 0
    for row, labels in enumerate(inputs["labels"]):
        for place in range(len(labels) - 1):
            if labels[place + 1] == -100:
                continue
            count += 1
            ce -= float(s.logits[row, place].log_softmax(-1)[labels[place + 1]])
            p = (t.logits[row, place] / temperature).softmax(-1)
            q = (s.logits[row, place] / temperature).softmax(-1)
            kl += float((p * (p.log() - q.log())).sum())
    features = 0.0
    for layer in range(1, len(s.hidden_states)):
        places = inputs["attention_mask"].nonzero().tolist()
        error = sum(
            float((s.hidden_states[layer][r, c] - t.hidden_states[layer][r, c]).square().sum()) for r, c in places
        )
        size = sum(float(t.hidden_states[layer][r, c].square().sum()) for r, c in places)
        features += error / size
    return ce / count, temperature**2 * kl / count, features


@pytest.mark.parametrize("padded", [False, True])
def test_losses_are_those_of_the_papers(padded):
    student, teacher, inputs = llama(0), llama(1), batch(padded)
    torch.nn.init.normal_(teacher.model.norm.weight, 1, 0.3)
    logits = LogitsDistillation(teacher, temperature=2.0, weight=0.7, task_weight=0.4)(student, inputs)
    features = SquareHead(teacher, weight=0.3, task_weight=0.6)(student, inputs)
    plain = LanguageModeling()(student, inputs)
    task, divergence, relative = reference(student, teacher, inputs, 2.0)
    assert {k: float(v) for k, v in logits.items()} == pytest.approx(
        {"task": 0.4 * task, "logits": 0.7 * divergence}, rel=1e-4
    )
    assert {k: float(v) for k, v in features.items()} == pytest.approx(
        {"task": 0.6 * task, "features": 0.3 * relative}, rel=1e-4
    )
    assert float(plain["task"]) == pytest.approx(task, rel=1e-5)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it():
    inputs = batch()
    assert float(LogitsDistillation(llama())(llama(), inputs)["logits"]) == pytest.approx(0, abs=1e-6)
    assert float(SquareHead(llama())(llama(), inputs)["features"]) == 0


@pytest.mark.parametrize("kind", [LogitsDistillation, SquareHead])
def test_the_teacher_is_frozen_in_its_precision_and_in_no_checkpoint(tmp_path, kind):
    teacher = llama(1)
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    module = CausalLM(llama(), lambda p: torch.optim.AdamW(p, lr=1e-2), objective=kind(teacher, dtype="bfloat16"))
    plain = CausalLM(llama(), lambda p: torch.optim.AdamW(p, lr=1e-2))
    keys, count = set(plain.state_dict()), sum(p.numel() for p in plain.parameters())
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=1)
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[checkpoint],
        log_every_n_steps=1,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randint(3, 200, (6, 12)), batch_size=2))
    assert not teacher.training
    for name, parameter in teacher.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.grad is None
        assert torch.equal(parameter, before[name].bfloat16())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(module.state_dict()) == keys
    assert sum(p.numel() for p in module.parameters()) == count
    terms = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("train_loss_")}
    assert len(terms) == 2
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(float(sum(terms.values())))


def test_mixed_precision_is_the_students_not_the_teachers():
    inputs, objective = batch(), LogitsDistillation(llama(1))
    exact = objective.teacher(inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = objective.teacher(inputs).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, exact)


@pytest.mark.parametrize(("kind", "term"), [(LogitsDistillation, "logits"), (SquareHead, "features")])
def test_training_brings_the_student_to_its_teacher(kind, term):
    student, inputs = llama(0), batch()
    objective = kind(llama(1), task_weight=0.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = sum(objective(student, inputs).values())
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_teachers_that_do_not_fit_are_refused_before_training(unchecked):
    with pytest.raises(ValueError, match="the teacher has vocab_size=300 and the model 259"):
        CausalLM(llama(), objective=LogitsDistillation(llama(vocab_size=300)))
    with pytest.raises(ValueError, match="the teacher has num_hidden_layers=3 and the model 2"):
        CausalLM(llama(), objective=SquareHead(llama(layers=3)))
    with pytest.raises(ValueError, match="the teacher has hidden_size=64 and the model 32"):
        CausalLM(llama(), objective=SquareHead(llama(hidden_size=64)))
    model = llama()
    with pytest.raises(ValueError, match="the teacher is the model that is trained"):
        CausalLM(model, objective=LogitsDistillation(model))
    assert all(p.requires_grad for p in model.parameters())
    sharing = llama(1)
    sharing.set_input_embeddings(model.get_input_embeddings())
    with pytest.raises(ValueError, match="the teacher is the model that is trained"):
        CausalLM(model, objective=SquareHead(sharing))
    with pytest.raises(ValueError, match="scheduler_steps must be at least 1, or None, got 0"):
        CausalLM(llama(), scheduler_steps=0)
    CausalLM(llama(), objective=LogitsDistillation(llama(hidden_size=64)))  # logits only need the vocabulary
    with pytest.raises(ValueError, match="a teacher is a model of transformers, got 'gpt2'"):
        LogitsDistillation("gpt2")
    with pytest.raises(
        ValueError, match=r'a teacher\'s dtype is a torch.dtype or its name, such as "bfloat16", got \'bf16\''
    ):
        SquareHead(llama(), dtype="bf16")
    with pytest.raises(ValueError, match="objective is one such as SquareHead"):
        CausalLM(llama(), objective="logits")
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0.0"):
        LogitsDistillation(llama(), temperature=0.0)
    with pytest.raises(ValueError, match=r"weight must be positive and task_weight not negative, got 0.0 and 1.0"):
        SquareHead(llama(), weight=0.0)
