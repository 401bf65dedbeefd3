"""GPT-2 for the benchmark of whole models; how it runs is in `blrlab.bench.gpt2_torch` and `.gpt2_xla`."""

from blrlab.bench import gpt2_torch
from blrlab.bench.nets import language
from blrlab.bench.nets.family import Family
from blrlab.models import gpt2

FAMILY = Family(
    name="gpt2",
    sizes=gpt2.Config,
    nets={"gpt2s": gpt2.Config()},
    phases=("forward", "prefill", "decode", "train_step"),
    linears=gpt2_torch.linears,
    products=lambda sizes, group: language.products(gpt2_torch.linears(sizes), sizes, group),
    tokens=lambda sizes: language.tokens(sizes, "gpt2s"),
    sized=lambda sizes, tokens: sizes,
    why_not=language.why_not,
)
