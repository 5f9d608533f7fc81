"""The shape of the original Vaani: 10.7 million parameters, context 256.

python train.py --config=configs/medium.py

Two cores of an Intel Xeon with AMX, 2026-11-24: 5.1 s a step with AdamW, so about 7
hours; only steps were measured, no score.
"""

from vaani_jax import default_config


def get_config():
    config = default_config()
    config.num_steps = 5000
    config.batch_size = 64
    config.learning_rate = 1e-3
    config.model.dim = 384
    config.model.n_layers = 6
    config.model.n_heads = 6
    config.model.ffn_dim = 1024
    config.model.max_seq_len = 256
    config.model.dropout = 0.2
    return config
