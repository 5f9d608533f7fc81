"""What a run starts from: text and tokenizer, an earlier session, or other weights."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vaani_jax.data.batches import Batches
from vaani_jax.data.config import DataConfig
from vaani_jax.data.corpus import (
    held_out_note,
    lost_note,
    make_tokenizer,
    split_tokens,
)
from vaani_jax.data.sources import Corpus, load_corpus
from vaani_jax.devices.mesh import batch_parts, place
from vaani_jax.errors import VaaniError
from vaani_jax.evaluate.loss import ValidationSet, validation_set
from vaani_jax.inference.model import Model, load
from vaani_jax.model.packing import unpacked_variables
from vaani_jax.model.transformer import stack_layers, unrolled
from vaani_jax.paths import local
from vaani_jax.runs.checkpoints import FLAT_TUNER, Checkpoints
from vaani_jax.runs.metadata import Metadata
from vaani_jax.runs.workdir import Workdir
from vaani_jax.settings import differences
from vaani_jax.text.tokenizers import Tokenizer, from_json, same_tokenizer
from vaani_jax.train.config import Config, config_of
from vaani_jax.train.program import Program, make_program
from vaani_jax.train.state import TrainState, from_items, to_items

Notify = Callable[[str], None]


# Keys that a resumed run may change. The state it resumes from fits whatever they are;
# three kinds still change what is computed from there on, and `_consequences` says so:
# the length, which the schedule follows; the intervals of evaluations, which the tuner
# sees; and what is saved when, which is what a rescue can go back to. Another mesh sums
# in another order, so that last bits differ; the rest changes nothing.
FREE_KEYS = (
    "num_steps",
    "num_epochs",
    "eval_interval",
    "eval_windows",
    "save_interval",
    "log_interval",
    "sample_interval",
    "keep_checkpoints",
    "data.source",
    "data.path",  # the corpus itself is compared instead
    "data.tokenizer_file",  # and the tokenizer itself
    "data.data_dir",
    "data.fallback",
    "data.download_timeout",
    "data.download_attempts",
    "mesh.",
    "execution.operands",
    "execution.wire",
    "sample.",
)


# What must be alike for weights to fit.
SHAPING_KEYS = (
    "vocab_size",
    "dim",
    "n_layers",
    "n_heads",
    "kv_heads",
    "head_size",
    "hidden_dim",
    "qk_norm",
    "attention_bias",
    "tie_embeddings",
    "activation",
    "norm",
)


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
      corpus: the text.
      tokenizer: that of the run, of the weights it starts from, or one made for it.
      train_tokens: length of the training part.
      batches: of the training part.
      validation: the held-out part.
      notes: what people should know of it.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    train_tokens: int
    batches: Batches
    validation: ValidationSet
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far earlier sessions came.

    Attributes:
      resumed: whether there were any.
      step: steps done.
      elapsed: seconds of training.
      best: the best evaluation, with its step; None before any.
      window: metrics of the steps since the last report.
      consequences: a line for each changed key that changes what is computed.
    """

    resumed: bool = False
    step: int = 0
    elapsed: float = 0.0
    best: dict[str, float] | None = None
    window: tuple[dict[str, Any], ...] = ()
    consequences: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Start:
    """All that a run starts from.

    Attributes:
      config: the run, with its vocabulary.
      workdir: of the run.
      mesh: the devices.
      data: what it reads.
      num_steps: its length.
      program: its compiled functions.
      checkpoints: open, for reading and writing.
      state: before the next step; the first step takes its memory.
      progress: of earlier sessions.
    """

    config: Config
    workdir: pathlib.Path
    mesh: Mesh
    data: Data
    num_steps: int
    program: Program
    checkpoints: Checkpoints
    state: TrainState
    progress: Progress


