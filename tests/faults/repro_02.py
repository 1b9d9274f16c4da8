"""`sppnet score` drops and clips ground truth by the annotation's own <size>, and drops thin boxes, without a word.

Reported of several public data sets: <size>
swapped or wrong in a large share of real files. `eval` counts and prints these (and takes the image's own size); `score`
throws the counts away. A missed object that is dropped raises AP.
Right: the devkit never looks at <size>: count both objects (AP 0.5455). At the very least print what was left out.
"""

from product import ROOT, add_image, sppnet, verdict, write_set

devkit = ROOT / "devkit"
objects = [("cat", (50, 50, 150, 150), 0), ("cat", (360, 60, 480, 200), 0)]
results, silent = {}, []
for what, stated, own in (
    ("<size> right", (333, 500), objects),
    ("<size> swapped", (500, 333), objects),
    ("<size> of a thumbnail", (120, 180), objects),
    ("an object one pixel wide", (333, 500), [objects[0], ("cat", (360, 60, 360, 200), 0)]),
):
    add_image(devkit, "a", own, size=(333, 500), stated=stated)
    write_set(devkit, "test", ["a"])
    (ROOT / "det_cat.txt").write_text("a 0.9 50 50 150 150\n")  # the second object is missed
    status, out, err = sppnet(
        "score",
        "--annotations",
        devkit / "MINE/Annotations",
        "--image-set",
        devkit / "MINE/ImageSets/Main/test.txt",
        "--detections",
        "det_{}.txt",
        "--classes",
        "cat",
    )
    results[what] = out.splitlines()[1]
    silent += [what] * (results[what].split()[2] != "2" and not err.strip())
    print(f"{what}: exit {status}\n  {results[what]}\n  stderr: {err.strip() or '(nothing)'}")
counts = {what: line.split()[2] for what, line in results.items()}
verdict(bool(silent), f"objects counted: {counts}; two were annotated each time, and nothing was said")
