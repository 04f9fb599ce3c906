"""Golden files for `test_gpt_neox.py`: tiny GPT-NeoX models written and run by transformers, which the tests do without.

    PYTHON_WITH_TORCH_AND_TRANSFORMERS tests/interop/make_gpt_neox_golden.py

Made with torch 2.13.0 and transformers 5.24.0. Two forms: shards in float32 with parallel residuals, one file in float16 with the
layers one after the other and half of each head rotated.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

HERE = Path(__file__).parent / "golden"
FORMS = {
    "gpt_neox_shards": ({"use_parallel_residual": True, "rotary_pct": 0.25}, torch.float32, "60KB"),
    "gpt_neox_float16": ({"use_parallel_residual": False, "rotary_pct": 0.5}, torch.float16, "1GB"),
}


def main():
    """Write both directories, each with tokens, logits and the blocks' outputs in golden.npz."""
    for seed, (name, (fields, dtype, shard)) in enumerate(FORMS.items()):
        torch.manual_seed(seed)
        config = GPTNeoXConfig(
            vocab_size=67, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, **fields
        )
        model = GPTNeoXForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # far from the initialisation, so that every weight matters
                parameter.add_(0.15 * torch.randn_like(parameter))
        model = model.to(dtype)
        shutil.rmtree(HERE / name, ignore_errors=True)
        model.save_pretrained(HERE / name, max_shard_size=shard)
        model = model.float()
        blocks = []
        for block in model.gpt_neox.layers:  # the library's last hidden state comes after the final norm
            block.register_forward_hook(lambda *_: blocks.append(_[2][0] if isinstance(_[2], tuple) else _[2]))
        tokens = torch.randint(0, 67, (2, 19))
        with torch.no_grad():
            logits = model(tokens).logits
        outputs = torch.stack([b.detach() for b in blocks])
        np.savez(HERE / name / "golden.npz", tokens=tokens.numpy(), logits=logits.numpy(), blocks=outputs.numpy())
        print(name, tuple(logits.shape), tuple(outputs.shape), float(logits.std()))


main()
