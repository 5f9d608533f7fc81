"""The 700M model of BitNet b1.58 (arXiv:2402.17764): 729 million parameters.

python train.py --config=configs/b700m.py --workdir=runs/b700m \\
    --config.data.path='corpus/*.txt' --config.data.tokenizer_file=tokenizer.json

Both flags are needed: text, and a tokenizer of at most 32,000 tokens, as LLaMA's is.
The paper's learning rates are fixed ones, so the tuner is off; its guards alone come
with `--config.use_tuner=True --config.tuner.probe_steps=0`.

Not run yet: no time, no memory and no score. In the paper, perplexity 12.87, its twin
12.33.
"""

from vaani_jax import default_config


def get_config():
    config = default_config()
    config.num_steps = 95_367  # x 1,048,576 tokens: 100 billion
    config.batch_size = 512  # x 2048 tokens: 1M a step
    config.learning_rate = 1.5e-3
    config.use_tuner = False
    config.eval_interval = 1000
    config.save_interval = 1000
    config.sample_interval = 5000
    config.model.vocab_size = 32_000  # of the LLaMA tokenizer
    config.model.dim = 1536
    config.model.n_layers = 24
    config.model.n_heads = 24
    config.model.ffn_dim = 4096
    config.model.max_seq_len = 2048
    config.model.rope_theta = 10_000.0  # as LLaMA
    config.quantization.dtype = "bfloat16"
    config.execution.scan_layers = True
    config.execution.remat = True
    config.optim.schedule = "two_stage"  # and no weight decay in the second half
    config.optim.warmup_steps = 375
    config.optim.accumulation_steps = 32  # 16 sequences at a time, on all devices
    config.data.path = "corpus/*.txt"
    config.data.tokenizer_file = "tokenizer.json"
    config.data.fallback = False
    config.data.validation_fraction = 1e-4
    return config
