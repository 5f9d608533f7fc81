"""Special tokens: what opens a text, ends it, pads it, and how a chat is written.

Hugging Face spreads them over six files beside ``tokenizer.json``, and models fill in
some of these only. One reader puts them together, for training, generation, import and
export alike:

  names of tokens   ``tokenizer_config.json``, else ``special_tokens_map.json``, else
                    the ids of the next row
  ids               ``generation_config.json``, else ``config.json``
  chat template     ``chat_template.jinja``, else ``tokenizer_config.json``
"""

import contextlib
import dataclasses
import pathlib
from typing import Any

from vaani_jax.errors import VaaniError
from vaani_jax.paths import read_json, read_small

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")

TOKENIZER_CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
GENERATION = "generation_config.json"
CONFIG = "config.json"
TEMPLATE = "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class Special:
    """What files say of a tokenizer's special tokens.

    Attributes:
      names: texts of the tokens by their part ("eos_token").
      ids: ids by part, those that end a text being several at times.
      chat_template: source in Jinja, or several with their names, as Hugging Face keeps
        them; None where there is none. Never run here.
      generation: content of ``generation_config.json``; empty where there is none.
    """

    names: dict[str, str] = dataclasses.field(default_factory=dict)
    ids: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    chat_template: Any = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)

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
        if not all(isinstance(name, str) for name in names.values()):
            raise TypeError("names of special tokens are texts")
        return cls(
            names,
            {part: tuple(map(int, found)) for part, found in ids.items()},
            content.get("chat_template"),
            dict(content.get("generation", {})),
        )


def read_special(folder: pathlib.Path) -> Special:
    """What the files in a folder say; raises VaaniError for a damaged one."""
    found = {
        name: read_json(folder / name) if (folder / name).is_file() else {}
        for name in (TOKENIZER_CONFIG, MAP, GENERATION)
    }
    names: dict[str, str] = {}
    for source in (found[MAP], found[TOKENIZER_CONFIG]):
        names |= {part: name for part in NAMES if (name := _text(source.get(part)))}
    ids: dict[str, tuple[int, ...]] = {}
    config: dict[str, Any] = {}
    # One of something else may be there.
    with contextlib.suppress(VaaniError):
        config = read_json(folder / CONFIG)
    config = config if "model_type" in config else {}
    for source in (config, found[GENERATION]):
        ids |= {part: one for part in NAMES if (one := _ids(source.get(f"{part}_id")))}
    template = found[TOKENIZER_CONFIG].get("chat_template")
    if (folder / TEMPLATE).is_file():
        template = read_small(folder / TEMPLATE)
    if template is not None and not isinstance(template, str | list):
        raise VaaniError(f"{folder / TOKENIZER_CONFIG}: chat_template must be a text")
    return Special(names, ids, template, found[GENERATION])


def _text(value: Any) -> str:
    """A token, as a text or as an AddedToken; empty where it is neither."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _ids(value: Any) -> tuple[int, ...]:
    """One id or several; some files hold -1 for none."""
    several = value if isinstance(value, list) else [value]
    return tuple(i for i in several if type(i) is int and i >= 0)
