"""A JPEG that was cut in the middle but ends with the end marker is read as a picture that is half grey, silently.

Reported of real data sets: "premature end of JPEG" in real data sets.
images.read_image promises that "a partly decoded image is never returned". libjpeg only warns, and Pillow swallows it.
(Cut without the marker, PNG, GIF, BMP, WebP, TIFF and PPM cut in half are refused, as they should be.)
Right: count what the decoder warns of, e.g. decode a second time by torchvision.io.decode_image / OpenCV with warnings as
errors, or compare the number of restart/MCU rows; or take the promise back.
"""

import io

from PIL import Image
from product import ROOT, picture, verdict

from sppnet import read_image
from sppnet.images import ImageError

stream = io.BytesIO()
Image.fromarray(picture(0, (300, 400))).save(stream, "JPEG", quality=90)
path = ROOT / "cut.jpg"
path.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2] + b"\xff\xd9")
try:
    rows = read_image(path)
except ImageError as error:
    verdict(False, str(error))
flat = int((rows.reshape(len(rows), -1).std(axis=1) < 1e-6)[::-1].argmin())
verdict(True, f"an image came back; its last {flat} of {len(rows)} rows are one grey")
