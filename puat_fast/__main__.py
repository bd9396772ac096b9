"""`python -m puat_fast`, as torchrun starts it."""

import os
import sys

from puat_fast.cli import main

if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # gloo's threads may let go of tensors after the last collective, while the interpreter is being taken down:
        # that aborts a process whose work is done. Seen once, on a busy machine; pytorch pull request 179291 tells why.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
