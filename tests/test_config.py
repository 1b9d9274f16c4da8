"""Settings: read, overridden, refused, written back."""

import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sppnet.config import BoxRegressionSettings, Config, FinetuneSettings, SVMSettings, WeightsSettings
from sppnet.config_files import dump_config, load_config, parse_config, read_reasons, write_settings
from sppnet.errors import SppnetError

CONFIGS = [p for p in sorted(Path(__file__).parents[1].glob("configs/*.yaml")) if "classify" not in p.stem]


@pytest.fixture
def file(tmp_path):
    """A function that writes a YAML file and returns its path."""

    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return path

    return write


def write_all(folder, **texts):
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_a_file_may_name_one_whose_settings_it_changes(tmp_path):
    write_all(
        tmp_path,
        sub__first="name: first\nmaps: {scales: [480, 688], storage: float32}\n"
        "backbone: {weights: {source: random, std: [1, 1, 1]}}",
        sub__second="base: first.yaml\nname: second\nmaps: {scales: [576]}",
        third="base: sub/second.yaml\nname: third\nbackbone: {weights: {mean: [2, 2, 2]}}\nsvm: {C: 3}\n",
    )
    config = load_config(tmp_path / "third.yaml", ["svm.C=4"])
    assert config.name == "third"
    assert (config.maps.scales, config.maps.storage) == ((576,), "float32")
    weights = config.backbone.weights
    assert (weights.source, weights.std, weights.mean) == ("random", (1, 1, 1), (2, 2, 2))
    assert config.svm.C == 4
    assert load_config(tmp_path / "sub/first.yaml").maps.scales == (480, 688)
    (tmp_path / "all.yaml").write_text(dump_config(config))
    assert "base" not in (tmp_path / "all.yaml").read_text()
    assert load_config(tmp_path / "all.yaml") == config


def test_the_base_of_a_file_may_be_anywhere(tmp_path, monkeypatch):
    write_all(tmp_path, one__a="svm: {C: 7}", two__b=f"base: {tmp_path}/one/a.yaml")
    assert load_config(tmp_path / "two/b.yaml").svm.C == 7
    monkeypatch.setenv("OUR_FOLDER", str(tmp_path / "one"))
    write_all(tmp_path, two__c="base: $OUR_FOLDER/a.yaml")
    assert load_config(tmp_path / "two/c.yaml").svm.C == 7


