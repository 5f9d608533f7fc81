"""python -m vaani_jax"""

import sys

from vaani_jax.cli import main

sys.exit(main())
