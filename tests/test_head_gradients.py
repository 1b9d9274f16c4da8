"""The written-out gradients against autograd's."""

import pytest
import torch
import torch.nn.functional as F

from sppnet.config import HeadSettings
from sppnet.detection.head_gradients import HeadGradients
from sppnet.network.sppnet import build_head


def make_head(dropout, ranks=None):
    head = build_head(3, (1, 2), 4, HeadSettings(fc6=24, fc7=16, dropout=dropout), ranks=ranks)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    head.input_scale.fill_(0.7)
    return head.train()


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 15, generator=generator), torch.randint(4, (32,), generator=generator)


@pytest.fixture(autouse=True)
def _same_random_numbers(monkeypatch):
    """Autograd's head drops the units that the same uniform numbers drop."""

    def dropout(hidden, share, training):
        return hidden * ((torch.rand(hidden.shape) < 1 - share) / (1 - share)) if training else hidden

    monkeypatch.setattr(F, "dropout", dropout)


def autograd(head, pooled, labels, precision):
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        logits = head(pooled).float()
    loss = F.cross_entropy(logits, labels)
    return logits, dict(zip(dict(head.named_parameters()), torch.autograd.grad(loss, head.parameters()), strict=True))


@pytest.mark.parametrize("ranks", [None, {"fc6": 5}, {"fc7": 6}, {"fc6": 5, "fc7": 6}])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_gradients_are_those_of_autograd_with_the_same_dropout(precision, tolerance, dropout, ranks):
    head, (pooled, labels) = make_head(dropout, ranks), batch()
    expected_logits, expected = autograd(head, pooled, labels, precision)
    gradients = HeadGradients(head, precision)
    torch.manual_seed(5)
    logits = gradients(pooled, labels)
    torch.testing.assert_close(logits, expected_logits, rtol=tolerance, atol=tolerance)
    if precision == "bfloat16":  # and not float32, which is close to both
        torch.manual_seed(5)
        assert (HeadGradients(head)(pooled, labels) - logits).abs().max() > 1e-3
        torch.manual_seed(5)
        gradients(pooled, labels)
    for name, parameter in head.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= tolerance * expected[name].norm(), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_changed_weight_is_seen_by_the_next_step_and_memory_stays(precision):
    head, (pooled, labels) = make_head(0.0), batch()
    gradients = HeadGradients(head, precision)
    before = gradients(pooled, labels)
    places = [parameter.grad.data_ptr() for parameter in head.parameters()]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(0.5)
    after = gradients(pooled, labels)
    expected, _ = autograd(head, pooled, labels, precision)
    torch.testing.assert_close(after, expected, rtol=0.02, atol=0.02)
    assert not torch.allclose(after, before, atol=0.1)
    assert [parameter.grad.data_ptr() for parameter in head.parameters()] == places


def test_dropout_drops_its_share_and_keeps_the_mean():
    gradients = HeadGradients(make_head(0.3))
    mask = gradients._mask(torch.zeros(400, 500))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (mask == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
