"""Every key, with its default; `vaani config` shows them with what they are.

Other configs are short differences from this one. Any key can be set on the command
line: --config.model.dim=256
"""

from vaani_jax import default_config


def get_config():
    return default_config()