@contextlib.contextmanager
def starting(
    config: Config, workdir: pathlib.Path, mesh: Mesh, say: Notify
) -> Iterator[Start]:
    """Prepares a run, or an existing one to go on; its checkpoints are open inside.

    Args:
      config: the run.
      workdir: receives its checkpoints, or has them.
      mesh: the devices; it must be set.
      say: receives a line for what people should know.

    Raises:
      VaaniError: the config does not fit the text, the run or the weights.
    """
    corpus = load_corpus(config.data, say)
    checkpoints = Checkpoints(
        Workdir(workdir).checkpoints, keep=config.keep_checkpoints
    )
    with contextlib.closing(checkpoints):
        yield _start(config, workdir, mesh, corpus, checkpoints, say)


def _start(
    config: Config,
    workdir: pathlib.Path,
    mesh: Mesh,
    corpus: Corpus,
    checkpoints: Checkpoints,
    say: Notify,
) -> Start:
    if config.quantization.weight_scale == "stored":
        raise VaaniError(
            "quantization.weight_scale = stored is for imported models only: train"
            " with absmean"
        )
    found = _newest_meta(checkpoints)
    source = None
    if found is not None:
        tokenizer = from_json(found.tokenizer)
    elif config.init_from:
        source = load(config.init_from, notify=say)
        tokenizer = _tokenizer_of(source, config, say)
    else:
        tokenizer = make_tokenizer(config.data, corpus)
    config = _with_vocabulary(config, tokenizer)
    if found is not None:
        _check_fit(found, config, corpus, workdir)
        _check_tokenizer(found, config, workdir, say)
    data = _data(config, mesh, corpus, tokenizer)
    num_steps = _length(config, data)
    program = make_program(config, mesh, num_steps)
    restored = restore(program, checkpoints, say, set_aside=True)
    if restored is None:
        state, progress = first_state(config, program, source, say), Progress()
    else:
        step, state, meta = restored
        progress = Progress(
            resumed=True,
            step=step,
            elapsed=meta.elapsed_seconds,
            best=meta.best,
            window=meta.window,
            consequences=_consequences(config_of(meta), config, data),
        )
    return Start(
        config=config,
        workdir=workdir,
        mesh=mesh,
        data=data,
        num_steps=num_steps,
        program=program,
        checkpoints=checkpoints,
        state=state,
        progress=progress,
    )


def _tokenizer_of(source: Model, config: Config, say: Notify) -> Tokenizer:
    """The tokenizer that weights were trained with, which the run takes over.

    Raises VaaniError where the config asks for another: ids would mean other tokens.
    """
    tokenizer, data = source.tokenizer, config.data
    description = tokenizer.to_json()
    mend = (
        f"the weights in {config.init_from} were trained with their own tokenizer, for"
        " which their embedding stands: leave"
    )
    if data.tokenizer_file:
        other = make_tokenizer(data, None)
        if not same_tokenizer(other.to_json(), description):
            raise VaaniError(
                f"data.tokenizer_file = {data.tokenizer_file} is another tokenizer:"
                f" {mend} the key out"
            )
    elif data.tokenizer not in (DataConfig().tokenizer, description["type"]):
        raise VaaniError(
            f"data.tokenizer is {data.tokenizer}, and that of the weights is"
            f" {description['type']}: {mend} the key out"
        )
    say(
        f"tokenizer: that of {config.init_from} ({description['type']},"
        f" {tokenizer.vocab_size:,} ids)"
    )
    return tokenizer


def _data(config: Config, mesh: Mesh, corpus: Corpus, tokenizer: Tokenizer) -> Data:
    seq_len = config.model.max_seq_len
    split = split_tokens(config.data, corpus, tokenizer, seq_len)
    return Data(
        corpus=corpus,
        tokenizer=tokenizer,
        train_tokens=len(split.train),
        batches=Batches(
            split.train,
            seq_len=seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
        ),
        validation=validation_set(
            config.model, split, tokenizer, batch_parts(mesh), config.eval_windows
        ),
        notes=tuple(
            filter(None, (lost_note(split.lost), held_out_note(config.data, corpus)))
        ),
    )


