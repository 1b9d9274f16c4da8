"""The table of `score` and `eval` is lost where standard output cannot hold a class name: exit 2, the codec's message.

A cron job, a CI log or a terminal that is not UTF-8.
Right: replace what cannot be written (sys.stdout.reconfigure(errors="backslashreplace")), as Python does for stderr.
"""

from product import ROOT, add_image, sppnet, verdict, write_set

devkit = ROOT / "devkit"
add_image(devkit, "a", [("кот", (20, 20, 90, 90), 0)])
write_set(devkit, "test", ["a"])
(ROOT / "det_кот.txt").write_text("a 0.9 20 20 90 90\n")
status, out, err = sppnet(
    "score",
    "--annotations",
    devkit / "MINE/Annotations",
    "--image-set",
    devkit / "MINE/ImageSets/Main/test.txt",
    "--detections",
    "det_{}.txt",
    "--classes",
    "кот",
    PYTHONIOENCODING="latin-1",
)
print(f"-> {status}\n{out}{err}")
verdict(status != 0, "no table")
