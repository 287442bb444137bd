"""Objectives against float64 references; the teacher frozen, in its precision, and in no checkpoint."""

import collections
import copy
import math
import warnings

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
    with pytest.raises(ValueError, match="a teacher is a model of transformers, or the path of one, got None"):
        LogitsDistillation(None)
    with pytest.raises(ValueError, match="gpt2 does not exist; name a folder"):
        CausalLM(llama(), objective=LogitsDistillation("gpt2"))
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


OBJECTIVES = {
    "task": LanguageModeling,
    "logits": lambda: LogitsDistillation(llama(1)),
    "features": lambda: SquareHead(llama(1)),
}


def nothing_to_predict(why):
    inputs = batch(padded=False)
    if why == "labels":
        return inputs | {"labels": torch.full_like(inputs["labels"], -100)}
    if why == "the first label alone":  # which no token predicts
        return inputs | {"labels": inputs["labels"].index_fill(1, torch.arange(1, 12), -100)}
    if why == "attention_mask":
        return inputs | {"attention_mask": torch.zeros_like(inputs["attention_mask"])}
    return {key: value[:, :1] for key, value in inputs.items()}


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("why", ["labels", "the first label alone", "attention_mask", "windows of one token"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_that_predicts_nothing_counts_nothing(kind, why, precision):
    student = llama()
    with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
        terms = OBJECTIVES[kind]()(student, nothing_to_predict(why))
    assert kind in terms
    assert all(float(term) == 0 for term in terms.values())
    sum(terms.values()).backward()
    for parameter in student.parameters():  # a parameter without a gradient would leave DDP waiting
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_control_the_loss_of_transformers_is_nan_there():
    assert llama()(**nothing_to_predict("labels")).loss.isnan()


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("why", ["labels", "attention_mask"])
def test_rows_that_predict_nothing_change_no_loss(kind, why):
    inputs, student, objective = batch(), llama(), OBJECTIVES[kind]()
    rows = {key: value.clone() for key, value in inputs.items()}
    rows["labels"][1] = -100
    if why == "attention_mask":
        rows["attention_mask"][1] = 0
    left = {key: value[[0, 2]] for key, value in inputs.items()}
    gradients = []
    for given in (rows, left):
        student.zero_grad()
        terms = objective(student, given)
        sum(terms.values()).backward()
        gradients.append(([float(term) for term in terms.values()], [p.grad.clone() for p in student.parameters()]))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for ours, theirs in zip(gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def quiet(tmp_path, **settings):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **settings,
    )


def rows_of(*batches):
    return torch.utils.data.DataLoader(list(batches), batch_size=None)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_empty_batch_among_good_ones_leaves_their_gradients(tmp_path, kind):
    good, empty = batch(), nothing_to_predict("labels")
    reference = llama()
    sum(OBJECTIVES[kind]()(reference, good).values()).backward()
    module = CausalLM(llama(), lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), objective=OBJECTIVES[kind]())
    before = [p.detach().clone() for p in module.parameters()]
    trainer = quiet(tmp_path, max_steps=1, accumulate_grad_batches=2)
    trainer.fit(module, rows_of(empty, good))
    for old, new, wanted in zip(before, module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(old - new, wanted.grad / 2, rtol=1e-3, atol=1e-6)
    state = trainer.optimizers[0].state
    assert all(state[p]["momentum_buffer"].isfinite().all() for p in module.parameters())


def test_the_validation_loss_is_that_of_the_predicted_tokens(tmp_path):
    good, empty = batch(), nothing_to_predict("labels")
    single = batch(padded=False)
    single["labels"][0, :6] = single["labels"][1:] = -100
    without_labels = {key: value for key, value in batch().items() if key != "labels"}
    module = CausalLM(llama())
    (measured,) = quiet(tmp_path).validate(module, rows_of(good, empty, single, without_labels), verbose=False)
    terms, count = 0.0, 0
    for inputs in (good, single, without_labels):
        labels = inputs.get("labels", inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))
        log_p = (
            module.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.double().log_softmax(-1)
        )
        for row, column in (labels[:, 1:] != -100).nonzero().tolist():
            terms, count = terms - float(log_p[row, column, labels[row, column + 1]]), count + 1
    assert count == 19 + 6 + 19
    assert measured["val_loss"] == pytest.approx(terms / count, rel=1e-5)
    assert measured["val_perplexity"] == pytest.approx(math.exp(terms / count), rel=1e-5)


def loss_of(given, model=None):
    return float(CausalLM(model or llama()).training_step(given, 0).detach())


def test_a_batch_names_its_tensors_or_is_one():
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    named = collections.namedtuple("Batch", inputs)(**inputs)
    padded = loss_of(inputs)
    assert loss_of([ids]) == loss_of((ids,)) == loss_of(ids) == loss_of(({"input_ids": ids},))
    assert loss_of(named) == loss_of((named,)) == loss_of({"input_ids": ids, "attention_mask": mask}) == padded
    assert loss_of(inputs | {"labels": ids}) == padded  # padding is not predicted, whatever its labels
    assert loss_of(inputs | {"position_ids": None, "attention_mask": None}) == pytest.approx(padded, rel=1e-5)
    assert abs(loss_of(ids) - padded) > 1e-3
    for several in ((ids, mask), [ids, mask, ids], (inputs, mask)):
        with pytest.raises(
            ValueError, match=rf'{len(several)} parts, which does not say .* give names: {{"input_ids": ids'
        ):
            loss_of(several)
    with pytest.raises(ValueError, match="a batch is a str, which does not say what is what"):
        loss_of("text")
    with pytest.raises(ValueError, match="no input_ids and no inputs_embeds; its keys are tokens, attention_mask"):
        loss_of({"tokens": ids, "attention_mask": mask})
    with pytest.raises(ValueError, match=r"the input_ids of a batch are a list; accepted are input_ids, whole numbers"):
        loss_of({"input_ids": ids.tolist()})
    with pytest.raises(ValueError, match=r"the input_ids of a batch are torch.float32 \(2, 3, 4\)"):
        loss_of((torch.zeros(2, 3, 4),))
    with pytest.raises(ValueError, match=r"the labels of a batch are \(3,\); accepted is one per token \(3, 12\)"):
        loss_of({"input_ids": ids, "labels": torch.zeros(3, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"an attention_mask \(3, 1, 12, 12\) does not say which .* are padding"):
        loss_of({"input_ids": ids, "attention_mask": torch.ones(3, 1, 12, 12)})


def test_keys_that_the_model_does_not_take_are_named_once():
    inputs = batch()
    more = {"token_type_ids": torch.zeros(3, 12, dtype=torch.long), "texts": ["a", "b", "c"]}
    module = CausalLM(llama())
    with pytest.warns(
        UserWarning, match="have token_type_ids, texts, which the .* LlamaForCausalLM does not take: left"
    ):
        first = module.training_step(inputs | more, 0)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert torch.equal(first, module.training_step(inputs | more, 0))
        taken = loss_of(inputs | {"position_ids": torch.arange(12).flip(0).expand(3, 12), "output_attentions": True})
    assert not any("does not take" in str(warning.message) for warning in heard)
    assert float(first.detach()) == loss_of(inputs)
    assert taken != loss_of(inputs)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_batches_of_embeddings_train(kind):
    inputs, student, objective = batch(), llama(), OBJECTIVES[kind]()
    embeds = student.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "labels": inputs["labels"]}
    teacher = getattr(objective, "teacher", None)
    if teacher is not None:  # an oracle for what it makes of the same embeddings
        teacher.model.set_input_embeddings(copy.deepcopy(student.get_input_embeddings()))
    module = CausalLM(student, objective=objective)
    loss = module.training_step(given, 0)
    assert float(loss.detach()) == pytest.approx(float(module.training_step(inputs, 0).detach()), rel=1e-5)
    loss.backward()
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"a batch of inputs_embeds needs labels: token ids \(3, 12\)"):
        module.training_step({"inputs_embeds": embeds}, 0)


def test_a_teacher_of_embeddings_is_as_wide_as_its_model():
    inputs = batch()
    given = {"inputs_embeds": torch.randn(3, 12, 32), "labels": inputs["labels"]}
    terms = LogitsDistillation(llama(1), dtype="bfloat16")(llama(), given)
    assert terms["logits"].isfinite()
    wide = LogitsDistillation(llama(1, hidden_size=64))
    with pytest.raises(ValueError, match="inputs_embeds of width 32, and the teacher's are 64 wide; give input_ids"):
        wide(llama(), given)
    with pytest.raises(
        ValueError, match=r"an attention_mask \(3, 1, 12, 12\) does not name; accepted is \(batch, tokens\)"
    ):
        SquareHead(llama(1))(llama(), inputs | {"attention_mask": torch.ones(3, 1, 12, 12, dtype=torch.bool)})
