"""Jitted inference with a trained model, without the command line.

python train.py --config=configs/debug.py --workdir=runs/debug
python examples/inference.py runs/debug "To be"
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp

from vaani_jax.inference.model import load
from vaani_jax.model.cache import KVCache

model = load(sys.argv[1])
prompt = sys.argv[2] if len(sys.argv) > 2 else "\n"
tokens = jnp.asarray(model.tokenizer.encode(prompt))[None]  # [B = 1, T]
steps = model.architecture.max_seq_len - tokens.shape[1]


@jax.jit
def continue_greedily(variables, tokens):
    """Reads the prompt, then draws ``steps`` tokens in one compiled loop."""
    apply: Any = model.module.apply  # logits, and the cache where one is given
    cache = KVCache.create(model.architecture, batch=tokens.shape[0])
    logits, cache = apply(variables, tokens, cache)

    def body(carry, _):
        token, cache = carry
        logits, cache = apply(variables, token[:, None], cache)
        return (jnp.argmax(logits[:, -1], axis=-1), cache), token

    first = jnp.argmax(logits[:, -1], axis=-1)
    return jax.lax.scan(body, (first, cache), length=steps)[1].T  # [B, steps]


print(prompt + model.tokenizer.decode(continue_greedily(model.variables, tokens)[0]))