def test_a_configuration_that_is_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").symlink_to("a.yaml")
    with pytest.raises(SppnetError, match=r"a\.yaml: cannot read the configuration"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a": "base: no.yaml"}, r"a\.yaml: base: .*no\.yaml: cannot read the configuration \(No such .*; give an"),
        ({"a": "base: a.yaml"}, r"a\.yaml: base: .*a\.yaml is its own base; leave one of them out"),
        ({"a": "base: b.yaml", "b": "base: ./c.yaml", "c": "base: a.yaml"}, r"c\.yaml: base: .*a\.yaml is its own"),
        ({"a": "base: b.yaml", "b": "- x"}, r"b\.yaml: expected a mapping of settings, got list"),
        ({"a": "base: b.yaml", "b": "x: ["}, r"b\.yaml: not valid YAML"),
        ({"a": "base: 3"}, r"a\.yaml: base: expected the path of one file, got 3"),
        ({"a": "base: $NO_SUCH_FOLDER/b.yaml"}, r"\$NO_SUCH_FOLDER/b\.yaml"),
        ({"a": 'base: "b\\0"'}, r"null byte"),
        ({"a": "base: [b.yaml]"}, r"a\.yaml: base: expected the path of one file, got \['b\.yaml'\]"),
        ({"a": "base: b.yaml\nsvm: {D: 1}", "b": "svm: {C: 1}"}, r"a\.yaml: unknown setting svm\.D"),
        ({"a": "base: b.yaml\nsvm: 3", "b": "svm: {C: 1}"}, r"a\.yaml: svm: expected a section of settings"),
        ({"a": "svm: {base: b.yaml}"}, r"a\.yaml: unknown setting svm\.base"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_is_refused(tmp_path, texts, message):
    write_all(tmp_path, **texts)
    with pytest.raises(SppnetError, match=message):
        load_config(tmp_path / "a.yaml")


def test_an_empty_file_gives_the_defaults(file):
    assert load_config(file("")) == Config()


def test_the_defaults_are_the_paper_s_and_the_release_s_numbers():
    config = Config()
    assert config.pyramid.levels == (1, 2, 3, 6)
    assert config.maps.scales == (688,)
    assert (config.maps.scale_choice, config.maps.target_side) == ("release", None)  # 208
    assert (config.head.fc6, config.head.fc7, config.head.dropout) == (4096, 4096, 0.5)
    assert (config.finetune.positive_share, config.finetune.positive_overlap) == (0.25, 0.5)
    assert config.finetune.negative_overlap == (0.1, 0.5)
    assert (config.svm.C, config.svm.bias_multiplier, config.svm.positive_weight) == (1e-3, 10, 2)
    assert (config.svm.mine_above, config.svm.evict_below, config.svm.retrain_after) == (-1.0001, -1.2, 2000)
    assert (config.boxes.ridge, config.boxes.whitening) == (4000, 0.001)
    assert (config.detect.score_threshold, config.detect.nms_overlap, config.detect.max_per_class) == (-1.5, 0.3, 100)


def test_a_file_holds_only_what_differs(file):
    config = load_config(file("name: mine\nmaps: {scales: [480, 688]}"))
    assert config.name == "mine"
    assert config.maps.scales == (480, 688)
    assert config.maps.storage == Config().maps.storage


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("maps.scales=[480,688]", lambda c: c.maps.scales == (480, 688)),
        ("svm.C=0.01", lambda c: c.svm.C == 0.01),
        ("finetune.flip=false", lambda c: c.finetune.flip is False),
        ("data.classes=[cat, dog]", lambda c: c.data.classes == ("cat", "dog")),
        ("data.classes=null", lambda c: c.data.classes is None),
        ("backbone.weights.source=random", lambda c: c.backbone.weights.source == "random"),
        (
            "train_proposals=[{method: selective_search}, {method: edge_boxes, min_side: 9}]",
            lambda c: (
                [(p.method, p.min_side) for p in c.train_proposals] == [("selective_search", 20), ("edge_boxes", 9)]
            ),
        ),
        ("head.checkpoint=a=b.safetensors", lambda c: c.head.checkpoint == Path("a=b.safetensors")),
    ],
)
def test_overrides_are_yaml_values(file, override, value):
    assert value(load_config(file("svm: {C: 5}"), [override]))


def test_the_last_override_counts_and_leaves_its_section_alone(file):
    config = load_config(file("svm: {C: 5, retrain_after: 3}"), ["svm.C=1", "svm.C=2"])
    assert (config.svm.C, config.svm.retrain_after) == (2, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("svm.C", r"--set svm\.C: expected key=value, e\.g\. --set maps\.scales"),
        ("=3", r"--set =3: expected key=value"),
        ("svm.C=[", r"--set svm\.C=\[: the value is not valid YAML"),
        ("name.x=3", r"--set name\.x=3: name is not a section"),
        ("svm.layers=fc6", r"unknown setting svm\.layers; did you mean svm\.layer\?"),
        ("svm.epochs=3", r"unknown setting svm\.epochs; known here: layer, "),
        (
            "train_proposals=[{}, {max_window: 9}]",
            r"train_proposals\.1\.max_window; did you mean train_proposals\.1\.max_windows\?",
        ),
        (
            "train_proposals=[{method: sliding}]",
            r"--set train_proposals=.*: train_proposals\.0\.method: Input should be 'sel",
        ),
        ("train_proposals=edge_boxes", r"train_proposals: expected a list in square brackets, .*, got 'edge_boxes'"),
        ("train_proposals=[edge_boxes]", r"train_proposals\.0: expected a section of settings, got 'edge_boxes'"),
        ("train_proposals=[{min_side: true}]", r"train_proposals\.0\.min_side: expected a whole number, got True"),
        ("svm.C=much", r"svm\.C: expected a number, got 'much'"),
    ],
)
def test_a_bad_override_says_what_is_wrong(file, override, message):
    with pytest.raises(SppnetError, match=message):
        load_config(file("name: here"), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scales: [480]", r"settings\.yaml: unknown setting scales; known here: name, precision, data, proposals"),
        ("map: {scales: [480]}", r"unknown setting map; did you mean maps\?"),
        ("maps: {scale: [480]}", r"unknown setting maps\.scale; did you mean maps\.scales\?"),
        (
            "backbone: {weights: {means: [1, 2, 3]}}",
            r"unknown setting backbone\.weights\.means; did you mean backbone\.weights\.mean\?",
        ),
        ("3: 4", r"unknown setting 3; known here"),
        ("- 1", r"expected a mapping of settings, got list"),
        ("just text", r"expected a mapping of settings, got str"),
        ("a: [", r"settings\.yaml: not valid YAML"),
        ("!!python/object/apply:os.system [echo]", r"not valid YAML"),
        ("maps: {storage: float8}", r"maps\.storage: Input should be 'float32' or 'float16', got 'float8'"),
        ("maps: 688", r"settings\.yaml: maps: .*, got 688"),
        ("head: {dropout: 1}", r"head\.dropout: Input should be less than 1, got 1"),
        ("maps: {scales: [8]}", r"maps\.scales\.0: Input should be greater than or equal to 16, got 8"),
        ("pyramid: {levels: []}", r"pyramid\.levels: expected a list with something in it"),
        ("finetune: {steps: [5]}", r"steps has 1 phase but learning_rates has 3; give one learning rate per phase"),
        (
            "backbone: {weights: {source: file}}",
            r"source is 'file' but no file is named; set backbone\.weights\.file=PATH",
        ),
    ],
)
def test_a_bad_file_says_what_is_wrong(file, text, message):
    with pytest.raises(SppnetError, match=message):
        load_config(file(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        SppnetError, match=r"none\.yaml: cannot read the configuration \(No such file.*give an existing YAML"
    ):
        load_config(tmp_path / "none.yaml")


def test_a_folder_or_bytes_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(SppnetError, match=r"cannot read the configuration \(Is a directory\)"):
        load_config(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(SppnetError, match=r"bytes\.yaml: not valid YAML"):
        load_config(tmp_path / "bytes.yaml")


def test_a_dumped_configuration_reads_back_equal(file):
    changes = {
        "maps": {"scales": [480, 688]},
        "data": {"root": "/some where", "classes": ["no", "1e3"]},
        "head": {"checkpoint": "x"},
    }
    config = parse_config(changes, "test")
    assert load_config(file(dump_config(config))) == config
    assert load_config(file(dump_config(Config()))) == Config()


@given(
    st.floats(1e-6, 1e6, allow_nan=False),
    st.lists(st.integers(16, 4000), min_size=1, max_size=5),
    st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1), min_size=1).map(tuple),
)
def test_any_values_read_back_equal(rate, scales, classes):
    config = parse_config({"svm": {"C": rate}, "maps": {"scales": scales}, "data": {"classes": classes}}, "test")
    assert parse_config(yaml.safe_load(dump_config(config)), "test") == config


