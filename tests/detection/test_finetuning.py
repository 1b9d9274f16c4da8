"""Training the fc layers on a toy problem, interrupting it, and what it reports."""

import copy
import csv
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doubles import ToyWindows

from sppnet import distributed
from sppnet.artifacts import read_tensors
from sppnet.config import FinetuneSettings, HeadSettings
from sppnet.detection.finetuning import choose_images, draw_batch, finetune_head, validation_windows
from sppnet.detection.training_windows import LabelledWindows
from sppnet.errors import SppnetError
from sppnet.models.sppnet import build_head

CLASSES = 3
SETTINGS = FinetuneSettings(
    steps=(40, 20), learning_rates=(0.1, 0.01), batch=32, images_per_batch=4, validate_every=10, validate_windows=128
)


def toy_head(seed=0):
    head = build_head(12, (1,), CLASSES + 1, HeadSettings(fc6=24, fc7=24, dropout=0.2), seed)
    for layer in (head.fc6, head.fc7):
        torch.nn.init.kaiming_normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    return head


def train(folder, head=None, settings=SETTINGS, source=None, validation=None, precision="float32"):
    head = head or toy_head()
    source, validation = source or ToyWindows(8, CLASSES, 1), validation or ToyWindows(4, CLASSES, 2)
    done = finetune_head(head, source, validation, CLASSES, settings, folder, progress=False, precision=precision)
    return head, done


def rows_of(folder):
    with (folder / "log.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def same(first, second):
    return all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_a_separable_problem_is_learned(tmp_path):
    head, done = train(tmp_path)
    assert done.untrained_error == pytest.approx(0.25)
    assert done.best_error < 0.02
    assert (done.steps, done.reused_steps) == (60, 0)
    assert not head.training
    rows = rows_of(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"] / 3


def test_the_log_has_a_row_a_validation_with_the_rate_of_its_phase(tmp_path):
    train(tmp_path, settings=SETTINGS.model_copy(update={"steps": (40, 15)}))
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 55]
    assert [row["learning_rate"] for row in rows] == [0.1, 0.1, 0.1, 0.1, 0.01, 0.01]


def test_the_head_ends_with_the_weights_of_its_best_step(tmp_path):
    head, done = train(tmp_path)
    rows = rows_of(tmp_path)
    best = min(rows, key=lambda row: (round(1 - row["val_accuracy"], 9), row["val_loss"]))
    assert (done.best_step, done.best_error) == (best["step"], pytest.approx(1 - best["val_accuracy"]))
    pooled, labels = validation_windows(ToyWindows(4, CLASSES, 2), CLASSES, SETTINGS)
    with torch.no_grad():
        assert F.cross_entropy(head(pooled), labels).item() == pytest.approx(best["val_loss"], rel=1e-5)


class Interrupting(ToyWindows):
    """Ctrl-C while a batch is pooled."""

    def __init__(self, after):
        super().__init__(8, CLASSES, 1)
        self.after = after

    def pool(self, image, rows, rng):
        if self.pooled >= self.after:
            raise KeyboardInterrupt
        return super().pool(image, rows, rng)


@pytest.mark.parametrize("images", [3, 60, 130, 200])  # pooled before the interruption; 4 a step
def test_an_interrupted_training_ends_bit_for_bit_like_one_that_was_not(tmp_path, images):
    whole, expected = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", source=Interrupting(images))
    head, done = train(tmp_path / "parts")
    assert done.reused_steps == images // 4 // 10 * 10
    assert same(head, whole)
    assert (done.best_step, done.best_error) == (expected.best_step, expected.best_error)
    assert (tmp_path / "parts" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()


def test_a_finished_training_is_not_repeated(tmp_path):
    whole, _ = train(tmp_path)
    source = ToyWindows(8, CLASSES, 1)
    head, done = train(tmp_path, source=source)
    assert (done.reused_steps, source.pooled) == (60, 0)
    assert same(head, whole)


def test_training_is_the_same_twice_and_leaves_the_global_generator_alone(tmp_path):
    before = torch.random.get_rng_state()
    first, _ = train(tmp_path / "1")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again, _ = train(tmp_path / "2")
    other, _ = train(tmp_path / "3", settings=SETTINGS.model_copy(update={"seed": 1}))
    assert same(first, again)
    assert not same(first, other)


def test_training_on_the_cpu_opens_no_context_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail(f"asked {device} for its state"))
    train(tmp_path, settings=SETTINGS.model_copy(update={"steps": (1, 1), "validate_every": 1}))


class TwoWindows:
    """One image with a window of class 1 and one of the background: with a balanced batch every step is the same."""

    def __init__(self):
        self.labelled = [LabelledWindows(np.array([0]), np.array([1]), np.array([1]))]
        self.rows = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))

    def pool(self, image, rows, rng):
        return self.rows[torch.from_numpy(rows)]


