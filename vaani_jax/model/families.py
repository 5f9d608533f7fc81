"""Families of blocks: what those of other projects have, and one word for it.

A further family is a row, and a key of `Architecture` for each part that none had.
What other tools call its tensors is in `interop/names.py`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """What a block has besides attention and feed-forward with their two pre-norms.

    Fields are keys of `Architecture`, which says what they mean.
    """

    sub_norms: bool = False
    qk_norm: bool = False
    attention_bias: bool = False


FAMILIES: dict[str, Family] = {
    "bitnet": Family(sub_norms=True),
    "llama": Family(),
    "qwen2": Family(attention_bias=True),
    "qwen3": Family(qk_norm=True),
}
