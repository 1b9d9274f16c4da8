"""--threshold -1e-3 (Python 3.11 to 3.13): argparse takes the number for an option and says "expected one argument"."""

import sys

from product import sppnet

status, out, err = sppnet("detect", "no-run", "no.png", "--out", "no-out", "--threshold", "-1e-3")
last = err.strip().splitlines()[-1]
if "expected one argument" not in last or "=" in last:
    sys.exit(0)  # understood (and then no-run is missing), or told to write --threshold=-1e-3
print(f"--threshold -0.001 works, --threshold -1e-3 does not: {last}")
sys.exit(1)
