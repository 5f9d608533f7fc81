"""Models of ours and of the reference, for the tests of exports and imports."""

import json
import os
import pathlib

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # eager: compiling would take minutes

import jax
import numpy as np
import torch
import transformers

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
    """Weights of a shape that training gives: norms and embedding off their start."""
    variables = init_variables(module, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def moved(path, leaf):
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