def test_steps_are_sgd_with_momentum_decay_on_weights_and_double_rate_on_biases(tmp_path):
    changes = {"steps": (3,), "learning_rates": (0.1,), "weight_decay": 0.2, "validate_every": 3}
    settings = SETTINGS.model_copy(update={**changes, "batch": 4, "positive_share": 0.5})
    head = build_head(12, (1,), CLASSES + 1, HeadSettings(fc6=5, fc7=5, dropout=0), 0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    naive, windows = copy.deepcopy(head).double(), TwoWindows()
    velocity = {name: torch.zeros_like(parameter) for name, parameter in naive.named_parameters()}
    for _ in range(3):
        naive.zero_grad()
        F.cross_entropy(naive(windows.rows.double()), torch.tensor([1, CLASSES])).backward()
        with torch.no_grad():
            for name, parameter in naive.named_parameters():
                bias = name.endswith("bias")
                gradient = parameter.grad + (0 if bias else 0.2 * parameter)
                velocity[name] = 0.9 * velocity[name] + gradient
                parameter -= (0.2 if bias else 0.1) * velocity[name]
    train(tmp_path, head, settings, windows, windows)
    for name, parameter in naive.named_parameters():
        torch.testing.assert_close(head.state_dict()[name].double(), parameter.detach(), rtol=1e-4, atol=1e-6)


def test_without_momentum_the_state_is_saved_and_read_too(tmp_path):
    settings = SETTINGS.model_copy(update={"momentum": 0.0})
    whole, _ = train(tmp_path, settings=settings)
    assert not [name for name in read_tensors(tmp_path / "checkpoint.safetensors") if name.startswith("momentum")]
    head, done = train(tmp_path, settings=settings)
    assert done.reused_steps == 60
    assert same(head, whole)


def test_half_precision_learns_too(tmp_path):
    head, done = train(tmp_path / "half", precision="bfloat16")
    assert done.best_error < 0.02
    whole, _ = train(tmp_path / "whole")
    assert (head.fc6.weight - whole.fc6.weight).norm() > 1e-4 * whole.fc6.weight.norm()


def test_a_loss_that_is_not_finite_is_an_error_with_the_settings_to_change(tmp_path):
    wild = SETTINGS.model_copy(update={"learning_rates": (1e9, 1e9)})
    message = r"the loss is not finite at step 10; lower finetune\.learning_rates, or set head\.input_norm=300"
    with pytest.raises(SppnetError, match=message):
        train(tmp_path, settings=wild)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def without_positives(images):
    source = ToyWindows(images, CLASSES, 1)
    none = np.zeros(0, np.int64)
    source.labelled = [LabelledWindows(none, none, own.negatives) for own in source.labelled]
    return source


@pytest.mark.parametrize("images", [0, 3])
def test_a_source_without_positives_is_an_error_that_says_which(tmp_path, images):
    with pytest.raises(
        SppnetError, match=r"no training window overlaps an object by finetune\.positive_overlap; check"
    ):
        train(tmp_path, source=without_positives(images))
    with pytest.raises(SppnetError, match="no validation window overlaps an object"):
        train(tmp_path, validation=without_positives(images))


def test_images_without_positives_are_passed_over(tmp_path):
    source = ToyWindows(6, CLASSES, 1)
    empty = LabelledWindows(*[np.zeros(0, np.int64)] * 3)
    source.labelled = [*source.labelled[:3], empty, empty, empty]
    _, done = train(tmp_path, source=source)
    assert done.best_error < 0.05


def test_fewer_images_than_a_batch_wants_are_enough(tmp_path):
    _, done = train(tmp_path, source=ToyWindows(1, CLASSES, 1), validation=ToyWindows(1, CLASSES, 2))
    assert done.steps == 60


def test_an_error_while_windows_are_pooled_comes_out(tmp_path):
    class Broken(ToyWindows):
        def pool(self, image, rows, rng):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path, source=Broken(4, CLASSES, 1))


# ---- the windows that the best step is chosen on --------------------------------------------------------------------


class Recorded:
    """300 images of a positive and a negative; notes which images were pooled and what the generator gave."""

    def __init__(self):
        self.labelled = [LabelledWindows(np.array([0]), np.array([0]), np.array([1]))] * 300
        self.images, self.drawn = set(), []

    def pool(self, image, rows, rng):
        self.images.add(image)
        self.drawn.append(rng.random())
        return torch.zeros(len(rows), 2)


