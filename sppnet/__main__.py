"""``python -m sppnet``: the command line."""

from sppnet.cli import main

raise SystemExit(main())
