"""A class name with two dollar signs ends `eval` after all images are detected: matplotlib takes it for mathematics.

Reported of other projects. Money and price-tag data sets name classes so.
Right: titles are text (parse_math=False, or $ escaped). Where it does not fail the name is drawn without its dollars.
"""

from product import ROOT, add_image, make_run, sppnet, verdict, write_set

devkit = ROOT / "devkit"
for i in range(2):
    add_image(devkit, f"t{i}", [("$5_$10 note", (20, 20, 90, 90), 0)], seed=i)
write_set(devkit, "test", ["t0", "t1"])
run = make_run(ROOT / "run", classes=("$5_$10 note",), devkit=devkit)
status, out, err = sppnet("eval", run, "--split", "MINE/test")
print(
    f"$ sppnet eval run --split MINE/test -> {status}\nstdout: {out.strip() or '(nothing: no table)'}\nstderr: {err[:400]} …"
)
missing = [name for name in ("precision_recall.png", "examples.jpg") if not list((run / "results").rglob(name))]
verdict(status != 0, f"exit {status}, no table, missing {missing}; the message is the parser's")
