"""Where text comes from and how it is cut."""

import dataclasses

from vaani_jax.settings import check, key
from vaani_jax.text.tokenizers import maker


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is cut."""

    source: str = key(
        "",
        "path, tiny_shakespeare or python (the sources of Python's standard library); "
        "empty: the path, where there is one, else Tiny Shakespeare",
    )
    path: str = key(
        "",
        "a text file, a folder (every file below it, sorted) or a glob; empty for "
        "Tiny Shakespeare",
        path=True,
    )
    data_dir: str = key(
        "",
        "cache for downloads; empty for $VAANI_DATA_DIR, else ``~/.cache/vaani``",
        path=True,
    )
    fallback: bool = key(
        True,
        "whether a failed download falls back to the sources of Python's standard "
        "library; False makes it an error",
    )
    download_timeout: float = key(
        10.0, "seconds to wait for the network, each time", above=0, at_most=86_400
    )
    download_attempts: int = key(3, "how often to try", at_least=1, at_most=20)
    tokenizer: str = key("char", '"char" or "byte"')
    tokenizer_file: str = key(
        "", "a ``tokenizer.json`` of Hugging Face to use in its place", path=True
    )
    validation_fraction: float = key(
        0.1, "share of the corpus, at its end, that is held out", above=0, below=1
    )

    def __post_init__(self) -> None:
        check(self, "data.")
        maker(self.tokenizer)
