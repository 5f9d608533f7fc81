"""Models of ours and of the reference, for the tests of exports and imports."""

import json
import os
import pathlib
import warnings

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # eager: compiling would take minutes

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from vaani_jax.evaluate.loss import ValidationSet, make_eval_step
from vaani_jax.inference.generate import generate
from vaani_jax.inference.model import load
from vaani_jax.inference.sampling import SamplerConfig
from vaani_jax.interop import tokenizers as tokenizer_files
from vaani_jax.interop.formats import hf
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.quant.packed import pack_quarters
from vaani_jax.runs.checkpoints import Checkpoints
from vaani_jax.runs.metadata import Metadata
from vaani_jax.text.tokenizers import CharTokenizer

TEXT = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\n"
    "All:\nSpeak, speak.\n\tThe naïve café — 'twas \\x41 ▁ {ok}; über €5!\n"
) * 12


CHARACTERS = CharTokenizer.from_text(TEXT)


SMALL = Vaani().changed(
    vocab_size=CHARACTERS.vocab_size,
    dim=64,
    n_layers=2,
    n_heads=4,
    ffn_dim=96,
    max_seq_len=64,
    init_std=0.3,
)


notify = lambda line: None  # noqa: E731


def random_variables(module, seed=0):
    """Weights of a shape that training gives: norms and biases off their start."""
    variables = init_variables(module, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def moved(path, leaf):
        if path[-1].key == "bias":
            return leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            factors = np.exp(0.3 * rng.standard_normal(leaf.shape))
            return leaf * factors.astype(np.float32)
        return leaf

    return jax.tree_util.tree_map_with_path(moved, variables)


def make_run(workdir, module, *, tokenizer=CHARACTERS, variables=None):
    """A workdir as training leaves it, as far as loading a model goes."""
    variables = variables or random_variables(module)
    meta = Metadata.of(module, tokenizer.to_json()).to_json()
    checkpoints = Checkpoints(pathlib.Path(workdir) / "checkpoints")
    checkpoints.save(1, {"model": variables}, meta)
    checkpoints.wait()
    checkpoints.close()
    return pathlib.Path(workdir)


def save_theirs(folder, model):
    """Saves a model of transformers with our character tokenizer beside it."""
    model.save_pretrained(folder)
    serialized, settings = tokenizer_files.to_hf(CHARACTERS)
    (folder / "tokenizer.json").write_text(serialized)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def their_llama(folder, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": CHARACTERS.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    save_theirs(folder, model)
    return model


def their_falcon(folder):
    """As tiiuae/Falcon-E and onebitllms: a Llama, packed, class "bitlinear"."""
    from safetensors.numpy import load_file, save_file

    their_llama(folder)
    path = folder / hf.SINGLE
    weights = load_file(path)
    for name in [n for n in weights if "_proj" in n]:
        w = weights.pop(name)
        gamma = np.abs(w).mean()
        weights[name] = pack_quarters(
            np.clip(np.round(w / gamma), -1, 1).astype(np.int8)
        )
        weights[f"{name}_scale"] = np.asarray([1 / gamma], np.float32)
    save_file(weights, path, metadata={"format": "pt"})
    edit_config(
        folder,
        quantization_config={
            "quant_method": "bitnet",
            "modules_to_not_convert": ["lm_head"],
        },
    )


def transformers_model(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )
    return model.eval()


def agreement(workdir, folder):
    """How a folder in transformers compares with a run here."""
    model = load(workdir, notify=notify)
    theirs = transformers_model(folder)
    assert sum(p.dtype == torch.float32 for p in theirs.parameters())
    ids = model.tokenizer.encode(TEXT)
    length = model.architecture.max_seq_len
    held = ValidationSet(ids, model.tokenizer, seq_len=length, batch_size=8)
    ours = held.evaluate(jax.jit(make_eval_step(model.module)), model.variables)
    assert ours is not None
    windows = np.concatenate([w[weights > 0] for w, weights in held.batches])
    inputs = torch.tensor(windows[:, :-1], dtype=torch.long)
    with torch.no_grad():
        logits = theirs(inputs).logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).double(),
        torch.tensor(windows[:, 1:].reshape(-1), dtype=torch.long),
    )
    expected = jax.jit(model.module.apply)(
        model.variables, jnp.asarray(windows[:, :-1])
    )
    difference = np.abs(np.asarray(expected) - logits.numpy())
    prompts = np.stack([ids[7 * start : 7 * start + 12] for start in range(10)])
    mine = generate(
        model,
        list(prompts),
        max_new_tokens=32,
        sampler=SamplerConfig(temperature=0.0),
    )
    with torch.no_grad():
        output = theirs.generate(
            torch.tensor(prompts, dtype=torch.long),
            attention_mask=torch.ones(prompts.shape, dtype=torch.long),
            do_sample=False,
            max_new_tokens=32,
            pad_token_id=0,
        )
    same = int((output[:, prompts.shape[1] :].numpy() == mine).all(axis=1).sum())
    # A rounding of 8 bits that falls the other way moves the logits of its position
    # and of those after it; count the positions, so that no error hides behind them.
    flipped = float(np.mean(difference.max(axis=-1) > 1e-3))
    return {
        "loss": abs(ours.loss - float(loss)),
        "median": float(np.median(difference)),
        "same": same,
        "flipped": flipped,
        "spread": float(np.asarray(expected).std()),
    }


def leaves(tree):
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def assert_same_arrays(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
