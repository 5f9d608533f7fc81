"""Loss on held-out text, for the commands that measure it."""

from typing import Any

from vaani_jax.cli.output import notify
from vaani_jax.errors import VaaniError
from vaani_jax.paths import local


def held_out(model: Any, data: str = "") -> Any:
    """The validation part of the text of a model's training, or all of another."""
    from vaani_jax.data.config import DataConfig
    from vaani_jax.data.corpus import Split, encoded, split_tokens
    from vaani_jax.data.sources import load_corpus
    from vaani_jax.settings import build

    seq_len = model.architecture.max_seq_len
    metadata = model.metadata
    trained_on = metadata and metadata.corpus
    if data:
        corpus = load_corpus(DataConfig(path=str(local(data, "--data"))), notify)
        if trained_on and corpus.sha256 == trained_on["sha256"]:
            notify(f"{data} is the text of the training: its held-out part is measured")
            config = build(DataConfig, metadata.run["data"], "data.")
            return _noted(split_tokens(config, corpus, model.tokenizer, seq_len))
        found = encoded(model.tokenizer, corpus.text)
        ids = found.ids
        if len(ids) < seq_len + 1:
            raise VaaniError(
                f"{data} has {len(ids):,} tokens, fewer than one window of"
                f" max_seq_len + 1 = {seq_len + 1}: take a longer text"
            )
        return _noted(Split(ids[:0], ids, found.lost, found.ends))
    if trained_on is None:
        raise VaaniError(
            "an imported model has no text of its own: name one with --data FILE"
        )
    config = build(DataConfig, metadata.run["data"], "data.")
    moved = (
        "bring the text back, or say with --data where it is now: it is known by its"
        " content, and its held-out part is measured"
    )
    try:
        corpus = load_corpus(config, notify)
    except VaaniError as error:
        raise VaaniError(f"{error}; {moved}") from None
    if corpus.sha256 != trained_on["sha256"]:
        raise VaaniError(
            f"the run was trained on {trained_on['source']}, which is not"
            f" {corpus.source} as it is now: {moved}"
        )
    return _noted(split_tokens(config, corpus, model.tokenizer, seq_len))


def _noted(split: Any) -> Any:
    """The same; a tokenizer that loses text is worth a line."""
    from vaani_jax.data.corpus import lost_note

    if note := lost_note(split.lost):
        notify(f"note: {note}")
    return split


def measured(model: Any, split: Any) -> Any:
    import jax

    from vaani_jax.evaluate.loss import make_eval_step, validation_set

    return validation_set(model.architecture, split, model.tokenizer).evaluate(
        jax.jit(make_eval_step(model.module)), model.variables
    )
