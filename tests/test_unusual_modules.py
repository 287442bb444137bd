"""Modules of unusual structure, which once got wrong masks in silence."""

import copy
import warnings

import pytest
import torch
import transformers as hf
from fits import trainer_of
from lightning.pytorch import LightningModule
from topologies import rerun_masks
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from zoo import SMALL

from prune_callbacks import (
    NM,
    OWL,
    ConstantSchedule,
    IterativePrune,
    Magnitude,
    MaskEnforcer,
    OneShotPrune,
    SparseGPTQ,
    Structured,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.anatomy.blocks import encoder_and_decoder

pytestmark = pytest.mark.filterwarnings("ignore")
HALF = Wanda(Unstructured(0.5))


class Block(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.inner = inner

    def forward(self, x):
        x = x if self.inner is None else torch.tanh(self.inner(x))
        return x + self.fc2(torch.tanh(self.fc1(x)))


def rows(*shape, count=3):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(6, *shape, 8, generator=generator).double() for _ in range(count)]


def pruned(model, batches, pruner=HALF, **settings):
    return prune_sequentially(model, batches, pruner, progress=False, **settings)


def same(report, expected):
    assert report.masks.keys() == expected.keys()
    assert all(torch.equal(report.masks[name], keep) for name, keep in expected.items())


def test_encoder_and_decoder_are_told_by_where_they_are():
    small = {**SMALL, "vocab_size": 30}
    torch.manual_seed(0)
    both = hf.EncoderDecoderModel(
        encoder=hf.BertModel(hf.BertConfig(**small)),
        decoder=hf.BertLMHeadModel(hf.BertConfig(**small, is_decoder=True, add_cross_attention=True)),
    )
    both.config.decoder_start_token_id, both.config.pad_token_id = 1, 0
    assert encoder_and_decoder(both) == ["encoder.encoder.layer", "decoder.bert.encoder.layer"]
    ids = torch.randint(3, 30, (4, 7))
    report = pruned(both, [{"input_ids": ids, "labels": ids}])
    assert {name.split(".")[0] for name in report.masks} == {"encoder", "decoder"}
    sizes = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "out_features": ["stage4"]}
    config = hf.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=hf.ResNetConfig(**sizes),
        **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
        **{"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 4},
    )
    assert encoder_and_decoder(hf.DetrForObjectDetection(config)) == ["model.encoder.layers", "model.decoder.layers"]


class Taught(LightningModule):
    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self.student(batch), self.teacher(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), 1e-2)


@pytest.mark.parametrize("rounds", [False, True])
def test_a_frozen_teacher_that_is_defined_last_makes_no_output(rounds, tmp_path):
    torch.manual_seed(0)
    module, before = Taught(), None
    before = copy.deepcopy(module.teacher.state_dict())
    prune = IterativePrune(ConstantSchedule(0.5)) if rounds else OneShotPrune(HALF, progress=False)
    trainer = trainer_of([prune, MaskEnforcer()], tmp_path, max_steps=2, accumulate_grad_batches=1)
    trainer.fit(module, DataLoader([x.float() for x in rows()], batch_size=None))
    masks = prune.masks if rounds else prune.report.masks
    assert set(masks) == {"student.0.weight", "student.2.weight"}
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())
    if not rounds:
        assert "the last layer that is called" in prune.report.skipped["student.4.weight"]
        assert "is not trained" in prune.report.skipped["teacher.0.weight"]


def test_a_module_inside_and_outside_of_a_chain_counts_all_its_calls():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(nn.Linear(8, 8)), Block(nn.Linear(8, 8))])
            self.again = self.blocks[0].inner

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.again(3 * x)

    torch.manual_seed(0)
    model, batches = Again().double(), rows()
    expected = rerun_masks(model, ["blocks.0", "blocks.1"], batches)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        report = pruned(model, batches)
    same(report, expected)
    assert any("its block 0 shares a Linear with other parts" in str(warning.message) for warning in heard)


