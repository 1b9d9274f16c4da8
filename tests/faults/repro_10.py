"""One very long and narrow picture ends `detect` of a whole folder with a traceback and exit 1: memory.

A picture of 22 x 30,000 pixels becomes 400 x 545,455 at maps.scales=[400]: 2.6 GB before the first layer; at the 960 of
custom_example.yaml 15 GB. maps.max_side is unbounded by default. Exit status 1
is documented as "some files could not be read", but nothing after it was looked at. A CUDA OutOfMemoryError is the same class.
Here memory is bounded by RLIMIT_AS, so that the machine is left in peace.
Right: skip and count it like an image too narrow, naming maps.max_side; go on with the others.
"""

import json
import subprocess
import sys

import numpy as np
from PIL import Image
from product import ROOT, make_run, picture, verdict

run, photos = make_run(ROOT / "run", maps={"scales": [400]}), ROOT / "photos"
photos.mkdir()
Image.fromarray(np.random.default_rng(0).integers(0, 255, (22, 30000, 3), dtype=np.uint8)).save(photos / "a.png")
Image.fromarray(picture(1)).save(photos / "b.jpg")
command = f"ulimit -v 7000000; exec '{sys.executable}' -m sppnet detect run photos --out found --threshold -100"
done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
entries = json.loads((ROOT / "found/detections.json").read_text())
print(
    f"exit {done.returncode}; images in detections.json: {[e['image'] for e in entries]}\n… {done.stderr.strip()[-300:]}"
)
verdict("Traceback" in done.stderr or len(entries) < 1, "a traceback, and b.jpg was never looked at")
