"""A character model that llama.cpp runs: widths in multiples of 256, SwiGLU, tied.

python train.py --config=configs/gguf.py
python -m vaani_jax export --workdir runs/gguf --format gguf --output gguf.gguf
"""

from configs import base


def get_config():
    config = base.get_config()
    config.num_steps = 1000
    config.batch_size = 12
    config.learning_rate = 0.012
    config.model.dim = 256
    config.model.n_layers = 4
    config.model.n_heads = 4
    config.model.ffn_dim = 768
    config.model.max_seq_len = 64
    config.optim.name = "muon"
    config.optim.adam_lr_ratio = 0.3
    config.optim.weight_decay = 0.0
    config.optim.warmup_steps = 20
    return config