@pytest.mark.parametrize("lengths", [(1, 6, 6), (6, 1, 1)])
def test_layers_that_later_batches_call_more_often(lengths):
    class Loop(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.cell, self.blocks = nn.Linear(8, 8), nn.ModuleList([Steps() for _ in range(blocks)])
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            state = torch.zeros_like(x[:, 0])
            for step in range(x.shape[1]):
                state = torch.tanh(self.cell(x[:, step] + state))
            for block in self.blocks:
                x = block(x)
            return self.head(state), x

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(8, 8)

        def forward(self, x):
            return torch.stack([torch.tanh(self.cell(part)) for part in x.unbind(1)], 1)

    torch.manual_seed(0)
    model = Loop(2).double()
    batches = [batch[:, :length] for batch, length in zip(rows(6), lengths, strict=True)]
    same(pruned(copy.deepcopy(model), batches), rerun_masks(model, ["cell", "blocks.0", "blocks.1"], batches))


def test_a_step_that_tries_again_after_any_error(tmp_path):
    class Trying(Taught):
        def training_step(self, batch, batch_idx):
            try:
                return self.student(batch).square().mean()
            except Exception:
                return self.student(batch * 100).square().mean()

    torch.manual_seed(0)
    module, batches = Trying(), [x.float() for x in rows()]
    reference = copy.deepcopy(module.student)
    prune = OneShotPrune(HALF, progress=False)
    trainer = trainer_of([prune, MaskEnforcer()], tmp_path, max_steps=1, accumulate_grad_batches=1)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    expected = pruned(reference, batches)
    assert all(torch.equal(prune.report.masks[f"student.{name}"], keep) for name, keep in expected.masks.items())


def test_padding_that_a_function_of_module_and_batch_passes_on():
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**SMALL, vocab_size=30)).eval()
    ids, mask = torch.randint(3, 30, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    mask[1:, 5:] = 0
    expected = pruned(copy.deepcopy(model), [{"input_ids": ids, "attention_mask": mask}]).masks
    by_place = pruned(copy.deepcopy(model), [(ids, mask)], forward=lambda model, batch: model(*batch)).masks
    assert by_place == expected
    assert pruned(copy.deepcopy(model), [(ids,)], forward=lambda model, batch: model(*batch)).masks != expected
    with pytest.raises(ValueError, match=r"calls it 2 times with different attention masks, so padding cannot be told"):
        pruned(model, [(ids, mask)], forward=lambda model, batch: (model(*batch), model(batch[0])))


def test_an_allocation_by_blocks_with_all_statistics_at_once():
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(4))
    model.forward = lambda x: [x := block(x) for block in model.blocks][-1]
    with torch.no_grad():
        model.blocks[1].fc1.weight[0] *= 30
    model = model.double()
    found = {}
    for order in ("sequential", "at_once"):
        report = pruned(copy.deepcopy(model), rows(), allocation=OWL(threshold=2.0), order=order, forward=run)
        found[order] = [layer.sparsity for layer in report.layers]
    assert len({round(share, 3) for share in found["at_once"]}) > 1
    assert found["at_once"] == pytest.approx(found["sequential"])


def run(model, x):
    for block in model.blocks:
        x = block(x)
    return x


class Beginning(Taught):
    """A layer that begins as zeros."""

    def __init__(self):
        super().__init__()
        self.teacher = None
        nn.init.zeros_(self.student[2].weight)

    def training_step(self, batch, batch_idx):
        return (self.student(batch) - 1).square().mean()


def test_layers_that_begin_as_zeros_are_not_pruned_ones(tmp_path):
    batches = DataLoader([x.float() for x in rows()], batch_size=None)
    torch.manual_seed(0)
    module, prune = Beginning(), IterativePrune(ConstantSchedule(0.5, begin=3))
    trainer = trainer_of([prune, MaskEnforcer()], tmp_path, max_steps=6, accumulate_grad_batches=1, max_epochs=-1)
    with pytest.warns(UserWarning, match=r"1 layers hold nothing but zeros, first student.2.weight"):
        trainer.fit(module, batches)
    assert 0 < prune.masks.layer_sparsity()["student.2.weight"] < 1
    with pytest.raises(ValueError, match="MaskEnforcer found no masks"):
        trainer_of([MaskEnforcer()], tmp_path, max_steps=1).fit(Beginning(), batches)
    # Beside a sparse layer it is held: it may have been pruned as a whole.
    sparse, enforcer = Beginning(), MaskEnforcer()
    with torch.no_grad():
        sparse.student[0].weight[:, ::2] = 0
    trainer_of([enforcer], tmp_path, max_steps=2, accumulate_grad_batches=1).fit(sparse, batches)
    assert enforcer.masks.layer_sparsity() == {"student.0.weight": 0.5, "student.2.weight": 1.0}


def test_what_other_pruners_and_a_model_inside_leave_dense_is_named(tmp_path):
    mixed = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 3)).double()
    report = pruned(mixed, [torch.randn(40, 8, 4).double()], SparseGPTQ(NM(2, 4)))
    assert set(report.masks) == {"2.weight"}
    assert "not taken by this pruner" in report.skipped["0.weight"]

    class Headed(LightningModule):
        def __init__(self):
            super().__init__()
            self.bert = hf.BertModel(hf.BertConfig(**SMALL, vocab_size=30))
            self.head = nn.Linear(16, 3)

        def training_step(self, batch, batch_idx):
            return self.head(self.bert(**batch).pooler_output).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    torch.manual_seed(0)
    prune = OneShotPrune(HALF, progress=False)
    data = DataLoader([{"input_ids": torch.randint(3, 30, (4, 7))}], batch_size=None)
    trainer_of([prune, MaskEnforcer()], tmp_path, max_steps=1, accumulate_grad_batches=1).fit(Headed(), data)
    assert prune.report.skipped == {
        "pooler.dense": "it is outside of the blocks, where nothing is pruned",
        "head": "it is outside of the BertModel",
    }