def test_validation_windows_come_from_every_image_with_a_positive():
    source = Recorded()
    pooled, labels = validation_windows(source, 1, FinetuneSettings(validate_windows=1200))
    assert source.images == set(range(300))
    assert len(labels) == len(pooled) == 1200


def test_validation_windows_are_drawn_from_a_stream_that_no_training_step_has(monkeypatch):
    source, streams = Recorded(), []
    default_rng = np.random.default_rng

    def recording(seed):
        streams.append(default_rng(seed).random(4).tolist())
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", recording)
    validation_windows(source, 1, FinetuneSettings())
    steps = [default_rng((0, step, rank)).random(4).tolist() for step in range(50) for rank in range(3)]
    assert len(streams) == 1
    assert streams[0] not in steps


# ---- batches -------------------------------------------------------------------------------------------------------


BATCHES = FinetuneSettings(batch=64, positive_share=0.25)


def labelled(positives=(), labels=None, negatives=()):
    own = np.array(positives, np.int64)
    return LabelledWindows(
        own, np.zeros(len(own), np.int64) if labels is None else np.array(labels), np.array(negatives, np.int64)
    )


@pytest.mark.parametrize(
    ("searched", "alone", "count", "expected"),
    [(20, 30, 8, (4, 4)), (20, 30, 7, (4, 3)), (20, 3, 8, (5, 3)), (2, 30, 8, (2, 4)), (20, 30, 1, (1, 0))],
)
def test_half_of_the_images_of_a_batch_show_objects_alone_and_the_others_have_negatives(
    searched, alone, count, expected
):
    images = np.arange(100, 100 + searched + alone)
    marks = np.random.default_rng(0).permutation(np.arange(len(images)) < alone)
    drawn = Counter()
    for seed in range(200):
        found = choose_images(images, marks, count, np.random.default_rng(seed))
        kinds = marks[found - 100]
        assert (int((~kinds).sum()), int(kinds.sum())) == expected
        assert len(set(found.tolist())) == len(found)
        drawn.update(found.tolist())
    assert len(drawn) == sum(n for n, own in zip((searched, alone), expected, strict=True) if own)


def test_without_such_images_they_are_drawn_as_ever():
    images, none = np.arange(3, 40), np.zeros(37, bool)
    for count in (5, 37, 50):
        expected = np.random.default_rng(1).choice(images, min(count, 37), replace=False)
        assert choose_images(images, none, count, np.random.default_rng(1)).tolist() == expected.tolist()


def test_a_batch_holds_its_share_of_positives_with_their_labels():
    images = [labelled([3, 5], [1, 0], [7, 8, 9]), labelled([2], [2], [4])]
    image, row, label = draw_batch(images, 3, BATCHES, np.random.default_rng(0))
    assert len(row) == len(image) == len(label) == 64
    assert (label != 3).sum() == 16
    right = {(0, 3): 1, (0, 5): 0, (1, 2): 2, (0, 7): 3, (0, 8): 3, (0, 9): 3, (1, 4): 3}
    assert dict(zip(zip(image.tolist(), row.tolist(), strict=True), label.tolist(), strict=True)) == right


def test_a_crowded_image_gives_no_more_than_the_others():
    images = [labelled(range(100), None, range(100, 900)), labelled([0], None, [1]), labelled([0], None, [1])]
    image, _, label = draw_batch(images, 1, BATCHES, np.random.default_rng(0))
    for background in (False, True):
        counts = Counter(image[(label == 1) == background].tolist())
        assert max(counts.values()) - min(counts.values()) <= 1


def test_balanced_every_class_of_an_image_is_as_likely_and_every_window_of_a_class():
    images = [labelled(range(10), [0] * 7 + [1] * 2 + [2], range(10, 12))]
    settings = BATCHES.model_copy(update={"batch": 12_000, "positive_share": 0.5, "balance": True})
    _, rows, _ = draw_batch(images, 3, settings, np.random.default_rng(0))
    counts = np.bincount(rows, minlength=10)[:10]
    assert counts.sum() == 6000
    expected = 2000 / np.array([7] * 7 + [2] * 2 + [1])
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_unbalanced_every_positive_of_an_image_is_as_likely_whatever_its_class():
    images = [labelled(range(10), [0] * 7 + [1] * 2 + [2], range(10, 12))]
    settings = BATCHES.model_copy(update={"batch": 12_000, "positive_share": 0.5})
    counts = np.bincount(draw_batch(images, 3, settings, np.random.default_rng(0))[1], minlength=10)[:10]
    assert counts.sum() == 6000
    assert (abs(counts - 600) < 5 * np.sqrt(600)).all()