def _length(config: Config, data: Data) -> int:
    return config.num_steps or config.num_epochs * data.batches.steps_per_epoch


def _with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """Fills in a vocabulary size of 0; checks any other."""
    wanted = config.model.vocab_size
    if wanted == 0:
        model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
        return dataclasses.replace(config, model=model)
    if wanted < tokenizer.vocab_size:
        raise VaaniError(
            f"model.vocab_size = {wanted} is smaller than the tokenizer's"
            f" {tokenizer.vocab_size}: leave it at 0 to take the tokenizer's"
        )
    return config


# -- An existing run -------------------------------------------------------------------


def _newest_meta(checkpoints: Checkpoints) -> Metadata | None:
    """Metadata of the newest checkpoint whose metadata can be read."""
    for step in reversed(checkpoints.steps()):
        try:
            return Metadata.from_json(checkpoints.meta(step))
        except Exception:  # damaged: `restore` will say so
            continue
    return None


def _check_fit(
    meta: Metadata, config: Config, corpus: Corpus, workdir: pathlib.Path
) -> None:
    if meta.corpus is None:
        raise VaaniError(
            f"{workdir} holds an imported model: train from it with"
            f" --config.init_from={workdir} and another --workdir"
        )
    changed = {
        key: values
        for key, values in differences(
            # Through Config, so that keys younger than the run have a value.
            config_of(meta).to_dict(),
            config.to_dict(),
        ).items()
        if not key.startswith(FREE_KEYS)
    }
    if changed:
        listed = "; ".join(
            f"{key} is {old!r} there, {new!r} here"
            for key, (old, new) in changed.items()
        )
        raise VaaniError(
            f"the config does not fit the run in {workdir}: {listed}. Use the"
            " run's config, another --workdir, or --config.init_from="
            f"{workdir} in a new one to start from its weights"
        )
    if meta.corpus["sha256"] != corpus.sha256:
        raise VaaniError(
            f"the run in {workdir} was trained on {meta.corpus['source']}"
            f" ({meta.corpus['characters']:,} characters), this is another text:"
            f" {corpus.source} ({len(corpus.text):,} characters). Give it the same"
            " text, or use another --workdir"
        )


def _check_tokenizer(
    meta: Metadata, config: Config, workdir: pathlib.Path, say: Notify
) -> None:
    """Refuses another tokenizer than the run's; where its file lies is free."""
    before, now = config_of(meta).data.tokenizer_file, config.data.tokenizer_file
    if not now:
        if before:
            raise VaaniError(
                f"the run in {workdir} was trained with the tokenizer in {before}, and"
                " this config names none: set --config.data.tokenizer_file, or use"
                " another --workdir"
            )
        return
    path = local(now, "data.tokenizer_file")
    if before and not path.exists():
        say(f"{path} is not there: going on with the tokenizer that the run has saved")
        return
    if not same_tokenizer(make_tokenizer(config.data, None).to_json(), meta.tokenizer):
        raise VaaniError(
            f"the run in {workdir} was trained with another tokenizer than that in"
            f" {path}: give it the same one, or use another --workdir"
        )


def _consequences(old: Config, new: Config, data: Data) -> tuple[str, ...]:
    """What a resumed run computes differently, a line for each changed free key."""
    lines = []

    def compare(key: str, consequence: str) -> None:
        before, after = getattr(old, key), getattr(new, key)
        if before != after:
            lines.append(f"{key} was {before:,}, is {after:,} now: {consequence}")

    if _length(old, data) != _length(new, data):
        consequence = "the schedule from here on is that of the new length"
        compare("num_steps", consequence)
        if not old.num_steps and not new.num_steps:
            compare("num_epochs", consequence)
    held_out = data.validation.tokens // new.model.max_seq_len
    if min(old.eval_windows or held_out, held_out) != min(
        new.eval_windows or held_out, held_out
    ):
        compare("eval_windows", "losses of before and after are over other windows")
    if new.use_tuner:
        compare("eval_interval", "the tuner sees validation losses at other steps")
        rescues = "a rescue may go back to another step"
        compare("save_interval", rescues)
        compare("keep_checkpoints", rescues)
    return tuple(lines)


