"""Every key, with its default. Other configs are short differences from this one.

Any key can be set on the command line: --config.model.dim=256
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.seed = 0  # initial weights, dropout, order of the data
    config.batch_size = 12  # sequences per step, all micro-batches together
    config.num_steps = 0  # length of the run; 0: num_epochs instead
    config.num_epochs = 1  # passes over the training part
    # Peak; for muon that of the matrices. A number, or "auto": the tuner finds it.
    config.learning_rate = FieldReference("auto", field_type=object)
    config.use_tuner = True  # False: the plain schedule
    config.aggressive_tuning = False  # adjust twice as often and twice as far
    config.target_sparsity_min = placeholder(float)  # share of zeros of every kernel;
    config.target_sparsity_max = placeholder(float)  # None: as it comes
    config.quantize_steps = 0  # steps that phase quantisation in; 0: from the start
    config.eval_interval = 250  # steps between evaluations on all held-out windows
    config.save_interval = 250  # steps between checkpoints
    config.log_interval = 10  # steps between reports of metrics
    config.sample_interval = 500  # steps between samples; 0: only at the end
    config.keep_checkpoints = 2  # the last so many, besides the best
    config.init_from = ""  # workdir of a run whose weights to start from

    config.mesh = mesh = ConfigDict()  # of devices, see vaani_jax/sharding.py
    mesh.data = -1  # copies of the model; -1: as many as there are devices for
    mesh.fsdp = 1  # parts that parameters and the optimizer's state are cut into
    mesh.tensor = 1  # parts that heads, feed-forward and vocabulary are cut into
    mesh.rules = ()  # "pattern: axes" for parameters, before the built-in ones

    config.model = model = ConfigDict()
    model.vocab_size = 0  # 0: as the tokenizer has
    model.dim = 128  # width of the residual stream; a multiple of 2 n_heads
    model.n_layers = 4
    model.n_heads = 4  # query heads
    model.n_kv_heads = 0  # key-value heads, a divisor of n_heads; 0: n_heads
    model.ffn_dim = 0  # feed-forward width; 0: 8/3 dim, to a multiple of 64
    model.max_seq_len = 64  # context, in tokens
    model.dropout = 0.0
    model.activation = "swiglu"  # or "relu2": squared ReLU
    model.rope_theta = 500_000.0  # base of the rotary embedding
    model.norm_eps = 1e-5
    model.init_std = 0.02
    model.sub_norms = True  # norms before o_proj and down_proj; False: a Llama block
    model.tie_embeddings = True  # the head reuses the embedding
    model.ternary_head = False  # b1.58 keeps the head in full precision
    model.quantize = True  # False: the full-precision twin
    model.threshold = 0.5  # tau, in units of mean|W|; 0.5 is b1.58
    model.weight_scale = "absmean"  # or "least_squares"
    model.weight_granularity = "tensor"  # or "channel": a scale per output
    model.activation_tracking = "token"  # or "ema": a tracked range
    model.activation_momentum = 0.99  # of the tracked range
    # Dtype of the forward integers, or "float32", "bfloat16", "int8"; equal results.
    model.operands = "auto"
    model.wire = "2bit"  # or "int8", "float": how cut kernels travel; equal results
    model.attention = "auto"  # "library", or "explicit": faster on CPUs
    model.dtype = "float32"  # compute; or "bfloat16", with float32 masters
    model.scan_layers = False  # one traced block: compiles faster, same results
    model.remat = False  # recompute blocks backward: less memory, same results
    model.remat_save = "nothing"  # of a block, or "products": less to recompute

    config.optim = optim = ConfigDict()
    optim.name = "adamw"  # or "muon" for the matrices, AdamW for the rest
    optim.adam_lr_ratio = 0.15  # muon: learning rate of the rest / of the matrices
    optim.weight_decay = 0.1  # on matrices only
    optim.beta1 = 0.9
    optim.beta2 = 0.95
    optim.eps = 1e-8
    optim.momentum = 0.95  # of muon
    optim.moment_dtype = "float32"  # first moment; or "bfloat16": less memory
    optim.clip_norm = 1.0  # largest global gradient norm
    optim.warmup_steps = 100
    optim.schedule = "linear"  # or "cosine", "constant", "two_stage" (b1.58)
    optim.final_ratio = 0.0  # learning rate at the end / peak
    optim.second_stage_ratio = 2 / 3  # two_stage: peak of the second half / first
    optim.accumulation_steps = 1  # micro-batches per step

    config.tuner = tuner = ConfigDict()  # see vaani_jax/tuner.py
    tuner.interval = 10  # steps between adjustments
    tuner.probe_share = 0.05  # of the run, at most, for the learning-rate range test
    tuner.probe_steps = 100  # of the range test, at most
    tuner.probe_steps_min = 20  # fewer than these: no range test
    tuner.probe_low = 1e-5  # learning rate that it begins with
    tuner.probe_high = 1.0  # and ends with
    tuner.probe_drop = 0.5  # of the whole drop of its loss: where it is read
    tuner.probe_gain = 4.5  # peak / learning rate read
    tuner.probe_exponent = 1 / 3  # of the length of runs with a shorter test
    tuner.trust = 2.0  # a given learning rate this near the test's is kept
    tuner.cut = 0.7  # factor on the learning rate at a sign of instability
    tuner.cooldown = 50  # steps between cuts
    tuner.recovery = 1.1  # factor per calm interval, back up to 1
    tuner.factor_min = 0.1  # lowest factor on the schedule
    tuner.overfit_rise = 0.02  # of the validation loss, twice running: cut for good
    tuner.skip_ratio = 10.0  # gradient norm / usual: the step is skipped
    tuner.update_skip_ratio = 20.0  # update norm / usual: likewise
    tuner.update_ratio = 5.0  # update norm / usual: shrunk to it
    tuner.patience = 30  # skipped steps running before the run goes back
    tuner.spike_ratio = 4.0  # norm / usual: not calm
    tuner.rise_sigma = 4.0  # standard errors of the loss: it rises
    tuner.flip_ratio = 4.0  # codes flipped / usual: not calm
    tuner.diverged_share = 0.3  # of the progress, lost again: the run goes back
    tuner.diverged_floor = 0.2  # of the loss, the least rise for that
    tuner.diverged_ratio = 10.0  # loss / that of the first step: likewise
    tuner.rescue_cut = 0.5  # factor on the learning rate after that, for good
    tuner.rescues_max = 3  # without a new lowest loss in between
    tuner.clip_percentile = 90.0  # of past gradient norms
    tuner.clip_margin = 1.5  # clipping threshold / percentile
    tuner.clip_range = 10.0  # how far below optim.clip_norm it may come, a factor
    tuner.warmup_fast = 1.5  # speed of the warm-up once calm
    tuner.warmup_slow = 0.25  # its speed at steps that are not
    tuner.warmup_calm = 20  # calm steps before it speeds up
    tuner.threshold_rate = 1.15  # largest factor on a ternary threshold per interval
    tuner.threshold_min = 0.02  # its bounds, in units of mean|W|
    tuner.threshold_max = 5.0
    tuner.band_margin = 0.25  # share of the sparsity band left at either edge
    tuner.momentum_min = 0.9  # bounds of the activation range's momentum
    tuner.momentum_max = 0.999
    tuner.momentum_steps = 10.0  # calm steps after which half of the past is kept
    tuner.dead_band = 0.1  # least relative change of clipping and momentum

    config.data = data = ConfigDict()
    data.source = ""  # path, tiny_shakespeare, python; empty: by the path
    data.path = ""  # text file, folder or glob; empty: Tiny Shakespeare
    data.data_dir = ""  # download cache; empty: $VAANI_DATA_DIR, ~/.cache/vaani
    data.fallback = True  # no network: train on Python's sources; False: an error
    data.download_timeout = 10.0  # seconds
    data.download_attempts = 3
    data.tokenizer = "char"  # or "byte"
    data.tokenizer_file = ""  # a tokenizer.json of Hugging Face instead
    data.validation_fraction = 0.1  # the end of the text

    config.sample = sample = ConfigDict()
    sample.prompts = ("\n",)
    sample.max_new_tokens = 200
    sample.temperature = 0.8  # 0: greedy
    sample.top_k = 0  # 0: off
    sample.top_p = 1.0  # 1: off
    sample.min_p = 0.0  # 0: off

    return config.lock()
