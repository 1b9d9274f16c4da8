"""A trained detector in a loop over a folder; two questions to one map. Draws a.found.png beside each a.jpg.

python examples/detector.py runs/demo photos
"""

import sys
from pathlib import Path

from sppnet import SPPDetector, read_image

if len(sys.argv) != 3:
    sys.exit(__doc__)
run, folder = sys.argv[1:]
detector = SPPDetector.load(run)  # device="cuda" on a GPU
print("classes:", ", ".join(detector.classes))
for path in sorted(Path(folder).glob("*.jpg")):
    found = detector.detect(path, top=5)
    print(f"{path.name}: {len(found)} found")
    for box, score, _, name in found:
        print(f"  {name} {score:.2f} at {[round(x) for x in box]}")

    image = read_image(path)
    maps = detector.embed(image)  # once …
    middle = [[image.shape[1] / 4, image.shape[0] / 4, image.shape[1] * 3 / 4, image.shape[0] * 3 / 4]]
    whole = [[0, 0, image.shape[1], image.shape[0]]]
    for name, window in (("middle", middle), ("whole picture", whole)):  # … asked twice
        scores = detector.score(maps, window)[0]
        print(f"  {name}: most like {detector.classes[scores.argmax()]}")
    found.draw(image).save(path.with_suffix(".found.png"))
