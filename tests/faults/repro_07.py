"""`detect photos --out photos/found`, a second time after a photo was removed or after Ctrl-C: refuses its own pictures.

detections.json, which tells which pictures are its own, is rewritten with the images of the last call alone; pictures of
earlier calls stay. The next call takes them for photos. After Ctrl-C the message even promises "the same command goes on
from there".
Right: remember all pictures that were ever written there (or delete those that no longer have an image).
"""

import signal
import subprocess
import sys
import time

from PIL import Image
from product import ROOT, make_run, picture, sppnet, verdict

run, photos = make_run(ROOT / "run"), ROOT / "photos"
photos.mkdir()
for i in range(12):
    Image.fromarray(picture(i)).save(photos / f"{i:02d}.jpg")
command = ("detect", run, "photos", "--out", "photos/found", "--threshold", "-100")
print("first call ->", sppnet(*command)[0])
marker = photos / "found/01.jpg"
before = marker.stat().st_mtime_ns
process = subprocess.Popen(
    [sys.executable, "-m", "sppnet", *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True
)
while marker.stat().st_mtime_ns == before and process.poll() is None:
    time.sleep(0.01)
process.send_signal(signal.SIGINT)
print("second call, Ctrl-C ->", process.wait(), process.stderr.read().strip().splitlines()[-1:])
interrupted, out, err = sppnet(*command)
print("third call ->", interrupted, err.strip())
for path in (photos / "found").iterdir():
    path.unlink()
sppnet(*command)
(photos / "11.jpg").unlink()
sppnet(*command)
removed, out, err = sppnet(*command)
print("a photo removed, two calls later ->", removed, err.strip())
verdict(
    2 in (interrupted, removed),
    f"exit {interrupted} after Ctrl-C and {removed} after removing a photo: pictures of its own are refused",
)
