"""Where text comes from and how it is cut."""

import dataclasses

from vaani_jax.errors import VaaniError
from vaani_jax.settings import key
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
    )
    data_dir: str = key(
        "", "cache for downloads; empty for $VAANI_DATA_DIR, else ``~/.cache/vaani``"
    )
    fallback: bool = key(
        True,
        "whether a failed download falls back to the sources of Python's standard "
        "library; False makes it an error",
    )
    download_timeout: float = key(10.0, "seconds to wait for the network, each time")
    download_attempts: int = key(3, "how often to try")
    tokenizer: str = key("char", '"char" or "byte"')
    tokenizer_file: str = key(
        "", "a ``tokenizer.json`` of Hugging Face to use in its place"
    )
    validation_fraction: float = key(
        0.1, "share of the corpus, at its end, that is held out"
    )

    def __post_init__(self) -> None:
        maker(self.tokenizer)
        if not 0 < self.validation_fraction < 1:
            raise VaaniError(
                f"data.validation_fraction is {self.validation_fraction}: it must be"
                " between 0 and 1"
            )
        if self.download_attempts < 1 or self.download_timeout <= 0:
            raise VaaniError(
                "data.download_attempts must be at least 1 and data.download_timeout"
                " above 0 seconds"
            )
