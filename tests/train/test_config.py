"""One validated Config, from files and flags; the shipped files are what they say."""

import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from vaani_jax.cli.flags import config_from_flags, default_config, from_config_dict
from vaani_jax.data.config import DataConfig
from vaani_jax.data.corpus import make_tokenizer
from vaani_jax.data.sources import Corpus, load_corpus
from vaani_jax.errors import VaaniError
from vaani_jax.model.config import RENAMED
from vaani_jax.model.size import model_size
from vaani_jax.model.transformer import init_variables
from vaani_jax.settings import build, described, differences
from vaani_jax.train.config import RETIRED, Config, from_dict
from vaani_jax.train.schedules import Schedule

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.py"))
SMALL = str(ROOT / "configs" / "small.py")


@pytest.fixture(autouse=True)
def _repository_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))  # configs import their base


@pytest.fixture
def read():
    def read(*arguments: str) -> tuple[Config, str, str]:
        given = config_from_flags(list(arguments))
        return given.config, given.path, given.workdir

    return read


@pytest.fixture
def refusal(read):
    def refusal(*arguments: str) -> str:
        with pytest.raises(VaaniError) as caught:
            read(*arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refusal


def _base():
    return importlib.import_module("configs.base").get_config()


def _keys(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _file(folder, body):
    path = folder / "mine.py"
    path.write_text(
        "from configs import base\n\n\ndef get_config():\n"
        f"    config = base.get_config()\n    {body}\n    return config\n"
    )
    return f"--config={path}"


def test_base_has_every_key_with_its_default():
    # And takes those of earlier versions, which have no value of their own.
    keys = set(_keys(Config().to_dict())) | set(RENAMED) | set(RETIRED)
    assert set(_keys(_base().to_dict())) == keys
    assert differences(_base().to_dict(), Config().to_dict()) == {}
    assert from_config_dict(_base()) == Config()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_loads_and_says_its_command(read, file):
    config, path, workdir = read(f"--config={file}")
    assert (path, workdir) == (str(file), "")
    assert (config == Config()) == (file.stem == "base")
    if file.stem != "base":
        assert f"python train.py --config=configs/{file.name}" in file.read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_to_dict_and_json_are_the_identity(read, file):
    config, _, _ = read(f"--config={file}", "--config.sample.prompts=('é', 'b')")
    again = from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.sample.prompts == ("é", "b")
    assert hash(again) == hash(config)


def _parameters(model, vocab_size):
    """Counts a Llama block with two sub-norms, by hand."""
    dim, ffn = model.dim, model.ffn_dim
    matrices = 4 * dim * dim + 3 * dim * ffn
    norms = 2 * dim + dim + ffn
    return model.n_layers * (matrices + norms) + vocab_size * dim + dim


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"),
    [("small", 65, 0.765), ("medium", 65, 10.7), ("large", 256, None)],
)
def test_sizes_are_those_of_the_arrays(read, name, vocab_size, millions):
    """Against the model itself and a count by hand; nothing is allocated."""
    model = read(f"--config={ROOT}/configs/{name}.py")[0].vaani
    model = model.changed(vocab_size=vocab_size)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    arrays = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    by_hand = _parameters(model.architecture, vocab_size)
    assert model_size(model).parameters == arrays == by_hand
    if millions is not None:
        assert arrays / 1e6 == pytest.approx(millions, rel=5e-3)


LARGE = {
    # dim, layers, heads, key-value heads, ffn, context, vocabulary; sequences; rate
    "b700m": ((1536, 24, 24, 24, 4096, 2048, 32_000), 512, 1.5e-3, 0.729e9),
    "b1_3b": ((2048, 24, 32, 32, 5460, 2048, 32_000), 512, 1.2e-3, 1.27e9),
    "b3b": ((3200, 26, 32, 32, 8640, 2048, 32_000), 512, 1.2e-3, 3.32e9),
    "b2b4t": ((2560, 30, 20, 5, 6912, 4096, 128_256), 256, 1.2e-3, 2.41e9),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_ones_have_the_shapes_and_schedules_of_their_papers(read, name):
    shape, batch_size, peak, parameters = LARGE[name]
    config = read(f"--config={ROOT}/configs/{name}.py")[0]
    model, optim = config.model, config.optim
    rounding, execution = config.quantization, config.execution
    assert shape == (
        model.dim,
        model.n_layers,
        model.n_heads,
        model.kv_heads,
        model.ffn_dim,
        model.max_seq_len,
        model.vocab_size,
    )
    dim, layers, heads, kv_heads, ffn, context, vocab_size = shape
    matrices = 2 * dim * dim * (1 + kv_heads / heads) + 3 * dim * ffn
    norms = 3 * dim + ffn
    size = model_size(config.vaani)
    assert size.parameters == layers * (matrices + norms) + vocab_size * dim + dim
    assert size.ternary == layers * matrices
    assert size.parameters == pytest.approx(parameters, rel=0.005)
    assert model.activation == ("relu2" if name == "b2b4t" else "swiglu")
    assert model.rope_theta == (5e5 if name == "b2b4t" else 1e4)
    assert model.tie_embeddings
    assert model.sub_norms
    assert rounding.quantize
    assert not rounding.ternary_head
    assert rounding.dtype == "bfloat16"
    assert execution.scan_layers
    assert execution.remat

    assert config.batch_size == batch_size
    assert batch_size * context == 2**20
    assert config.num_steps * 2**20 == pytest.approx(100e9, rel=1e-5)
    assert batch_size % optim.accumulation_steps == 0
    assert not config.use_tuner
    assert (optim.name, optim.beta1, optim.beta2) == ("adamw", 0.9, 0.95)
    schedule = Schedule(optim, config.learning_rate, config.num_steps)
    half = (config.num_steps + 1) // 2
    rates = [float(schedule.learning_rate(jnp.int32(s))) for s in (374, half - 1, half)]
    assert rates[0] == pytest.approx(peak)
    assert rates[2] / rates[1] == pytest.approx(2 / 3, rel=1e-3)
    decays = [float(schedule.weight_decay(s)) for s in (half - 1, half)]
    assert decays == [pytest.approx(0.1), 0.0]


@pytest.mark.parametrize("name", LARGE)
def test_large_ones_need_a_text_and_a_tokenizer(read, name, tmp_path, monkeypatch):
    """They don't fall back on Tiny Shakespeare, or on its characters."""
    config = read(f"--config={ROOT}/configs/{name}.py")[0]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VaaniError, match="corpus"):
        load_corpus(config.data)
    with pytest.raises(VaaniError, match=r"tokenizer\.json"):
        make_tokenizer(config.data, Corpus.of("text", "here"))


def test_small_keeps_to_its_budget(read):
    config = read(f"--config={SMALL}")[0]
    size = model_size(config.vaani.changed(vocab_size=65))
    assert size.parameters <= 800_000
    assert config.num_steps == 2000
    assert (config.batch_size, config.model.max_seq_len) == (12, 64)
    assert config.quantization.quantize


def test_flags_override_the_file(read):
    config, path, workdir = read(
        "--config",
        SMALL,
        "--workdir=runs/x",
        "--config.model.dim=64",
        "--config.learning_rate=1",
        "--config.data.fallback=false",
        "--config.optim.schedule=cosine",
    )
    assert (path, workdir) == (SMALL, "runs/x")
    found = differences(read(f"--config={SMALL}")[0].to_dict(), config.to_dict())
    assert found == {
        "data.fallback": (True, False),
        "learning_rate": (0.012, 1.0),
        "model.dim": (128, 64),
        "optim.schedule": ("linear", "cosine"),
    }
    assert isinstance(config.learning_rate, float)


def test_a_learning_rate_is_a_number_or_auto(read):
    for flag, value in (("auto", "auto"), ("5e-3", 5e-3), ("1", 1.0)):
        config = read(f"--config={SMALL}", f"--config.learning_rate={flag}")[0]
        assert config.learning_rate == value
        assert from_dict(config.to_dict()) == config
    assert Config().learning_rate == "auto"
    with pytest.raises(VaaniError, match="found by the tuner"):
        from_dict({"use_tuner": False})


def test_a_sparsity_band(read):
    flags = [f"--config.target_sparsity_{k}" for k in ("min=0.3", "max=0.4")]
    config = read(f"--config={SMALL}", *flags)[0]
    assert config.sparsity_band == (0.3, 0.4)
    assert Config().sparsity_band is None
    for low, high in ((0.4, 0.3), (0.0, 0.3), (0.5, 1.0)):
        with pytest.raises(VaaniError, match="0 < target_sparsity_min"):
            from_dict({"target_sparsity_min": low, "target_sparsity_max": high})
    with pytest.raises(VaaniError, match="need use_tuner"):
        from_dict(
            {
                "target_sparsity_min": 0.3,
                "target_sparsity_max": 0.4,
                "use_tuner": False,
                "learning_rate": 1e-3,
            }
        )


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.model.dimm=3", "model.dimm; did you mean model.dim?"),
        ("--config.batch_sise=3", "batch_sise; did you mean batch_size?"),
        ("--config.qqq=3", "unknown config key qqq"),
        ("--config.model.dim=big", "config.model.dim=big"),
        ("--config.model.dim=3.5", "config.model.dim=3.5"),
        ("--config.quantization.quantize=maybe", "config.quantization.quantize=maybe"),
        ("--config.optim.name=sgd", "optim.name is 'sgd': it must be one of adamw"),
        ("--config.batch_size=0", "batch_size is 0"),
        ("--config.seed=-1", "seed is -1"),
        ("--config.optim.accumulation_steps=5", "no multiple of"),
        ("--config.model.dim=65", "model.dim = 65"),
        ("--config.data.validation_fraction=2", "data.validation_fraction"),
        ("--config.sample.top_p=0", "top-p"),
        ("--config.learning_rate=fast", "must be a number or 'auto'"),
        ("--config.learning_rate=0", "learning_rate is 0"),
        ("--config.target_sparsity_min=0.3", "set both"),
        ("--config.target_sparsity_max=much", "target_sparsity_max"),
        (
            "--config.tuner.skip_ratio=0.5",
            "tuner.skip_ratio is 0.5: it must be at least 1",
        ),
        ("--config.tuner.trust=0.5", "tuner.trust is no key any more"),
        ("--config.tuner.patience=3", "explosion.PATIENCE, 30, and can't be 3"),
        ("--wrokdir=x", "wrokdir"),
        ("--config.model.dim", "config.model.dim"),
        ("stuff", "unexpected argument 'stuff'"),
    ],
)
def test_a_wrong_flag_is_one_line(refusal, flag, words):
    assert words in refusal(f"--config={SMALL}", flag)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("config.batch_sise = 3", "batch_size"),
        ("config.model.dim = 'wide'", "dim"),
        ("config.unlock().mine = 3", "unknown config key mine"),
        ("config.unlock().model.dimm = 3", "model.dimm; did you mean model.dim?"),
        ("config.optim.name = 'sgd'", "optim.name"),
        ("config.model = 3", "model"),
        ("config.ignore_type(); config.model.dim = None", "model.dim is None"),
        ("config = {}", "ConfigDict"),
        ("x = (", "mine.py"),
    ],
)
def test_a_wrong_file_is_one_line(refusal, tmp_path, body, words):
    assert words in refusal(_file(tmp_path, body))


