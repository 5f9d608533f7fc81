"""Special tokens: what opens a text, ends it, pads it, and how a chat is written.

Hugging Face spreads them over many files beside ``tokenizer.json``, and models fill in
some of these only. One reader puts them together, for training, generation, chat,
import and export alike:

* names of tokens: ``tokenizer_config.json``, else ``special_tokens_map.json``, else the
  ids of the next row;
* ids: ``generation_config.json``, else ``config.json``;
* further tokens: ``added_tokens_decoder`` of ``tokenizer_config.json``, else
  ``added_tokens.json``, for those that ``tokenizer.json`` lacks;
* chat templates: ``chat_template.jinja`` and the files of ``TEMPLATE_FOLDERS``, else
  ``tokenizer_config.json``.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any

from vaani_jax.errors import VaaniError
from vaani_jax.paths import read_json, read_small
from vaani_jax.words import shown

NAMES = (
    *("bos_token", "eos_token", "unk_token", "pad_token"),
    *("sep_token", "cls_token", "mask_token"),
)
# Lists of further special tokens: as transformers calls them up to version 4, and now.
FURTHER = ("additional_special_tokens", "extra_special_tokens")

TOKENIZER_CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
GENERATION = "generation_config.json"
CONFIG = "config.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
TEMPLATE_FOLDERS = ("chat_templates", "additional_chat_templates")
DEFAULT = "default"  # the name of the template that is used unless another is named


@dataclasses.dataclass(frozen=True)
class Special:
    """What files say of a tokenizer's special tokens.

    Attributes:
      names: texts of the tokens by their part ("eos_token").
      ids: ids by part, those that end a text being several at times.
      chat_template: source in Jinja, or several, as a list of objects with "name" and
        "template"; None where there is none. Never run here.
      generation: content of ``generation_config.json``; empty where there is none.
      further: texts of special tokens that have no part.
    """

    names: dict[str, str] = dataclasses.field(default_factory=dict)
    ids: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    chat_template: Any = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    further: tuple[str, ...] = ()

    @property
    def by_part(self) -> dict[str, Any]:
        """Texts of tokens by their part, as ``special_tokens_map.json`` holds them."""
        further = {FURTHER[0]: list(self.further)} if self.further else {}
        return {**self.names, **further}

    @property
    def templates(self) -> dict[str, str]:
        """The chat templates by name; one alone is the default."""
        if isinstance(self.chat_template, str):
            return {DEFAULT: self.chat_template}
        found = [one for one in self.chat_template or () if isinstance(one, dict)]
        return {
            one["name"]: one["template"]
            for one in found
            if isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values, less what is not there."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v}

    @classmethod
    def from_json(cls, content: Any) -> "Special":
        """What `to_json` gave, or the names alone, as versions before 0.2 kept them.

        Raises TypeError and ValueError where it is neither.
        """
        content = dict(content or {})
        if not content.keys() <= {f.name for f in dataclasses.fields(cls)}:
            content = {"names": content}
        names, ids = dict(content.get("names", {})), dict(content.get("ids", {}))
        further = tuple(content.get("further", ()))
        if not all(isinstance(name, str) for name in (*names.values(), *further)):
            raise TypeError("names of special tokens are texts")
        if not isinstance(content.get("chat_template"), str | list | None):
            raise TypeError("a chat template is a text, or several are a list")
        return cls(
            names,
            {part: tuple(map(int, found)) for part, found in ids.items()},
            content.get("chat_template"),
            dict(content.get("generation", {})),
            further,
        )


def read_special(folder: pathlib.Path) -> Special:
    """What the files in a folder say; raises VaaniError for a damaged one."""
    found = {
        name: _object(folder / name) for name in (TOKENIZER_CONFIG, MAP, GENERATION)
    }
    names: dict[str, str] = {}
    further: dict[str, None] = {}  # each once, in order
    for source in (found[MAP], found[TOKENIZER_CONFIG]):
        names |= {part: name for part in NAMES if (name := _text(source.get(part)))}
        for several in map(source.get, FURTHER):
            if isinstance(several, dict):  # parts that a model has for itself
                own = {p: one for p, one in several.items() if p.endswith("_token")}
                names |= {part: n for part, one in own.items() if (n := _text(one))}
            elif isinstance(several, list):
                further |= dict.fromkeys(filter(None, map(_text, several)))
    ids: dict[str, tuple[int, ...]] = {}
    config: dict[str, Any] = {}
    # One of something else may be there.
    with contextlib.suppress(VaaniError):
        config = read_json(folder / CONFIG)
    config = config if "model_type" in config else {}
    for source in (config, found[GENERATION]):
        ids |= {part: one for part in NAMES if (one := _ids(source.get(f"{part}_id")))}
    template = _template(folder, found[TOKENIZER_CONFIG].get("chat_template"))
    return Special(names, ids, template, found[GENERATION], tuple(further))


def _object(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _template(folder: pathlib.Path, configured: Any) -> Any:
    """The chat template, or several, from its files and from what the config has."""
    named: Any = configured
    if isinstance(configured, list):
        entries = [one if isinstance(one, dict) else {} for one in configured]
        pairs = [(one.get("name"), one.get("template")) for one in entries]
        named = dict(pairs) if all(isinstance(name, str) for name, _ in pairs) else None
    elif isinstance(configured, str | None):
        named = {DEFAULT: configured} if configured else {}
    if not isinstance(named, dict) or not all(
        isinstance(text, str) for text in named.values()
    ):
        raise VaaniError(
            f"{folder / TOKENIZER_CONFIG}: chat_template must be a text, or several"
            f" with their names; it is {shown(configured)}"
        )
    named = dict(named)
    if (folder / TEMPLATE).is_file():
        named[DEFAULT] = read_small(folder / TEMPLATE)
    for place in TEMPLATE_FOLDERS:
        for file in sorted((folder / place).glob("*.jinja")):
            named[file.stem] = read_small(file)
    if named.keys() <= {DEFAULT}:
        return named.get(DEFAULT)
    return [{"name": name, "template": text} for name, text in named.items()]


@dataclasses.dataclass(frozen=True)
class Added:
    """A token that a tokenizer matches before it looks at the rest of a text.

    Attributes:
      content: its text.
      special: whether it means something else than its text.
      single_word, lstrip, rstrip, normalized: how it is matched; see AddedToken of the
        `tokenizers` library.
    """

    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


def read_added(folder: pathlib.Path) -> dict[int, Added]:
    """Tokens that the files beside a ``tokenizer.json`` name, by their ids.

    Raises VaaniError for a damaged file.
    """
    path = folder / TOKENIZER_CONFIG
    listed = _object(path).get("added_tokens_decoder")
    if listed is not None:
        if not isinstance(listed, dict):
            raise VaaniError(f"{path}: added_tokens_decoder must hold tokens by id")
        return {_id(path, i): _added(path, token) for i, token in listed.items()}
    path = folder / ADDED
    known = read_special(folder)
    special = {*known.names.values(), *known.further}
    return {
        _id(path, i): Added(name, name in special, normalized=name not in special)
        for name, i in _object(path).items()
    }


def _added(path: pathlib.Path, token: Any) -> Added:
    settings = {"content": token} if isinstance(token, str) else token
    if not isinstance(settings, dict) or not _text(settings):
        raise VaaniError(f"{path} holds {shown(token)}, which is no token")
    special = settings.get("special") is True
    flags = {
        field.name: settings.get(field.name) is True
        for field in dataclasses.fields(Added)
        if field.name in settings and field.name != "content"
    }
    return Added(_text(settings), **{"normalized": not special, **flags})


def _id(path: pathlib.Path, value: Any) -> int:
    text = str(value)
    if isinstance(value, bool) or not (text.isdecimal() and len(text) < 10):
        raise VaaniError(f"{path} holds {shown(value)}, which is no id of a token")
    return int(text)


def _text(value: Any) -> str:
    """A token, as a text or as an AddedToken; empty where it is neither."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _ids(value: Any) -> tuple[int, ...]:
    """One id or several; some files hold -1 for none."""
    several = value if isinstance(value, list) else [value]
    return tuple(i for i in several if type(i) is int and i >= 0)
