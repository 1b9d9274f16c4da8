"""A file name of 246 to 255 bytes ends `detect` (one of 220 to 255 ends training): the temporary name is too long.

Names of 80 Chinese or Japanese characters are that long; ext4 allows 255 bytes. The message says "free some space or
choose another --run", `detect` has no --run.
Right: temporary names that do not contain the whole name; in `detect` go on with the other files. And the right advice.
"""

import json

from PIL import Image
from product import ROOT, add_image, make_run, picture, sppnet, tiny_settings, verdict, write_config, write_set

run, photos = make_run(ROOT / "run"), ROOT / "photos"
photos.mkdir()
Image.fromarray(picture(0)).save(photos / ("写" * 82 + ".jpg"))  # 250 bytes
Image.fromarray(picture(1)).save(photos / "写真.jpg")
status, out, err = sppnet("detect", run, "photos", "--out", "found", "--threshold", "-100")
entries = json.loads((ROOT / "found/detections.json").read_text())
print(f"$ sppnet detect run photos --out found -> {status}, {len(entries)} of 2 images\n…{err.strip()[-120:]}")

devkit = ROOT / "devkit"
for i in range(4):
    stem = f"t{i}" if i else "写" * 75  # 225 bytes
    add_image(devkit, stem, [(("cat", "dog")[i % 2], (20, 20, 90, 90), 0)], seed=i)
write_set(devkit, "train", ["写" * 75, "t1", "t2"])
write_set(devkit, "val", ["t3"])
config = write_config(ROOT / "c.yaml", tiny_settings(devkit))
trained, out, err = sppnet("train", config, "--run", "r")
print(f"$ sppnet train c.yaml -> {trained}\n…{err.strip()[-120:]}")
verdict(status != 0 or trained != 0, f"detect exit {status} with {len(entries)} of 2 images, train exit {trained}")
