"""One of each is added from outside the package, in under ten lines, and used.

`docs/extending.md` shows the same, with the file and the row of each.
"""

import io
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from rich.console import Console

from vaani_jax import cli
from vaani_jax.data.config import DataConfig
from vaani_jax.data.corpus import make_tokenizer, split_tokens
from vaani_jax.data.sources import SOURCES, Corpus, load_corpus
from vaani_jax.devices.mesh import make_mesh
from vaani_jax.errors import VaaniError
from vaani_jax.inference.sampling import FILTERS, Filter, SamplerConfig, sample_token
from vaani_jax.interop.convert import _check_holdable as check_holdable
from vaani_jax.interop.convert import export_model
from vaani_jax.interop.formats import FORMATS, Format
from vaani_jax.interop.formats.source import put
from vaani_jax.interop.names import tensors
from vaani_jax.model.activations import ACTIVATIONS
from vaani_jax.model.families import FAMILIES, Family
from vaani_jax.model.norm import NORMS, Norm
from vaani_jax.model.rotary import SCALINGS, Scaling, rotary_angles
from vaani_jax.model.transformer import Vaani
from vaani_jax.runs.curves import plot_curves
from vaani_jax.runs.metrics import METRICS, Metric, read_rows
from vaani_jax.text.chat import TEMPLATES, find_template
from vaani_jax.text.tokenizers import TOKENIZERS, ByteTokenizer, Kind, from_json
from vaani_jax.train import display as display_module
from vaani_jax.train.config import from_dict
from vaani_jax.train.display import Display
from vaani_jax.train.journal import read_events
from vaani_jax.train.loop import train
from vaani_jax.train.optimizers import OPTIMIZERS, Optimizer
from vaani_jax.train.program import make_program
from vaani_jax.train.schedules import SCHEDULES, Shape
from vaani_jax.train.tuner import RULES
from vaani_jax.train.tuner.rule import Change, Rule

TEXT = "To be, or not to be, that is the question:\n" * 40
MODEL = {"dim": 16, "n_layers": 1, "n_heads": 1, "max_seq_len": 16, "vocab_size": 8}


