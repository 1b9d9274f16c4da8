"""A file name that is not UTF-8 (unpacked from an old Windows zip) ends `detect`: no detections.csv at all, codec's message.

Reported of other projects: surrogates from os.fsdecode.
Right: write the name with errors="surrogateescape" (or backslashreplace); never lose the list of all other images.
"""

import io
import os

from PIL import Image
from product import ROOT, make_run, picture, sppnet, verdict

run, photos = make_run(ROOT / "run"), ROOT / "photos"
photos.mkdir()
for i, name in enumerate((b"caf\xe9.jpg", b"z.jpg")):
    stream = io.BytesIO()
    Image.fromarray(picture(i)).save(stream, "JPEG")
    with open(os.path.join(os.fsencode(photos), name), "wb") as file:
        file.write(stream.getvalue())
status, out, err = sppnet("detect", run, "photos", "--out", "found", "--threshold", "-100")
left = sorted(os.fsencode(path.name) for path in (ROOT / "found").iterdir())
print(f"$ sppnet detect run photos --out found -> {status}\n{out}{err}{left}")
verdict(
    status != 0 or b"detections.csv" not in left, f"exit {status}, detections.csv written: {b'detections.csv' in left}"
)
