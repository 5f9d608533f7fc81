"""125 million parameters, for a GPU or a TPU.

python train.py --config=configs/large.py --config.data.path='corpus/*.txt'

Not run to its end yet: no time and no score.
"""

from vaani_jax import default_config


def get_config():
    config = default_config()
    config.num_steps = 20_000
    config.batch_size = 128
    config.learning_rate = 1.5e-3
    config.eval_interval = 1000
    config.save_interval = 1000
    config.sample_interval = 1000
    config.model.dim = 768
    config.model.n_layers = 12
    config.model.n_heads = 12
    config.model.ffn_dim = 2048
    config.model.max_seq_len = 1024
    config.quantization.dtype = "bfloat16"
    config.execution.scan_layers = True
    config.execution.remat = True
    config.optim.schedule = "two_stage"
    config.optim.warmup_steps = 375
    config.data.tokenizer = "byte"
    return config