def restore(
    program: Program,
    checkpoints: Checkpoints,
    say: Notify,
    *,
    step: int | None = None,
    set_aside: bool = False,
) -> tuple[int, TrainState, Metadata] | None:
    """The state of a checkpoint, its step and its metadata.

    Args:
      program: of the run, on whatever mesh; the checkpoint may be of another.
      checkpoints, say, step, set_aside: see `Checkpoints.restore`.

    Returns:
      None where there are no checkpoints at all.

    Raises:
      VaaniError: nothing whole to read.
    """

    def target(meta: dict[str, Any]) -> dict[str, Any]:
        flat = meta["format"] in FLAT_TUNER
        if program.tuner is not None and not flat:
            _check_rules(meta, program.shapes.tuner.rules)
        return to_items(program.shapes, flat_tuner=flat)

    restored = checkpoints.restore(target, step=step, notify=say, set_aside=set_aside)
    if restored is None:
        return None
    state = from_items(restored.items, program.tuner)
    return restored.step, state, Metadata.from_json(restored.meta)


def _check_rules(meta: dict[str, Any], rules: dict[str, Any]) -> None:
    """Refuses a checkpoint of other rules, which would pass for a damaged one."""
    paths = meta["fingerprints"]["training"]
    saved = set(re.findall(r"^\['tuner'\]\.rules\['(.+?)'\]", "\n".join(paths), re.M))
    if other := sorted(saved ^ rules.keys()):
        raise VaaniError(
            f"the run was saved with other rules of the tuner ({', '.join(other)}): go"
            " on with the same ones, or start from its weights with --config.init_from"
        )


# -- Other weights ---------------------------------------------------------------------


def first_state(
    config: Config, program: Program, source: Model | None, say: Notify
) -> TrainState:
    """The state before the first step, with the weights of ``source`` if any."""
    state = program.first_state()
    if source is None:
        return state
    params = _fitting(config, source, state, say)
    params = jax.tree.map(
        lambda leaf, sharding: place(np.asarray(leaf), sharding),
        params,
        program.shardings.params,
    )
    state, _ = program.report_step(dataclasses.replace(state, params=params))
    say(f"starting from the weights of {config.init_from} (step {source.step})")
    return state


def _fitting(config: Config, source: Model, state: TrainState, say: Notify) -> Any:
    """The parameters of ``source`` in the shape of those of ``state``."""
    ours, theirs = config.model, source.architecture
    changed = [
        f"model.{key} is {getattr(theirs, key)!r} there, {getattr(ours, key)!r} here"
        for key in SHAPING_KEYS
        if getattr(theirs, key) != getattr(ours, key)
    ]
    if changed:
        raise VaaniError(
            f"the weights in {config.init_from} do not fit this config: "
            + "; ".join(changed)
        )
    params = source.params
    if source.packed:
        params = unpacked_variables(source.module, source.variables)[1]["params"]
        say("packed codes and scales become masters that quantize to them")
    if ours.sub_norms != theirs.sub_norms:
        if theirs.sub_norms:
            raise VaaniError(
                f"the weights in {config.init_from} have sub-norms: set"
                " --config.model.sub_norms=True"
            )
        first = unrolled(config.vaani, state.variables)[1]["params"]
        params = _with_missing(params, jax.tree.map(jnp.copy, first))
        say("sub-norms are added, as ones")
    if config.execution.scan_layers:
        params = stack_layers(params, ours.n_layers)
    return params


def _with_missing(tree: Any, defaults: Any) -> Any:
    """``tree``, with the branches that it lacks from ``defaults``."""
    if not isinstance(defaults, dict):
        return tree
    return {
        key: _with_missing(tree[key], default) if key in tree else default
        for key, default in defaults.items()
    }
