"""The 3B model of BitNet b1.58 (arXiv:2402.17764): 3.32 billion parameters.

python train.py --config=configs/b3b.py --workdir=runs/b3b \\
    --config.data.path='corpus/*.txt' --config.data.tokenizer_file=tokenizer.json

Both flags are needed: text, and a tokenizer of at most 32,000 tokens, as LLaMA's is.
The paper's learning rates are fixed ones, so the tuner is off; its guards alone come
with `--config.use_tuner=True --config.tuner.probe_steps=0`.

Not run yet: no time, no memory and no score. In the paper, perplexity 9.91, its
twin 10.04. Parameters, moments and two gradients take 20 bytes a parameter, 66 GB: for
several devices.
"""

from configs import b700m


def get_config():
    config = b700m.get_config()
    config.learning_rate = 1.2e-3
    config.model.dim = 3200
    config.model.n_layers = 26
    config.model.n_heads = 32
    config.model.ffn_dim = 8640
    config.optim.accumulation_steps = 16  # 32 sequences at a time, on all devices
    return config
