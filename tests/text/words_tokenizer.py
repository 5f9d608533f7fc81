"""A tokenizer of the `tokenizers` library that a test can read: a word, an id."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
WORDS = ("user", "assistant", "system", "the", "cat", "sat", "on", "mat", "?")


def words_tokenizer(words=WORDS):
    """Bytes where there is no word: any text has ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL, *alphabet]
    made = tokenizers.Tokenizer(
        models.BPE(vocab={text: i for i, text in enumerate(vocabulary)}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    made.add_tokens(list(words))
    return made
