"""``python -m bench.mnist --model fc`` under its first name, which recorded results still carry."""

from __future__ import annotations

import sys

from .mnist import main

if __name__ == "__main__":
    sys.exit(main(["--model", "fc", *sys.argv[1:]]))