def test_a_missing_file_is_one_line(refusal, tmp_path):
    nothing = tmp_path / "nothing.py"
    nothing.write_text("x = 1\n")
    assert "get_config" in refusal(f"--config={nothing}")
    assert "no config file at configs/smal.py" in refusal("--config=configs/smal.py")
    assert "no config file" in refusal(f"--config={tmp_path}")
    assert "no config file" in refusal("--config")
    assert "--config=" in refusal("--workdir=x")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch_size": 1.5}, "batch_size is 1.5: it must be of type int"),
        ({"batch_size": True}, "batch_size"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"learning_rate": False}, "learning_rate"),
        ({"init_from": None}, "init_from"),
        ({"model": 3}, "'model' must hold keys"),
        ({"quantization": {"quantize": 1}}, "quantization.quantize"),
        ({"quantization": {"dtype": ["float32"]}}, "quantization.dtype"),
        ({"sample": {"prompts": "abc"}}, "sample.prompts"),
        ({"sample": {"prompts": ["abc", 3]}}, "sample.prompts"),
        ({"data": {"tokeniser": "char"}}, "did you mean data.tokenizer?"),
        ({"num_steps": 0, "num_epochs": 0}, "num_epochs"),
        ({"sample": {"max_new_tokens": 0}}, "sample.max_new_tokens"),
        ([], "must hold keys"),
    ],
    ids=str,
)
def test_from_dict_refuses(values, words):
    with pytest.raises(VaaniError) as caught:
        from_dict(values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["validation_fraction", "download_attempts", "download_timeout"]
)
def test_bad_data_config(name):
    with pytest.raises(VaaniError, match=name):
        build(DataConfig, {name: 0})


