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

from configs import b3b


def get_config():
    config = b3b.get_config()
    config.batch_size = 256  # x 4096 tokens: 1M a step
    config.model.vocab_size = 128_256  # of the LLaMA 3 tokenizer
    config.model.dim = 2560
    config.model.n_layers = 30
    config.model.n_heads = 20
    config.model.n_kv_heads = 5
    config.model.ffn_dim = 6912
    config.model.max_seq_len = 4096
    config.model.activation = "relu2"
    config.model.rope_theta = 500_000.0
    config.optim.accumulation_steps = 32  # 8 sequences at a time, on all devices
    return config
