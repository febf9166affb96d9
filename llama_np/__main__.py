"""`python -m llama_np` is the command `llama-np`."""

import sys

from llama_np.cli import main

sys.exit(main())
