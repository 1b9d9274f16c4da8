"""Training ends late, after propose and extract, because the validation images that were looked at show no object.

Kind: "val empty" / sparse data. Case A: no validation image has an object (random hold-out of a set with many background
images does that): known from the annotations at once, --dry-run even prints it and exits 0. Case B: `validate_images`
takes images at even distances without looking whether they show anything: half of the validation images have objects, none
of those chosen, and training is impossible. The message blames proposals and annotations.
Right: A: refuse before anything is computed (and in --dry-run, exit 1). B: choose among the images with objects.
"""

from product import ROOT, add_image, sppnet, tiny_settings, verdict, write_config, write_set

faults = []
for what, with_objects, settings in (("A", (), {}), ("B", (1, 3), {"validate_images": 2})):
    devkit = ROOT / what
    for i in range(4):
        add_image(devkit, f"t{i}", [(("cat", "dog")[i % 2], (20, 20, 90, 90), 0)], seed=i)
        add_image(devkit, f"v{i}", [("cat", (20, 20, 90, 90), 0)] * (i in with_objects), seed=10 + i)
    write_set(devkit, "train", [f"t{i}" for i in range(4)])
    write_set(devkit, "val", [f"v{i}" for i in range(4)])
    config = write_config(ROOT / f"{what}.yaml", tiny_settings(devkit, finetune=settings))
    dry, out, err = sppnet("train", config, "--run", f"run{what}", "--dry-run")
    print(f"{what}: dry run -> {dry}: {out.splitlines()[0]}")
    status, out, err = sppnet("train", config, "--run", f"run{what}")
    done = [line for line in err.splitlines() if " maps: " in line or " proposals: " in line]
    print(f"{what}: train -> {status}, after {len(done)} stages: {err.splitlines()[-1]}")
    if status != 0 and done:
        faults.append(what)
verdict(bool(faults), f"case {' and '.join(faults)}: ends only after all windows and maps were computed")
