"""Tiny configurations of model families, and what a pruned model must be by an independent reference."""

import oracles
import transformers as hf
from torch import nn

IDS = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = IDS | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
OPT = IDS | {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FALCON = IDS | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
NEOX = IDS | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MAMBA = IDS | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}

FAMILIES = {
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "llama-biases": lambda: hf.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=5),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA, use_sliding_window=True, **WINDOWS),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA),
    "gemma": lambda: hf.GemmaConfig(**LLAMA),
    "gemma2": lambda: hf.Gemma2Config(**LLAMA, **WINDOWS),
    "gemma3": lambda: hf.Gemma3TextConfig(**LLAMA, **WINDOWS),
    "opt-125m": lambda: hf.OPTConfig(**OPT),
    "opt-350m": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=8, do_layer_norm_before=False),
    "opt-projected": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=8),
    "opt-no-bias": lambda: hf.OPTConfig(**OPT, enable_bias=False, layer_norm_elementwise_affine=False),
    "bloom": lambda: hf.BloomConfig(**IDS, hidden_size=16, n_layer=2, n_head=4),
    "gpt2": lambda: hf.GPT2Config(**IDS, n_embd=16, n_layer=2, n_head=4, n_positions=64),
    "falcon-7b": lambda: hf.FalconConfig(**FALCON, multi_query=True, parallel_attn=True),
    "falcon-rw": lambda: hf.FalconConfig(**FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "falcon-40b": lambda: hf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**NEOX),
    "gpt-neox-serial": lambda: hf.GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    "mamba": lambda: hf.MambaConfig(**MAMBA, time_step_rank=4),
    "mamba2": lambda: hf.Mamba2Config(**MAMBA, num_heads=4, head_dim=8, expand=2, n_groups=2, chunk_size=8),
}


def matrix(layer: nn.Module):
    """The weight as (out, in), a view."""
    return layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.T


def layers_in(model, prefix: str) -> list[str]:
    """The names of all linear layers inside a block."""
    kinds = (nn.Linear, hf.pytorch_utils.Conv1D)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and n.startswith(prefix + ".")]


def prune_by_rerunning(model, blocks: list[str], batches, pruner):
    """Block by block: runs the WHOLE model, pruned so far, gathers what enters the block's layers, prunes by that."""
    for block in blocks:
        layers = layers_in(model, block)
        rates = [n for n in layers if n.endswith(".dt_proj")]
        inputs = oracles.layer_inputs(model, [n for n in layers if n not in rates], batches)
        for name in rates:
            inputs[name] = oracles.time_steps(model, name, batches)
        for name in layers:
            weight = matrix(model.get_submodule(name))
            statistic = pruner.statistic(weight.shape[1])
            if statistic is not None:
                statistic.update(inputs[name])
            weight.copy_(pruner.prune(weight, statistic).weight)


EXPERTS = LLAMA | {"num_experts_per_tok": 2}
PLAIN = {name: value for name, value in EXPERTS.items() if name != "head_dim"}
LATENT = PLAIN | {"num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 8, "n_shared_experts": 1}
LATENT |= {"first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 4}
LATENT |= {"qk_nope_head_dim": 4, "topk_group": 1}

MIXTURES = {
    "mixtral": lambda: hf.MixtralConfig(**EXPERTS, num_local_experts=4),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(
        **EXPERTS, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=12
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=8),
    "olmoe": lambda: hf.OlmoeConfig(**PLAIN, num_experts=4),
    "deepseek-v2": lambda: hf.DeepseekV2Config(**LATENT, n_group=1),
    "deepseek-v3": lambda: hf.DeepseekV3Config(**LATENT, n_group=2),
    "gpt-oss": lambda: hf.GptOssConfig(**EXPERTS, num_local_experts=4, **WINDOWS),
}