@pytest.mark.parametrize("path", [path for path in CONFIGS if "_5scale" in path.stem], ids=lambda path: path.stem)
def test_five_scales_differ_from_one_in_name_and_scales_alone(path):
    five = load_config(path)
    one = next(load_config(p) for p in CONFIGS if p.stem in (path.stem[:-7], path.stem.replace("_5scale", "_1scale")))
    maps = one.maps.model_copy(update={"scales": five.maps.scales})
    assert five == one.model_copy(update={"name": five.name, "maps": maps})
    nearest = [
        min(range(1, 2000, 32), key=lambda own, side=side: abs(own - side)) for side in (480, 576, 688, 864, 1200)
    ]
    assert list(five.maps.scales) == (nearest if "mobilenet" in path.stem else [480, 576, 688, 864, 1200])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_of_the_project_can_be_read(path):
    assert load_config(path).name == path.stem


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
         r"multiply by 255: mean=\[123\.675, 116\.28, 103\.53\], std=\[58\.395, 57\.12, 57\.375\]"),
        ({"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}, r"mean=\[127\.5, 127\.5, 127\.5\], std=\[127\.5, "),
        ({"mean": [0.485, 0.456, 0.406], "std": [1, 1, 1]}, r"multiply by 255: mean=\[123\.675, 116\.28, 103\.53\]$"),
        ({"mean": [0.48, 0.45, 0.4]}, "multiply by 255: mean="),
        ({"mean": [0, 0, 0], "std": [0.229, 0.224, 0.225]}, r"multiply by 255: std=\[58\.395"),
        ({"std": [0.017, 0.017, 0.017]}, r"multiply by 255: std=\["),
        ({"mean": [1, 1, 1], "std": [1, 1, 1]}, r"mean=\[255"),
        ({"mean": [123, 116, 0.4]}, "multiply by 255"),
        ({"mean": [300, 116, 103]}, r"mean\.0: Input should be less than or equal to 255, got 300"),
        ({"mean": [-123, 116, 103]}, r"mean\.0: Input should be greater than or equal to 0"),
        ({"mean": [float("nan"), 116, 103]}, "expected a finite number"),
        ({"std": [0, 57, 57]}, "greater than 0"),
        ({"std": [-58, 57, 57]}, "greater than 0"),
        ({"std": [float("nan"), 57, 57]}, "finite number|greater than 0"),
        ({"mean": [0.5, 0.5]}, r"backbone\.weights\.mean: expected three numbers, .* got \[0\.5, 0\.5\]"),
        ({"std": [1, 1, 1, 1]}, "expected three numbers"),
        ({"mean": 127.5}, r"expected three numbers, .* got 127\.5"),
        ({"mean": "imagenet"}, "expected three numbers"),
    ],
)  # fmt: skip
def test_preprocessing_of_pixels_from_0_to_1_is_refused_with_the_values_to_write(values, message):
    with pytest.raises(SppnetError, match=message):
        parse_config({"backbone": {"weights": values}}, "test")


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0, 0, 0), (1, 1, 1)), ((0, 0, 0), (255, 255, 255)), ((127.5,) * 3, (127.5,) * 3), ((104, 117, 123), (1, 1, 1)),
     ((128,) * 3, (128,) * 3), ((1, 2, 3), (58, 57, 57)), ((0, 0, 0), (256, 256, 256))],
)  # fmt: skip
def test_preprocessing_that_is_in_use_is_accepted(mean, std):
    assert WeightsSettings(mean=mean, std=std).mean == mean


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().svm.C = 3


