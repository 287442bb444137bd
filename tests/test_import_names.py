"""The package pytorch_lightning, which has every class of lightning.pytorch a second time."""

import lightning.pytorch
import pytest
import torch
from torch.utils.data import DataLoader

from prune_callbacks import (
    NM,
    ConstantSchedule,
    IterativePrune,
    LoRARecovery,
    Magnitude,
    MaskEnforcer,
    OneShotPrune,
    PermuteChannels,
    QuantizeWeights,
    RunReport,
    SemiStructuredConvert,
    ShrinkModel,
    SparsityBenchmark,
    SparsityMonitor,
    Unstructured,
)
from prune_callbacks.tasks import tiny_llama

second = pytest.importorskip(
    "pytorch_lightning", reason="pytorch_lightning, which `lightning` brings, is not installed"
)


def module(package):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_llama(hidden_size=32, layers=1)

        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch, labels=batch).loss

        def train_dataloader(self):
            return DataLoader(torch.randint(0, 256, (4, 16)), batch_size=4)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    return Module()


def fit(package, callbacks, tmp_path, made=None, call="fit"):
    trainer = package.Trainer(
        default_root_dir=tmp_path,
        callbacks=callbacks,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    made = module(package) if made is None else made
    getattr(trainer, call)(made)
    return made


def one_shot():
    return OneShotPrune(Magnitude(Unstructured(0.5)), progress=False)


OURS = {
    "OneShotPrune": lambda folder: one_shot(),
    "IterativePrune": lambda folder: IterativePrune(ConstantSchedule(0.5, begin=1)),
    "MaskEnforcer": lambda folder: MaskEnforcer(),
    "SparsityMonitor": lambda folder: SparsityMonitor(),
    "RunReport": RunReport,
    "LoRARecovery": lambda folder: LoRARecovery(),
    "PermuteChannels": lambda folder: PermuteChannels(NM(2, 4)),
    "QuantizeWeights": QuantizeWeights,
    "SemiStructuredConvert": lambda folder: SemiStructuredConvert(),
    "ShrinkModel": ShrinkModel,
    "SparsityBenchmark": lambda folder: SparsityBenchmark(),
}


@pytest.mark.parametrize("name", OURS)
def test_a_trainer_of_the_other_package_is_refused(name, tmp_path):
    made = module(second)
    before = [p.clone() for p in made.parameters()]
    with pytest.raises(
        ValueError, match=rf"{name} got a pytorch_lightning\.Trainer .* `import lightning.pytorch as pl`"
    ):
        fit(second, [OURS[name](tmp_path / "run")], tmp_path, made)
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))


def test_a_validation_is_refused_too(tmp_path):
    class Validated(type(module(second))):
        def validation_step(self, batch, batch_idx):
            pass

        val_dataloader = property(lambda self: self.train_dataloader)

    with pytest.raises(ValueError, match=r"MaskEnforcer got a pytorch_lightning\.Trainer"):
        fit(second, [MaskEnforcer()], tmp_path, Validated(), "validate")


@pytest.mark.parametrize("name", ["ModelCheckpoint", "LearningRateFinder", "EMAWeightAveraging", "Timer"])
def test_ready_made_callbacks_of_the_other_package_are_refused_by_name(name, tmp_path):
    made = module(lightning.pytorch)
    with pytest.raises(ValueError, match=rf"OneShotPrune stands beside {name} of pytorch_lightning\.callbacks"):
        fit(lightning.pytorch, [one_shot(), MaskEnforcer(), getattr(second.callbacks, name)()], tmp_path, made)
    assert all(p.all() for p in made.model.model.layers.parameters())


def test_control_one_package_and_an_own_callback_of_the_other_base_work(tmp_path):
    class Own(second.Callback):
        ended = False

        def on_train_end(self, trainer, pl_module):
            self.ended = True

    own = Own()
    made = fit(lightning.pytorch, [one_shot(), MaskEnforcer(), own], tmp_path)
    assert own.ended
    weight = made.model.model.layers[0].mlp.up_proj.weight
    assert int((weight == 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize(("trainer", "of"), [(lightning.pytorch, second), (second, lightning.pytorch)])
def test_a_module_of_the_other_package_is_refused_by_lightning_before_anything_runs(trainer, of, tmp_path):
    """No callback is asked before that: here ends what this package can say."""
    with pytest.raises(TypeError, match="`model` must be a `LightningModule`"):
        fit(trainer, [one_shot(), MaskEnforcer()], tmp_path, module(of))