def test_structured_pruning_of_a_model_of_one_s_own_stays_inside_of_its_blocks():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return x + self.fc2(torch.relu(self.fc1(x)))

    class Framed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(8, 8)
            self.blocks = nn.ModuleList([Mlp(), Mlp()])
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.out(x)

    from prune_callbacks import Columns

    torch.manual_seed(0)
    report = pruned(Framed().double(), rows(), Structured(Columns(0.25)))
    assert {name.split(".")[0] for name in report.masks} == {"blocks"}
    assert {"stem.weight", "out.weight"} <= set(report.skipped)


class Own(nn.MultiheadAttention):
    """An attention with a forward of its own."""

    def forward(self, x, memory):
        return super().forward(x, memory, memory, need_weights=False)[0]


def test_an_attention_with_a_forward_of_its_own():
    class Around(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.attention, self.head = kind(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            memory = x.flip(1)
            own = isinstance(self.attention, Own)
            found = self.attention(x, memory) if own else self.attention(x, memory, memory)[0]
            return self.head(found)

    found = []
    for kind in (Own, nn.MultiheadAttention):
        torch.manual_seed(0)
        found.append(pruned(Around(kind).double(), rows(5)).masks)
    assert found[0] == found[1]
    assert set(found[0]) == {"attention.in_proj_weight", "attention.out_proj.weight"}


@pytest.mark.parametrize("reach", ["optimizers", "gradient", "attribute"])
def test_a_step_that_needs_training_says_so(reach, tmp_path):
    class Needing(Taught):
        def on_train_start(self):
            self.started = True

        def training_step(self, batch, batch_idx):
            x = batch.requires_grad_()
            if reach == "optimizers":
                assert self.optimizers().param_groups
            if reach == "attribute":
                assert self.started
            loss = self.student(x).square().mean()
            if reach == "gradient":
                torch.autograd.grad(loss, x, create_graph=True)
            return loss

    data = DataLoader([x.float() for x in rows()], batch_size=None)
    with pytest.raises(
        ValueError, match=r"Needing failed on a calibration batch \(.*Say how the module runs on a batch"
    ):
        trainer_of([OneShotPrune(HALF, progress=False), MaskEnforcer()], tmp_path, max_steps=1).fit(Needing(), data)


def test_masks_of_a_part_find_it_again(tmp_path):
    module = Taught()
    report = pruned(module.student.double(), rows(), Magnitude(Unstructured(0.5)))
    report.masks.save(tmp_path / "masks.safetensors")
    fresh = Taught()
    enforcer = MaskEnforcer(tmp_path / "masks.safetensors")
    trainer = trainer_of([enforcer], tmp_path, max_steps=2, accumulate_grad_batches=1)
    trainer.fit(fresh, DataLoader([x.float() for x in rows()], batch_size=None))
    assert report.masks.violations(fresh.student.named_parameters()) == {}


@pytest.mark.parametrize("last", ["single", "block", "recurrent"])
def test_the_layer_that_is_called_last_makes_the_output_wherever_it_is_defined(last):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.stem = nn.Linear(8, 3), nn.Linear(8, 8)
            inner = {"single": nn.Linear(8, 8), "block": nn.ModuleList([Block()]), "recurrent": nn.GRU(8, 8)}
            self.inner = inner[last]

        def forward(self, x):
            x = torch.tanh(self.stem(x))
            for part in self.inner if last == "block" else [self.inner]:
                x = part(x)
            return self.head(x[0] if last == "recurrent" else x)

    torch.manual_seed(0)
    report = pruned(Backwards().double(), rows())
    assert report.skipped.keys() == {"head.weight"}
    assert "the last layer that is called, which makes the output" in report.skipped["head.weight"]
    assert {name.split(".")[0] for name in report.masks} == {"stem", "inner"}


def test_a_layer_that_loses_all_its_weights_is_named(tmp_path):
    module = Taught()
    with torch.no_grad():
        module.student[2].weight *= 1e-6
    prune = IterativePrune(ConstantSchedule(0.7))
    trainer = trainer_of([prune, MaskEnforcer()], tmp_path, max_steps=1, accumulate_grad_batches=1)
    with pytest.warns(UserWarning, match=r'1 layers have no weight left, first student.2.weight.*scope="layer"'):
        trainer.fit(module, DataLoader([x.float() for x in rows()], batch_size=None))


def test_layers_are_named_as_they_are_printed():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.attention = nn.GRU(8, 8), nn.MultiheadAttention(8, 2)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = self.gru(x)[0]
            return self.head(self.attention(x, x, x)[0])

    torch.manual_seed(0)
    model = Named().double()
    asked = {
        "head": {"head.weight"},
        "head.weight": {"head.weight"},
        "gru": {"gru.weight_ih_l0", "gru.weight_hh_l0"},
        "attention": {"attention.in_proj_weight", "attention.out_proj.weight"},
    }
    for pattern, expected in asked.items():
        assert (
            set(pruned(copy.deepcopy(model), rows(5), Magnitude(Unstructured(0.5)), targets=pattern).masks) == expected
        )
    with pytest.raises(ValueError, match=r"'hed' matches no layer. There are gru.weight_ih_l0, .*Did you mean 'head'"):
        pruned(model, rows(5), targets="hed")
