"""``python -m snf_ext`` is the command ``snf-ext``."""

from .cli import main

raise SystemExit(main())