def test_only_a_config_dict_is_a_config():
    with pytest.raises(VaaniError, match="ConfigDict"):
        from_config_dict({"seed": 1})
    assert from_config_dict(ConfigDict({"seed": 1})) == Config(seed=1)


def test_differences_are_dotted_and_know_json():
    old = Config().to_dict()
    assert differences(old, json.loads(json.dumps(old))) == {}
    new = json.loads(json.dumps(Config(seed=3).to_dict()))
    new["model"]["dim"] = 8
    del new["optim"]["eps"]
    assert differences(old, new) == {
        "seed": (0, 3),
        "model.dim": (128, 8),
        "optim.eps": (1e-8, None),
    }


@pytest.mark.parametrize("dashes", ["-", "--"])
def test_a_key_works_without_its_section(dashes):
    """As in the original, whose config had none."""
    flags = [f"{dashes}config.dim=96", f"{dashes}config.threshold=0.7"]
    config = config_from_flags([f"--config={SMALL}", *flags]).config
    assert (config.model.dim, config.quantization.threshold) == (96, 0.7)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_every_old_name_works_in_files_and_flags(old, new, read, tmp_path, capsys):
    default = {name: value for name, value, _ in described(Config())}[new]
    others = {"remat_save": "products", "weight_scale": "least_squares"}
    others |= {"weight_granularity": "channel", "activation_tracking": "ema"}
    others |= {"dtype": "bfloat16", "operands": "int8", "wire": "int8"}
    others |= {"attention": "library"}
    name = new.rpartition(".")[2]
    value = (not default) if isinstance(default, bool) else others.get(name, 0.75)
    by_file = read(_file(tmp_path, f"config.{old} = {value!r}"))[0]
    said = capsys.readouterr().err
    assert said == f"{old} is called {new} now\n"
    by_flag = read("--config=base", f"--config.{old}={value}")[0]
    assert capsys.readouterr().err == said
    found = {name: value for name, value, _ in described(by_flag)}
    assert found[new] == value
    file = {name: value for name, value, _ in described(by_file)}
    assert file[new] == value


def test_a_key_that_is_a_constant_now_may_have_its_value(read, tmp_path, capsys):
    plain = read("--config=base")[0]
    for name, (value, place) in RETIRED.items():
        assert read(_file(tmp_path, f"config.{name} = {value!r}"))[0] == plain
        assert capsys.readouterr().err.endswith(f"it is the constant {place}\n")
    assert len(RETIRED) == 34
    assert read("--config=base", "--config.tuner.cut=0.7")[0] == plain


def test_a_shipped_config_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = config_from_flags(["--config", "small"])
    assert by_name.config == config_from_flags([f"--config={SMALL}"]).config
    assert config_from_flags(["--config=configs/small.py"]).config == by_name.config


def test_every_key_has_a_text_and_is_in_the_base_config():
    keys = {dotted: text for dotted, _, text in described(Config())}
    assert all(keys.values())
    assert len(keys) > 60
    assert from_config_dict(default_config()) == Config()
