"""The same picture under another name in train and in val: validation errors and mAP look too good, and nothing says so."""

import re
import shutil
import sys
import tempfile

from product import sppnet

from sppnet.data.shapes import generate_shapes

root = generate_shapes(tempfile.mkdtemp(), {"train": 4, "val": 2})
year = root / "SHAPES"
names = (year / "ImageSets/Main/train.txt").read_text().split()[:2]
for name in names:  # e.g. an export with augmented copies, or two exports put together
    picture = next((year / "JPEGImages").glob(f"{name}.*"))
    shutil.copy(picture, picture.with_name(f"copy_{picture.name}"))
    shutil.copy(year / f"Annotations/{name}.xml", year / f"Annotations/copy_{name}.xml")
(year / "ImageSets/Main/val.txt").write_text("".join(f"copy_{name}\n" for name in names))
config = root / "c.yaml"
config.write_text(
    f"data: {{root: {root}, train: [SHAPES/train], val: [SHAPES/val], test: []}}\nbackbone: {{name: tiny5, weights: {{source: random}}}}\n"
)
status, out, err = sppnet("train", config, "--dry-run", "--run", root / "run")
said = out + err
if re.search(r"training images too|identical|same (picture|image|content)|duplicate|copies", said):
    sys.exit(0)
print("both validation pictures are byte for byte training pictures, and train says only: " + said.splitlines()[0])
sys.exit(1)
