"""
Trains a small OPT from scratch on real text, as a model that no setting was chosen on, for `reconstruction.py`.

    python benchmarks/small_opt.py TRAIN.txt EVALUATION.txt FOLDER [--steps 800]
    python benchmarks/reconstruction.py FOLDER/windows.safetensors --model FOLDER --held-out OTHER.jsonl \
        --results benchmarks/results/reconstruction_small_opt.json

OTHER has texts that the model was not trained on. Tokens are bytes, so the perplexities are per byte. OPT has learned
positions, biases, LayerNorm and ReLU, of which a Llama has nothing.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from lightning import Trainer, seed_everything
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

from prune_callbacks import CausalLM, TokenDataModule
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.tasks import byte_tokenizer
from prune_callbacks.tasks.corpora import TextFile

LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="a .jsonl or .txt file, to train and calibrate on")
    parser.add_argument("evaluation", type=Path, help="a .jsonl or .txt file, to measure perplexity on")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--matmul-precision", default="medium", choices=("highest", "high", "medium"))
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.matmul_precision)
    seed_everything(0, verbose=False)
    tokenizer, batch_size = byte_tokenizer(), 16
    data = TokenDataModule(
        tokenizer,
        TextFile(str(args.train), "train"),
        TextFile(str(args.train), "calibration"),
        TextFile(str(args.evaluation), "evaluation"),
        seq_len=LENGTH,
        batch_size=batch_size,
        train_windows=args.steps * batch_size,
        calibration_windows=64,
        evaluation_windows=64,
    )
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        word_embed_proj_dim=args.hidden_size,
        ffn_dim=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = OPTForCausalLM(config)
    module = CausalLM(
        model,
        partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1),
        partial(transformers.get_cosine_schedule_with_warmup, num_warmup_steps=args.steps // 10),
    )
    trainer = Trainer(
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    begin = time.perf_counter()
    trainer.fit(module, datamodule=data)
    assert data.evaluation_windows is not None
    assert data.calibration_windows is not None
    value = perplexity(model, data.evaluation_windows, progress=False)
    print(f"perplexity {value:.3f} per byte, {time.perf_counter() - begin:.0f} seconds of training")
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    windows = {"calibration": data.calibration_windows, "wikitext2": data.evaluation_windows}
    save_file(windows, args.folder / "windows.safetensors")


if __name__ == "__main__":
    main()
