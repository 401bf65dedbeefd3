"""Continue a text with a factored checkpoint: torch and this package alone.

    python -m blrlab_ops.generate runs/llama7b_blast --prompt="Once upon a time" --tokens=64

Prints the text, then the weights' bytes, the peak and the speed. Needs `pip install 'blrlab-ops[models]'`.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from .dispatch import CannotRun
from .loading import factored_layers, load_factored, weight_bytes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MEGABYTE = 1 << 20
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    given = _parser().parse_args(arguments)
    try:
        _run(given)
    except (ValueError, OSError, ImportError, CannotRun) as error:
        print(f"error: {error}.".replace("..", "."), file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Continue a text with a factored checkpoint."
    parser = argparse.ArgumentParser(prog="python -m blrlab_ops.generate", description=about)
    parser.add_argument("folder", type=pathlib.Path, help="of the checkpoint, with its tokenizer")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="how many follow (64)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights (as they are stored)")
    parser.add_argument("--impl", help="of the factored layers (the best that can run)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="the share of probability drawn from (1)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _run(given: argparse.Namespace) -> None:
    if given.tokens < 1:
        raise ValueError(f"--tokens is {given.tokens}, and must be at least 1")
    if given.temperature < 0 or not 0 < given.top_p <= 1:
        raise ValueError("--temperature must be at least 0, and --top-p between 0 and 1")
    tokenizer = _tokenizer(given.folder)
    dtype = DTYPES[given.dtype] if given.dtype else None
    model = load_factored(given.folder, given.device, dtype, given.impl)
    ids = tokenizer(given.prompt, return_tensors="pt").input_ids.to(given.device)
    context = getattr(model.config, "max_position_embeddings", None)
    if not ids.numel():
        raise ValueError("the prompt is empty")
    if context and ids.shape[1] + given.tokens > context:
        asked = f"a prompt of {ids.shape[1]} tokens and {given.tokens} more"
        raise ValueError(f"{asked} are longer than the model's context of {context}")
    torch.manual_seed(given.seed)
    found, seconds = _continue(model, ids, given)
    print(tokenizer.decode(found[0], skip_special_tokens=True))
    count, layers = found.shape[1] - ids.shape[1], len(factored_layers(model))
    peak = f", peak {torch.cuda.max_memory_allocated() / MEGABYTE:,.0f} MiB" if ids.is_cuda else ""
    print(
        f"[{count} tokens, {count / seconds:.1f} tokens/s; {layers} factored layers, weights "
        f"{weight_bytes(model) / MEGABYTE:,.0f} MiB{peak}]",
        file=sys.stderr,
    )


def _continue(model: Any, ids: torch.Tensor, given: argparse.Namespace) -> tuple[torch.Tensor, float]:
    drawn = {"do_sample": True, "temperature": given.temperature, "top_p": given.top_p} if given.temperature else {}
    started = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=given.tokens,
            pad_token_id=model.config.eos_token_id if isinstance(model.config.eos_token_id, int) else 0,
            **(drawn or {"do_sample": False}),
        )
    if ids.is_cuda:
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


def _tokenizer(folder: pathlib.Path) -> Any:
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {folder}: it is not a folder")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        fix = "copy the tokenizer's files there from the checkpoint that was compressed"
        raise FileNotFoundError(f"{folder} has no tokenizer, none of {', '.join(TOKENIZERS)}: {fix}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(f"transformers cannot be imported ({error}): pip install 'blrlab-ops[models]'") from None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from None


if __name__ == "__main__":
    sys.exit(main())