def test_settings_made_in_python_refuse_unknown_names_too():
    with pytest.raises(SppnetError, match=r"^unknown setting batches; did you mean batch\?$"):
        FinetuneSettings(batches=3)
    with pytest.raises(SppnetError, match="source is 'file' but no file is named"):
        WeightsSettings(source="file")
    with pytest.raises(SppnetError, match=r"^C: expected a number, got 'much'$"):
        SVMSettings(C="much")
    with pytest.raises(SppnetError, match=r"^overlap: Input should be less than or equal to 1, got 3$"):
        BoxRegressionSettings(overlap=3)
    with pytest.raises(SppnetError, match=r"^svm\.C: Input should be greater than 0, got -1$"):
        Config(svm={"C": -1})
    with pytest.raises(SppnetError, match=r"^finetune: steps has 1 phase"):
        Config.model_validate({"finetune": {"steps": [1]}})
    with pytest.raises(SppnetError, match=r"^svm: expected a section of settings, got 3$"):
        Config(svm=3)
    assert pickle.loads(pickle.dumps(Config(svm={"C": 3}))).svm == SVMSettings(C=3)


@pytest.mark.parametrize(("path", "overrides"), [(None, ()), (3, ()), (b"a.yaml", ()), ("", [None]), ("", [3])])
def test_what_is_no_path_and_no_override_is_refused(file, path, overrides):
    with pytest.raises(SppnetError, match=r"expected (the path of a YAML file|key=value)"):
        load_config(file("") if path == "" else path, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finetune.step=[1]"], r"^--set finetune\.step=\[1\]: unknown setting finetune\.step; did you mean"),
        (["svm.seed=1", "svm.C=0", "name=b"], r"^--set svm\.C=0: svm\.C: Input should be greater than 0"),
        (["svm={C: 0}"], r"^--set svm=\{C: 0\}: svm\.C: Input"),
        (["finetune.steps=[5]"], r"^.*settings\.yaml with --set finetune\.steps=\[5\]: finetune: steps has 1 phase"),
        (["svm.seed=1"], r"^[^ ]*settings\.yaml: maps\.scales: expected a list"),
    ],
)
def test_an_error_of_an_override_names_the_override(file, overrides, message):
    wrong = "maps: {scales: 3}" if "maps" in message else ""
    with pytest.raises(SppnetError, match=message):
        load_config(file(wrong), overrides)


