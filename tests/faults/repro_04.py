"""`sppnet eval` of held-out images draws them anew from today's list: after an edit it evaluates on training images.

Kind: resume trap, data changed in place. The detector does not remember what it was trained on.
Right: keep the ids (or a digest) of the held-out images with the detector; refuse or warn where they no longer fit.
Second fault in the same place: with --data OTHER, of another data set only that same share is evaluated, under the words
"tested on the held-out images, which also chose the fine-tuning snapshot".
"""

import json

from product import ROOT, add_image, make_run, sppnet, tiny_settings, verdict, write_config, write_set

from sppnet.config_files import load_config
from sppnet.pipeline.run_data import load_run_data

devkit, other = ROOT / "devkit", ROOT / "other"
stems = [f"p{i:02d}" for i in range(10)]
for folder in (devkit, other):
    for i, stem in enumerate(stems):
        add_image(
            folder, stem, [(("cat", "dog")[i % 2], (20, 20, 90, 90), 0)], seed=i + (100 if folder is other else 0)
        )
    write_set(folder, "train", stems)
data = {"root": str(devkit), "train": ["MINE/train"], "val": [], "test": []}
config = write_config(ROOT / "c.yaml", tiny_settings(devkit, data=data))
before = load_run_data(load_config(config))
trained = {record.id for record in before.train}
run = make_run(ROOT / "run", devkit=devkit, data=data)  # stands for the detector trained on `trained`
print("trained on", len(trained), "images; held out", sorted(r.id for r in before.validation))

held = {record.id.split("/")[1] for record in before.validation}
write_set(devkit, "train", [stem for stem in stems if stem not in held])  # the user tidies the list
status, out, err = sppnet("eval", run)
images = {path.stem.rsplit("-", 1)[0] for path in run.glob("detections-*/MINE/*.npz")}
print(f"$ sppnet eval run -> {status}\n{err.strip()}\nimages evaluated: {sorted(images)}")
leaked = sorted(images & {name.split("/")[1] for name in trained})

write_set(devkit, "train", stems)
status, out, err = sppnet("eval", run, "--data", other)
found = json.loads(next((run / "results").glob("other-*/*/metrics.json")).read_text().replace("NaN", "null"))
print(f"$ sppnet eval run --data other -> {status}\n{err.strip()}\nimages evaluated: {found['images']} of {len(stems)}")
verdict(bool(leaked), f"{leaked} were trained on, and are called held-out images; no warning")
