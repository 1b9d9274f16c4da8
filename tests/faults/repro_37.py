"""The parent of the proposal workers is killed (kill PID, timeout, a batch system, out of memory): the workers stay for ever."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

root = Path(tempfile.mkdtemp())
year, run = root / "kit/Y", root / "run"
for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
    (year / name).mkdir(parents=True)
box = "<annotation><object><name>cat</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>90</xmax><ymax>90</ymax></bndbox></object></annotation>"
for i in range(40):
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(
        year / f"JPEGImages/{i}.png"
    )
    (year / f"Annotations/{i}.xml").write_text(box)
(year / "ImageSets/Main/all.txt").write_text("".join(f"{i}\n" for i in range(40)))
(root / "c.yaml").write_text(
    f"data: {{root: {root}/kit, train: [Y/all], val: [], test: []}}\nproposals: {{workers: 2, method: opencv_selective_search}}\n"
)
parent = subprocess.Popen(
    [sys.executable, "-m", "sppnet", "propose", root / "c.yaml", "--run", run], stderr=subprocess.DEVNULL
)


def alive():
    rows = subprocess.run(["ps", "-ewwo", "pid=,ppid=,stat=,args="], capture_output=True, text=True).stdout.splitlines()
    return {
        int(r.split()[0]): int(r.split()[1]) for r in rows if "spawn_main" in r and not r.split()[2].startswith("Z")
    }


while parent.poll() is None and not list(run.rglob("*.npz")):
    time.sleep(0.5)
workers = [pid for pid, mother in alive().items() if mother == parent.pid]
parent.send_signal(signal.SIGTERM)
parent.wait()
end = time.monotonic() + 60  # to finish the picture they are at
while (left := [pid for pid in workers if pid in alive()]) and time.monotonic() < end:
    time.sleep(1)
for pid in left:
    os.kill(pid, signal.SIGKILL)
if left:
    print(
        f"{len(left)} of {len(workers)} proposal workers still there a minute after their parent was ended by SIGTERM"
    )
sys.exit(bool(left) or len(workers) < 2)
