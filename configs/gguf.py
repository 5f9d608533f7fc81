"""A character model that llama.cpp runs as it was trained: SwiGLU, tied, rows of 256.

python train.py --config=configs/gguf.py
python -m vaani_jax export --workdir runs/gguf --format gguf --type tq2_0 --output g

A row is one block of llama.cpp's ternary types, so that activations are rounded in one
piece, as here; --embedding float32 makes the export exact. Two cores of an Intel Xeon
with AMX, 2026-11-24: validation loss 1.691 on Tiny Shakespeare in 2 min 31 s (seed 0).
With ffn_dim=768, where a row is three blocks: 1.653 in 3 min 36 s, 1.496 after 4000
steps.
"""

from vaani_jax import default_config


def get_config():
    config = default_config()
    config.num_steps = 1000
    config.batch_size = 12
    config.learning_rate = 0.012
    config.model.dim = 256
    config.model.n_layers = 4
    config.model.n_heads = 4
    config.model.ffn_dim = 256
    config.model.max_seq_len = 64
    config.optim.name = "muon"
    config.optim.adam_lr_ratio = 0.3
    config.optim.weight_decay = 0.0
    config.optim.warmup_steps = 20
    return config