def trained(model=(), **optim):
    """Parameters before and after a step of a toy run with these keys; its metrics."""
    config = from_dict(
        {
            "batch_size": 2,
            "use_tuner": False,
            "learning_rate": 0.01,
            "model": MODEL | dict(model),
            "optim": {"warmup_steps": 0, "clip_norm": 1e6, **optim},
        }
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = make_program(config, mesh, 4)
        state = program.first_state()
        before = jax.device_get(state.params)
        tokens = np.arange(34, dtype=np.int32).reshape(2, 17) % 8
        state, metrics = program.train_step(state, jax.device_put(tokens))
    return before, jax.device_get(state.params), jax.device_get(metrics)


def test_an_activation_trains_a_step(monkeypatch):
    def sine(gate, up):
        return jnp.sin(gate) * up

    monkeypatch.setitem(ACTIVATIONS, "sine", sine)
    _, after, metrics = trained(model={"activation": "sine"})
    _, _, other = trained()
    assert np.isfinite(metrics["train/loss"])
    assert metrics["train/loss"] != other["train/loss"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_a_norm_trains_a_step(monkeypatch):
    class Halved(Norm):
        def __call__(self, x):
            return jnp.einsum("...d,d->...d", x / 2, self.weight(x.shape[-1]))

    monkeypatch.setitem(NORMS, "halved", Halved)
    _, after, metrics = trained(model={"norm": "halved"})
    _, _, other = trained()
    assert np.isfinite(metrics["train/loss"])
    assert metrics["train/loss"] != other["train/loss"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_a_family_of_blocks_trains_a_step(monkeypatch):
    monkeypatch.setitem(FAMILIES, "both", Family(sub_norms=True, qk_norm=True))
    before, after, metrics = trained(model={"family": "both"})
    assert np.isfinite(metrics["train/loss"])
    heads = [tree["layers_0"]["attn"]["q_norm"]["scale"] for tree in (before, after)]
    assert (heads[0] != heads[1]).any()
    assert "sub_norm" in after["layers_0"]["ffn"]


def test_a_rotary_scaling_trains_a_step(monkeypatch):
    def slower(frequency, rotary):
        return frequency / rotary.factor**0.5

    monkeypatch.setitem(SCALINGS, "slower", Scaling(slower, fields=("factor",)))
    keys: dict[str, Any] = {"rope_scaling": "slower", "rope_factor": 9.0}
    _, _, metrics = trained(model=keys)
    _, _, other = trained()
    assert np.isfinite(metrics["train/loss"])
    assert metrics["train/loss"] != other["train/loss"]
    module = Vaani().changed(**MODEL, **keys)
    rotary = module.architecture.rotary
    np.testing.assert_allclose(rotary_angles(4, rotary)[0][3, 0], np.cos(1), rtol=1e-6)
    with pytest.raises(VaaniError, match="rotary scaling slower"):
        check_holdable(module)


def test_a_schedule_and_an_optimizer_make_a_program(monkeypatch):
    def sixth(config, done, second_half):
        return (1 - done) / 6

    def signs(config, learning_rate, weight_decay):
        return optax.sign_sgd(learning_rate)

    monkeypatch.setitem(SCHEDULES, "sixth", Shape(sixth))
    monkeypatch.setitem(OPTIMIZERS, "signs", Optimizer(signs, 1e-3))
    before, after, metrics = trained(name="signs", schedule="sixth")
    assert metrics["train/learning_rate"] == pytest.approx(0.01 / 6)
    moved = [
        np.abs(a - b)
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    ]
    assert max(m.max() for m in moved) == pytest.approx(0.01 / 6, rel=1e-3)


def test_a_filter_of_samplers_filters(monkeypatch):
    def odd_only(logits, value):
        return jnp.where(jnp.arange(logits.shape[-1]) % 2 == 1, logits, -jnp.inf)

    row = Filter(odd_only, 0, lambda value: value in (0, 1), "0 or 1")
    monkeypatch.setitem(FILTERS, "odd_only", row)
    sampler = SamplerConfig(others=(("odd_only", 1),))
    drawn = sample_token(jnp.zeros((64, 8)), jax.random.key(0), sampler)
    assert set(np.asarray(drawn)) == {1, 3, 5, 7}
    with pytest.raises(VaaniError, match="odd-only must be 0 or 1"):
        SamplerConfig(others=(("odd_only", 2),))


def test_a_rule_of_the_tuner_acts_and_is_told(monkeypatch, tmp_path):
    class Halving(Rule):
        def init(self):
            return jnp.float32(1)

        def factor(self, state):
            return state

        def adjust(self, state, memory, seen):
            return state / 2, Change(state, state / 2, memory.count)

        def tell(self, step, change, journal):
            journal.record(
                step, "half", f"{change.cause} steps", change.old, change.new
            )

    monkeypatch.setitem(RULES, "halving", Halving)
    (tmp_path / "text.txt").write_text(TEXT)
    config = {
        "num_steps": 8,
        "batch_size": 2,
        "learning_rate": 0.01,
        "log_interval": 1,
        "tuner": {"interval": 2},
        "model": {key: MODEL[key] for key in MODEL if key != "vocab_size"},
        "optim": {"warmup_steps": 0, "schedule": "constant"},
        "data": {"path": str(tmp_path / "text.txt")},
        "sample_interval": 0,
    }
    train(from_dict(config), tmp_path / "run", console=Console(file=io.StringIO()))
    events = read_events(tmp_path / "run" / "tuner.jsonl")
    halves = [event for event in events if event["setting"] == "half"]
    assert [(e["step"], e["new"]) for e in halves] == [
        (2, 0.5),
        (4, 0.25),
        (6, 0.125),
        (8, 0.0625),
    ]
    assert halves[0]["cause"] == "2 steps"
    rows = list(read_rows(tmp_path / "run" / "metrics.jsonl"))
    rates = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    assert rates == pytest.approx(
        [0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025, 0.00125, 0.00125]
    )
    # Without the rule the run is refused, and nothing of it is touched.
    monkeypatch.delitem(RULES, "halving")
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(VaaniError, match=r"other rules of the tuner \(halving\)"):
        train(from_dict(config), tmp_path / "run", console=Console(file=io.StringIO()))
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == kept


class Lower(ByteTokenizer):
    def encode(self, text):
        return super().encode(text.lower())

    def to_json(self):
        return {"type": "lower"}


def test_a_tokenizer_and_a_source_feed_a_corpus(monkeypatch):
    kind = Kind(lambda description: Lower(), lambda text: Lower())
    monkeypatch.setitem(TOKENIZERS, "lower", kind)
    monkeypatch.setitem(
        SOURCES, "hamlet", lambda config, notify: Corpus.of(TEXT, "Hamlet")
    )
    config = DataConfig(source="hamlet", tokenizer="lower")
    corpus = load_corpus(config, pytest.fail)
    tokenizer = make_tokenizer(config, corpus)
    split = split_tokens(config, corpus, tokenizer, 16)
    assert tokenizer.decode(split.train).startswith("to be, or not")
    assert isinstance(from_json(tokenizer.to_json()), Lower)


def test_a_template_writes_a_chat(monkeypatch):
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    monkeypatch.setitem(TEMPLATES, "play", source)
    template = find_template(ByteTokenizer(), "play")
    chat = [{"role": "ROMEO", "content": "Ay me."}]
    assert template.render(chat) == "ROMEO: Ay me.\n"


def test_a_metric_shows_in_the_line_and_the_curves(monkeypatch, tmp_path):
    row = Metric("mean gate", panel="gates", format="{:.1f}", console="gate {}")
    monkeypatch.setitem(METRICS, "train/mean_gate", row)
    values = {"train/loss": 1.0, "train/mean_gate": 0.25}
    monkeypatch.setattr(display_module, "LINE_SECONDS", 0.0)
    file = io.StringIO()
    with Display(Console(file=file, force_terminal=False), 10, 0) as display:
        display.update(5, values, 0.0)
    assert "gate 0.2" in file.getvalue()
    heights = []
    for name, kept in (("with", values), ("without", {"train/loss": 1.0})):
        rows = [{"step": step, **kept} for step in (1, 2)]
        plot_curves(rows, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            heights.append(image.size[1])
    assert heights[0] > heights[1]  # a panel of its own, in a further row


def test_a_format_exports(monkeypatch, tmp_path):
    def write(path, module, tokenizer, take, options):
        found = tensors(module.architecture)
        arrays = {"/".join(t.path): take(t)[0] for t in found}
        with path.open("wb") as file:
            np.savez(file, **arrays)

    def read(path, like, tokenizer):
        params: dict = {}
        for key, array in np.load(path).items():
            put(params, tuple(key.split("/")), jnp.asarray(array))
        return like, {"params": params, "quant": {}}

    row = Format(lambda *about: None, write, read, folder=False)
    monkeypatch.setitem(FORMATS, "npz", row)
    (tmp_path / "text.txt").write_text(TEXT)
    config = {
        "num_steps": 2,
        "batch_size": 2,
        "use_tuner": False,
        "learning_rate": 0.01,
        "model": {**MODEL, "vocab_size": 0, "quantize": False},
        "optim": {"warmup_steps": 1},
        "data": {"path": str(tmp_path / "text.txt")},
    }
    train(from_dict(config), tmp_path / "run", console=Console(file=io.StringIO()))
    found = export_model(
        tmp_path / "run", tmp_path / "model.npz", target="npz", notify=print
    )
    assert found.largest == 0
    assert "embedding" in " ".join(np.load(tmp_path / "model.npz"))
    with pytest.raises(VaaniError, match="must be one of hf, hf-packed, gguf, npz"):
        export_model(tmp_path / "run", tmp_path / "m", target="onnx")


def test_a_command_runs(monkeypatch, capsys):
    module: Any = types.ModuleType("hello")
    module.HELP = "Greet somebody."
    module.add_arguments = lambda parser: parser.add_argument("--name")
    module.run = lambda options: print(f"hello {options.name}") or 0
    monkeypatch.setitem(sys.modules, "hello", module)
    monkeypatch.setitem(cli.COMMANDS, "hello", "hello")
    assert cli.main(["hello", "--name=Vaani"]) == 0
    assert capsys.readouterr().out == "hello Vaani\n"
