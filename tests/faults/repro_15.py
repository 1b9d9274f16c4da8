"""Boxes that are left out, clipped or of another size are counted, but no file is ever named, not even by --verbose.

Reported of other projects:
the same request each time, "3,000 images, which one?".
Right: at least one name per count ("2 × zero-area box, e.g. MINE/t0"), all of them with --verbose.
The same line is all that is said of photos whose boxes were drawn in the unrotated frame.
"""

from PIL import Image
from product import ROOT, add_image, sppnet, tiny_settings, verdict, write_config, write_set

devkit = ROOT / "devkit"
bad = {"t1": [("cat", (90, 20, 20, 90), 0)], "t2": [("dog", (500, 20, 590, 90), 0)]}
for i in range(6):
    stem = f"t{i}"
    add_image(devkit, stem, [(("cat", "dog")[i % 2], (20, 20, 90, 90), 0), *bad.get(stem, [])], seed=i)
path = devkit / "MINE/JPEGImages/t3.jpg"  # a phone's photo: stored lying down, boxes drawn so
exif = Image.Exif()
exif[0x0112] = 6
Image.open(path).save(path, exif=exif)
write_set(devkit, "train", [f"t{i}" for i in range(5)])
write_set(devkit, "val", ["t5"])
config = write_config(ROOT / "c.yaml", tiny_settings(devkit))
status, out, err = sppnet("train", config, "--run", "run", "--dry-run", "--verbose")
print(f"$ sppnet train c.yaml --dry-run --verbose -> {status}\n{out.splitlines()[0]}\n{err}")
missing = [stem for stem in ("t1", "t2", "t3") if stem not in out + err]
verdict(bool(missing), f"{', '.join(missing)} are the files to repair; none is named")
