"""What a model continues where nobody says what."""

from vaani_jax.errors import VaaniError
from vaani_jax.text.tokenizers import Tokenizer

USUAL = "\n"
LOOKED_AT = 1000  # tokens, to find one that is a prompt


def default_prompt(tokenizer: Tokenizer, opening: str = "") -> str:
    """A line break; where the tokenizer has no ids for it, how the text begins.

    Args:
      tokenizer: of the model.
      opening: the first word of the text that the model was trained on, if known.

    Returns:
      Where neither has ids, the first token that has some as a text; "" without any.
    """
    for text in (USUAL, opening):
        if _has_ids(tokenizer, text):
            return text
    for i in range(min(tokenizer.vocab_size, LOOKED_AT)):
        text = tokenizer.decode([i])
        if _has_ids(tokenizer, text):
            return text
    return ""


def _has_ids(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return len(tokenizer.encode(text)) > 0  # besides what opens every text
    except VaaniError:
        return False
