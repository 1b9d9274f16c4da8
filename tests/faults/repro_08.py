"""The pictures with boxes of one `detect` are photos to the next, where they lie in a folder below the photos.

Kind: output folder inside the source folder. `--out photos/found`, then `--out photos/strict --threshold 1`.
Right: leave out every folder that a detections.json of ours lies in, and say so (README: "what an earlier call left in
`out` is not searched" covers the same folder alone). Boxes drawn into the pictures are detected on, silently.
"""

import json

from PIL import Image
from product import ROOT, make_run, picture, sppnet, verdict

run, photos = make_run(ROOT / "run"), ROOT / "photos"
photos.mkdir()
for i in range(2):
    Image.fromarray(picture(i)).save(photos / f"{i}.jpg")
print(sppnet("detect", run, "photos", "--out", "photos/found", "--threshold", "-100")[:2])
print(sppnet("detect", run, "photos", "--out", "photos/strict", "--threshold", "1"))
images = [entry["image"] for entry in json.loads((photos / "strict/detections.json").read_text())]
verdict(len(images) > 2, f"two photos, but searched were {images}")
