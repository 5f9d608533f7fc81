"""The shape of the original Vaani: 10.7 million parameters, context 256.

python train.py --config=configs/medium.py
"""

from configs import base


def get_config():
    config = base.get_config()
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
