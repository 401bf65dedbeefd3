"""Tiny checkpoints, written by the Hugging Face library itself."""

import pytest

LLAMA = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {
    "vocab_size": 61,
    "n_positions": 16,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder of checkpoints: llama (float32, one file), llama_bf16 (many shards), gpt2 (one file)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    with torch.no_grad():
        for parameter in (*llama.parameters(), *gpt2.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    llama.save_pretrained(folder / "llama")
    gpt2.save_pretrained(folder / "gpt2")
    llama.to(torch.bfloat16).save_pretrained(folder / "llama_bf16", max_shard_size="20KB")
    return folder