@pytest.mark.parametrize("text", ["1:30", "0x10", "1:30:00", "0b11", "0o10", "12:30.5"])
@pytest.mark.parametrize("key", ["finetune.batch", "svm.C"])
def test_numbers_of_another_base_are_refused(file, key, text):
    section, name = key.split(".")
    with pytest.raises(SppnetError, match=rf"{key}: expected a (whole )?number, got '{text}'"):
        load_config(file(f"{section}: {{{name}: {text}}}"))
    with pytest.raises(SppnetError, match=rf"{key}: expected a (whole )?number, got '{text}'"):
        load_config(file(""), [f"{key}={text}"])


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("+7", 7), ("0012", 12), ("3.0", 3), ("100", 100)])
def test_whole_numbers_are_decimal(file, text, value):
    assert load_config(file(f"finetune: {{batch: {text}}}")).finetune.batch == value
    assert value == load_config(file(f"svm: {{C: {text}}}")).svm.C


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", r"name stands twice, in lines 1 and 2; leave one out"),
        ("svm:\n  C: 1\n  seed: 3\n  C: 2\n", r"C stands twice, in lines 2 and 4"),
        ("svm: {C: 1}\nmaps: {max_side: 64}\nsvm: {seed: 1}\n", r"svm stands twice, in lines 1 and 3"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", r"references \(\*name\) are not read"),
        ("svm:\n\tC: 1\n", r"not valid YAML: .*'\\t'"),
        ("[" * 3000, r"not valid YAML: "),
        ("? [a]\n: b\n", r"not valid YAML: "),
        ("- a\n- b\n", r"expected a mapping of settings, got list"),
        ("name: on\n", r"name: expected text, got True; write it in quotes"),
        ("data: {classes: [1, 2]}\n", r"data\.classes\.0: expected text, got 1; write it in quotes"),
    ],
)
def test_yaml_that_hides_a_slip_is_refused(file, text, message):
    with pytest.raises(SppnetError, match=message):
        load_config(file(text))


def test_an_override_is_read_as_strictly(file):
    with pytest.raises(SppnetError, match=r"--set svm=\{C: 1, C: 2\}: the value is not valid YAML: C stands twice"):
        load_config(file(""), ["svm={C: 1, C: 2}"])


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "nan", "inf", "1e999"])
@pytest.mark.parametrize("key", ["svm.mine_above", "detect.score_threshold", "data.holdout", "backbone.weights.mean"])
def test_numbers_that_are_not_finite_are_refused(file, key, number):
    value = f"[{number}, 1, 1]" if key.endswith("mean") else number
    with pytest.raises(SppnetError, match=rf"{key}.*: (expected a|Input should be)"):
        load_config(file(""), [f"{key}={value}"])


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1E+2", 100), ("0.5e0", 0.5)])
def test_numbers_as_yaml_does_not_read_them_are_numbers(file, text, value):
    assert value == load_config(file(f"svm: {{C: {text}}}")).svm.C
    assert value == load_config(file(""), [f"svm.C={text}"]).svm.C


def test_paths_are_read_as_a_shell_reads_them(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WINDOWS", "w")
    config = load_config(
        file("data: {root: ~/data}\nhead: {checkpoint: $WINDOWS/x}\n"), ["proposals.import_from=[$WINDOWS.npz]"]
    )
    assert config.data.root == tmp_path / "data"
    assert config.head.checkpoint == Path("w/x")
    assert config.proposals.import_from == (Path("w.npz"),)


@pytest.mark.parametrize("name", ["a", "a  # b", "it's  # '", 'a  # "b"', "#", "'  # b"])
def test_settings_are_written_with_reasons_that_are_read_back_and_change_nothing(tmp_path, name):
    path = tmp_path / "config.yaml"
    data = {"root": "a b " * 60, "train": ["x # y", name]}
    config = parse_config({"name": name, "data": data, "maps": {"scales": [481, 961]}}, "test")
    reasons = {"name": "the folder's", "maps.scales": "two: # 1", "backbone.weights.source": "no download"}
    write_settings(path, config, {"maps.scales": "two"})
    assert read_reasons(path) == {"maps.scales": "two"}
    write_settings(path, config, reasons)
    assert load_config(path) == config
    assert read_reasons(path) == reasons
    assert "    source: torchvision  # no download\n" in path.read_text()
    before = path.stat().st_mtime_ns
    write_settings(path, config)  # reasons of a run stay as long as its settings
    assert (path.stat().st_mtime_ns, read_reasons(path)) == (before, reasons)
    write_settings(path, Config())
    assert (load_config(path), read_reasons(path)) == (Config(), {})


def test_a_setting_of_before_whose_only_value_is_left_is_no_error(file):
    kept = "proposals: {mode: fast, min_side: 9}\ntrain_proposals: [{mode: fast}]\ndetect: {refine: 0}"
    config = load_config(file(kept))
    assert (config.proposals.min_side, len(config.train_proposals)) == (9, 1)
    for text, name in (("proposals: {mode: quality}", "proposals.mode"), ("detect: {refine: 1}", "detect.refine")):
        with pytest.raises(SppnetError, match=name):
            load_config(file(text))
