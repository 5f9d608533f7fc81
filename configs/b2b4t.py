"""The shape of microsoft/bitnet-b1.58-2B-4T: 2.41 billion parameters, context 4096.

python train.py --config=configs/b2b4t.py --workdir=runs/b2b4t \\
    --config.data.path='corpus/*.txt' --config.data.tokenizer_file=tokenizer.json

Both flags are needed: text, and a tokenizer of at most 128,256 tokens, as LLaMA 3's is.
The published model (arXiv:2504.12285) saw 4 trillion tokens; the schedule here is that
of BitNet b1.58's 3B model, with 100 billion. Learning rates are fixed, so the tuner is
off; its guards alone come with `--config.use_tuner=True --config.tuner.probe_steps=0`.
To go on from the published weights, see `python -m vaani_jax import` and
`--config.init_from`.

Not run yet: no time, no memory and no score. Parameters, moments and two gradients take
20 bytes a parameter, 48 GB, and the logits of one sequence 2 GB.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.num_steps = 95_367  # x 1,048,576 tokens: 100 billion
    config.batch_size = 256  # x 4096 tokens: 1M a step
    config.learning_rate = 1.2e-3  # of the 3B model
    config.use_tuner = False
    config.eval_interval = 1000
    config.save_interval = 1000
    config.sample_interval = 5000
    config.model.vocab_size = 128_256  # of the LLaMA 3 tokenizer
    config.model.dim = 2560
    config.model.n_layers = 30
    config.model.n_heads = 20
    config.model.n_kv_heads = 5
    config.model.ffn_dim = 6912
    config.model.max_seq_len = 4096
    config.model.activation = "relu2"
    config.model.dtype = "bfloat16"
    config.model.scan_layers = True
    config.model.remat = True
    config.optim.schedule = "two_stage"  # and no weight decay in the second half
    config.optim.warmup_steps = 375
    config.optim.accumulation_steps = 32  # 8 sequences at a time, on all devices
    config.data.path = "corpus/*.txt"
    config.data.tokenizer_file = "tokenizer.json"
    config.data.fallback = False
    config.data.validation_fraction = 1e-4
    return config
