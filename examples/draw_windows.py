"""From a picture to windows of its map, drawn: the boxes of selective search, and the cells that stand for them.

python examples/draw_windows.py photo.jpg windows.png
"""

import sys

import numpy as np
from PIL import Image, ImageDraw

from sppnet import Geometry, project_windows, read_image, selective_search

if len(sys.argv) != 3:
    sys.exit(__doc__)
image = read_image(sys.argv[1])
height, width = image.shape[:2]
geometry, scale = Geometry(stride=16, first_centre=7.5), 400  # VGG16
factor = (scale - 1) / (min(height, width) - 1)
map_size = tuple(
    int(side * scale / min(height, width) + 0.5) // 16 for side in (height, width)
)  # of the scaled picture
boxes = selective_search(image, max_windows=6)
cells = project_windows(boxes, (height, width), scale, geometry, map_size)

left, right = Image.fromarray(image), Image.fromarray(image)
lines, grid = ImageDraw.Draw(left), ImageDraw.Draw(right)
for y in range(map_size[0]):
    for x in range(map_size[1]):  # where the cell looks
        u, v = np.array([geometry.first_centre + 16 * x, geometry.first_centre + 16 * y]) / factor
        grid.ellipse((u - 1, v - 1, u + 1, v + 1), fill="white")
for number, (box, window) in enumerate(zip(boxes, cells, strict=True)):
    colour = f"hsl({number * 60}, 90%, 55%)"
    lines.rectangle((*box[:2], *(box[2:] - 1)), outline=colour, width=3)
    centres = (geometry.first_centre + 16 * (window - [0, 0, 1, 1])) / factor
    grid.rectangle(tuple(centres), outline=colour, width=3)
sheet = Image.new("RGB", (2 * width, height))
sheet.paste(left, (0, 0))
sheet.paste(right, (width, 0))
sheet.save(sys.argv[2])
print(f"{len(boxes)} windows on a map of {map_size[0]} × {map_size[1]} cells, drawn in {sys.argv[2]}")