def test_every_window_of_an_image_is_as_likely():
    images = [labelled(range(4), None, range(4, 8))]
    settings = BATCHES.model_copy(update={"batch": 8000, "positive_share": 0.5})
    counts = np.bincount(draw_batch(images, 1, settings, np.random.default_rng(0))[1], minlength=8)
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(1000)


@pytest.mark.parametrize(
    ("images", "positives", "negatives"),
    [
        ([labelled([0], [1]), labelled([1], [0])], 64, 0),
        ([labelled([], [], [1]), labelled([], [], [2])], 0, 64),
        ([labelled([0]), labelled([], [], [2])], 16, 48),
        ([labelled(), labelled()], 0, 0),
        ([], 0, 0),
    ],
    ids=["no negatives", "no positives", "each in another image", "nothing at all", "no images"],
)
def test_where_one_kind_is_missing_the_batch_is_made_of_the_other(images, positives, negatives):
    _, _, label = draw_batch(images, 9, BATCHES, np.random.default_rng(0))
    assert (label != 9).sum() == positives
    assert (label == 9).sum() == negatives


@pytest.mark.parametrize(("share", "positives"), [(0.0, 0), (0.25, 2), (1.0, 8)])
def test_any_share_of_positives_can_be_asked_for(share, positives):
    settings = BATCHES.model_copy(update={"batch": 8, "positive_share": share})
    _, _, label = draw_batch([labelled([0], None, [1])], 5, settings, np.random.default_rng(0))
    assert (label != 5).sum() == positives
    assert len(label) == 8


def test_the_same_generator_draws_the_same_batch():
    images = [labelled(range(9), None, range(9, 40))] * 3
    first, again = (draw_batch(images, 1, BATCHES, np.random.default_rng(4)) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, draw_batch(images, 1, BATCHES, np.random.default_rng(5)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_leaves_the_layers_of_the_head_as_they_were(tmp_path, precision):
    head, _ = train(tmp_path, precision=precision)
    rows = torch.randn(5, head.fc6.in_features, generator=torch.Generator().manual_seed(0))
    expected = head.classifier(head.features(rows, "fc7"))
    plain = copy.deepcopy(head)
    assert all("forward" not in vars(layer) for layer in plain.modules())
    assert torch.equal(plain(rows), expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
@pytest.mark.parametrize("ranks", [{}, {"fc6": 3, "fc7": 4}])
def test_every_parameter_gets_the_gradient_that_autograd_gives(tmp_path, ranks, precision, tolerance):
    """One step with a rate of 1 and nothing else moves each parameter by its gradient; dropout is off."""
    head = build_head(3, (1, 2), CLASSES + 1, HeadSettings(fc6=24, fc7=20, dropout=0.0), seed=3, ranks=ranks)
    for seed, parameter in enumerate(head.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
    before, source, seen = copy.deepcopy(head), ToyWindows(8, CLASSES, 1, features=15), {}
    changes = {"steps": (1,), "learning_rates": (1.0,), "momentum": 0.0, "weight_decay": 0.0, "bias_rate": 1.0}
    one = SETTINGS.model_copy(update=changes)
    pool = source.pool

    def remembered(image, rows, rng):
        seen[image] = pool(image, rows, rng)
        return seen[image]

    source.pool = remembered
    others = ToyWindows(4, CLASSES, 2, features=15)
    finetune_head(head, source, others, CLASSES, one, tmp_path, progress=False, precision=precision)
    rng = np.random.default_rng((one.seed, 0, 0))  # the first step's
    chosen = rng.choice(np.arange(8), min(one.images_per_batch, 8), replace=False)
    position, _, label = draw_batch([source.labelled[i] for i in chosen], CLASSES, one, rng)
    rows = torch.cat([seen[int(chosen[i])] for i in np.unique(position)])
    labels = torch.from_numpy(label[np.argsort(position, kind="stable")])
    F.cross_entropy(before(rows), labels).backward()
    for (name, moved), old in zip(head.named_parameters(), before.parameters(), strict=True):
        gradient = old.detach() - moved.detach()
        assert gradient.abs().max() > 0, name
        assert (gradient - old.grad).norm() <= tolerance * old.grad.norm(), name


def test_a_batch_with_less_than_a_window_for_each_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 9)
    head, windows = build_head(12, (1,), 3, HeadSettings(fc6=8, fc7=8)), ToyWindows(2, 2, 0)
    with pytest.raises(SppnetError, match=r"finetune\.batch=8, less than a window for each of 9 processes; raise it"):
        finetune_head(head, windows, windows, 2, FinetuneSettings(batch=8), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
