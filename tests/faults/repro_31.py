"""A phone picture (EXIF orientation 6) annotated in its stored frame: <size> and boxes are those of the unturned pixels."""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from sppnet.data.splits import load_split
from sppnet.data.voc import write_annotation
from sppnet.errors import SppnetError
from sppnet.images import read_image

root = Path(tempfile.mkdtemp())
year = root / "PHONE"
for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
    (year / name).mkdir(parents=True)
stored = np.full((240, 320, 3), 40, np.uint8)
stored[100:200, 30:150] = (250, 240, 10)  # the object, in the frame in which an old labelImg shows it
exif = Image.Exif()
exif[0x0112] = 6
Image.fromarray(stored).save(year / "JPEGImages/p.jpg", exif=exif, quality=95)
write_annotation(year / "Annotations/p.xml", (240, 320), [[30, 100, 150, 200]], ["sun"], [False])
(year / "ImageSets/Main/all.txt").write_text("p\n")
try:
    (record,), skips = load_split(root, "PHONE/all")
except SppnetError:
    sys.exit(0)  # refused: right too
x1, y1, x2, y2 = record.annotation.boxes[0].astype(int)
red = read_image(record.path)[y1:y2, x1:x2, 0].mean()
said = " ".join(skips.counts).lower()
if red > 230 or "exif" in said or "orientation" in said:
    sys.exit(0)
print(
    f"boxes of the unturned frame are used on the turned picture (half of the box is background, red {red:.0f}); all that is said: {dict(skips.counts)}"
)
sys.exit(1)
