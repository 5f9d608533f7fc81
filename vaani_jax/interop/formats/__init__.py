"""Formats of other tools: each checks, writes and reads.

A further format is a file with these functions, and a row of `FORMATS`.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.interop.formats import gguf, hf
from vaani_jax.interop.formats.gguf_model import GGUFModel
from vaani_jax.interop.formats.source import Source
from vaani_jax.interop.names import Storage, Tensor, Weights
from vaani_jax.interop.tokenizers import note_of_hf
from vaani_jax.model.transformer import Vaani
from vaani_jax.text.tokenizers import Tokenizer

Tree = Any


# Gives the array of a tensor as it is here, and a scale for kernels that leave as codes
# (the array then holds those); to be called once for each of `names.tensors`, in order.
Take = Callable[[Tensor], tuple[np.ndarray, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a person may choose about an export; each format takes what concerns it.

    Attributes:
      gguf_type: of the kernels in GGUF, a key of `gguf.KINDS`.
      embedding: type of the embedding, and of a head, in GGUF.
      shard_bytes: largest file of a folder.
      name: of the model, for people.
    """

    gguf_type: str = "q2_0"
    embedding: gguf.Embedding = "float16"
    shard_bytes: int = hf.SHARD_BYTES
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
      check: of the model and its quantizer variables: raises VaaniError, with what
        works instead, for what the format can't hold.
      write: of a path, a model that passed `check`, a tokenizer, `Take` and the
        options: writes a model.
      read: of that path, the model, for what the format does not say, and the
        tokenizer: the model that is there, and its variables.
        Raises VaaniError where the tokenizer is not as it was.
      folder: whether a model is a folder; else it is a file.
      codes: whether ternary kernels leave as codes; else as the float32 masters.
      rounded: a float32 tensor as it comes out, for what the format doesn't hold
        exactly, and whether it leaves as codes; None where it holds everything.
      note: what a person should know of an export with that tokenizer; empty for
        nothing.
    """

    check: Callable[[Vaani, Tree, Options], None]
    write: Callable[[pathlib.Path, Vaani, Tokenizer, Take, Options], None]
    read: Callable[[pathlib.Path, Vaani, Tokenizer], tuple[Vaani, Tree]]
    folder: bool = True
    codes: bool = True
    rounded: Callable[[Tensor, Any, Options, bool], Any] | None = None
    note: Callable[[Tokenizer], str] = lambda tokenizer: ""


def _check_masters(module: Vaani, quant: Tree, options: Options) -> None:
    del options
    hf.check_block(module.architecture)
    hf.check_quantization(module.quantization)
    hf.check_masters(module.quantization, quant)


def _check_packed(module: Vaani, quant: Tree, options: Options) -> None:
    del quant, options
    hf.check_block(module.architecture)
    hf.check_quantization(module.quantization)
    hf.check_packed(module)


def _write_folder(
    storage: Storage,
) -> Callable[[pathlib.Path, Vaani, Tokenizer, Take, Options], None]:
    def write(
        path: pathlib.Path,
        module: Vaani,
        tokenizer: Tokenizer,
        take: Take,
        options: Options,
    ) -> None:
        kept: Storage = storage if module.quantization.quantize else "full"
        hf.write_folder(
            path,
            module.architecture,
            kept,
            tokenizer,
            take,
            shard_bytes=options.shard_bytes,
        )

    return write


def _read_folder(
    path: pathlib.Path, like: Vaani, tokenizer: Tokenizer
) -> tuple[Vaani, Tree]:
    del like
    folder = hf.Folder(path)
    ids = np.arange(tokenizer.vocab_size)
    same = folder.tokenizer.decode(ids) == tokenizer.decode(ids)
    descriptions = [one.to_json() for one in (folder.tokenizer, tokenizer)]
    for description in descriptions:
        # The folder's is that of the model, which may be padded.
        description.pop("vocab_size", None)
    if not same or descriptions[0] != descriptions[1]:
        raise VaaniError("the tokenizer does not come back as it was")
    return folder.module, folder.variables()


def _check_gguf(module: Vaani, quant: Tree, options: Options) -> None:
    del quant
    gguf.check(module, options.gguf_type)


def _write_gguf(
    path: pathlib.Path,
    module: Vaani,
    tokenizer: Tokenizer,
    take: Take,
    options: Options,
) -> None:
    gguf.write(
        path,
        module,
        options.gguf_type,
        tokenizer,
        take,
        name=options.name,
        embedding=options.embedding,
    )


def _read_gguf(
    path: pathlib.Path, like: Vaani, tokenizer: Tokenizer
) -> tuple[Vaani, Tree]:
    del like
    return gguf.read(path, tokenizer)


def _rounded_gguf(tensor: Tensor, array: Any, options: Options, coded: bool) -> Any:
    return gguf.rounded(
        tensor, array, options.gguf_type, options.embedding, coded=coded
    )


FORMATS: dict[str, Format] = {
    "hf": Format(
        _check_masters,
        _write_folder("masters"),
        _read_folder,
        codes=False,
        note=note_of_hf,
    ),
    "hf-packed": Format(
        _check_packed, _write_folder("multiply"), _read_folder, note=note_of_hf
    ),
    "gguf": Format(
        _check_gguf,
        _write_gguf,
        _read_gguf,
        folder=False,
        rounded=_rounded_gguf,
        note=gguf.note,
    ),
}


# What a model is called on the hub: an owner's name, and a name.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def opened(path: pathlib.Path, weights: Weights = "auto") -> Source:
    """A model to import: a GGUF file, or a Hugging Face folder.

    Args:
      path: of the file or folder.
      weights: what to take kernels for where that doesn't say.

    Raises VaaniError for whatever is wrong with it.
    """
    if not path.exists() and _REPOSITORY.fullmatch(str(path)):
        raise VaaniError(
            f"there is no {path} here; if it is a model on the hub, download it with"
            f" hf download {path} --local-dir {path.name}, and name what comes"
        )
    if path.is_file() or path.suffix.lower() == ".gguf":
        return GGUFModel(path, weights)
    return hf.Folder(path, weights)
