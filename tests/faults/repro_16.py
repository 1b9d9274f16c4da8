"""Training with an image too narrow for the backbone ends without the image's name, and only after all windows are there.

README: "Training and evaluation never skip an image: one that is missing, damaged … is an error with its name."
`eval` names it (testing._detect), extract_images does not. The sizes are known from the headers.
"""

from product import ROOT, add_image, sppnet, tiny_settings, verdict, write_config, write_set

devkit = ROOT / "devkit"
for i in range(4):
    add_image(devkit, f"t{i}", [(("cat", "dog")[i % 2], (20, 20, 90, 90), 0)], seed=i)
add_image(devkit, "strip", [("cat", (5, 2, 60, 11), 0)], size=(12, 900))
write_set(devkit, "train", ["t0", "t1", "strip", "t2"])
write_set(devkit, "val", ["t3"])
config = write_config(
    ROOT / "c.yaml",
    tiny_settings(
        devkit, maps={"scales": [160], "max_side": 160}, backbone={"name": "alexnet", "weights": {"source": "random"}}
    ),
)
status, out, err = sppnet("train", config, "--run", "run")
print(f"$ sppnet train c.yaml -> {status}\n{err}")
verdict(status == 2 and "strip" not in err, "which image is it?")
