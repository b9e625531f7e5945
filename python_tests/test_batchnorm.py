"""Batch-norm statistics: recalibrated alone, and beside those of the dense network."""

import copy

import pytest
import torch
from torch import nn

import cmd_ext
from cmd_ext.batchnorm import Norms, named_norms, recalibrate
from cmd_ext.calibrate import batches_of, outputs


class Net(nn.Module):
    """A norm that is called twice, one that is called once, and one that only some inputs reach."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.twice = nn.BatchNorm2d(6)
        self.mix = nn.Conv2d(6, 6, 1)
        self.once = nn.BatchNorm2d(6)
        self.seldom = nn.BatchNorm1d(6)

    def forward(self, x):
        y = self.twice(self.mix(self.twice(self.conv(x)).relu()))
        y = self.once(self.mix(y)).mean((2, 3))
        return self.seldom(y) if len(x) == 5 else y


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    for norm in named_norms(net).values():
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return net.eval()


def images(count=3, size=8):
    torch.manual_seed(1)
    return [torch.randn(size, 3, 9, 9) + 0.5 for _ in range(count)]


def statistics(model):
    return {name: (m.running_mean.clone(), m.running_var.clone()) for name, m in named_norms(model).items()}


def close(got, want, **tolerance):
    for name, pair in want.items():
        for a, b in zip(got[name], pair, strict=True):
            torch.testing.assert_close(a, b, **({"rtol": 1e-4, "atol": 1e-5} | tolerance), msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_an_unchanged_network_keeps_its_statistics(net):
    twin = copy.deepcopy(net)
    cmd_ext.recalibrate_batchnorm(twin, images(), reference=net)
    close(statistics(twin), statistics(net))


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_what_an_affine_map_changed_is_undone(net, offset):
    """Each channel scaled and shifted in front of a norm: afterwards the outputs are those of the dense network."""
    dense = nn.Sequential(net.conv, nn.BatchNorm2d(6), nn.ReLU(), net.mix).eval()
    dense[1].running_mean += offset
    model = copy.deepcopy(dense)
    scales, shifts = torch.tensor([0.5, 2, 1, 0.9, 1.3, -1]), torch.randn(6) + offset
    model[0].bias = nn.Parameter(shifts * 1.0)
    with torch.no_grad():
        model[0].weight *= scales.abs()[:, None, None, None]
    assert not torch.allclose(model(images()[0]), dense(images()[0]), rtol=1e-2)
    cmd_ext.recalibrate_batchnorm(model, images(), reference=dense)
    torch.testing.assert_close(model(images()[0]), dense(images()[0]), rtol=2e-3, atol=2e-3)


def test_the_whole_share_is_that_of_the_data_alone(net):
    alone, beside = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        alone.conv.weight += 0.1
        beside.conv.weight += 0.1
    cmd_ext.recalibrate_batchnorm(alone, images(size=64))
    cmd_ext.recalibrate_batchnorm(beside, images(size=64), reference=net, share=1)
    del alone.seldom, beside.seldom  # not reached: alone it starts anew
    close(statistics(beside), statistics(alone), rtol=2e-3, atol=1e-3)  # variances: of the sample, of the population


def test_shares_lie_between(net):
    models = [copy.deepcopy(net) for _ in range(3)]
    for model, share in zip(models, (0, 0.5, 1), strict=True):
        with torch.no_grad():
            model.conv.weight *= 1.5
        cmd_ext.recalibrate_batchnorm(model, images(), reference=net, share=share)
    low, middle, high = (statistics(model)["once"][1] for model in models)
    assert not torch.equal(low, high)
    first = [statistics(model)["twice"] for model in models]
    assert all(((a < b) == (b < c)).all() for a, b, c in zip(*first, strict=True))
    assert middle.isfinite().all()


def test_a_norm_that_some_batches_reach_goes_by_these(net):
    data = [*images(), *images(1, 5)]
    model = copy.deepcopy(net)
    cmd_ext.recalibrate_batchnorm(model, data[:3], reference=net, share=1)
    close({"seldom": statistics(model)["seldom"]}, {"seldom": statistics(net)["seldom"]})
    cmd_ext.recalibrate_batchnorm(model, data, reference=net, share=1)
    assert not torch.allclose(statistics(model)["seldom"][1], statistics(net)["seldom"][1], rtol=0.1)


def test_dead_channels_and_one_image(net):
    model = copy.deepcopy(net)
    with torch.no_grad():
        model.conv.weight[2] = 0
        model.conv.weight[3] = 1e-30
        net.conv.weight[3] = 0
    cmd_ext.recalibrate_batchnorm(model, images(1, 1), reference=net)
    assert all(t.isfinite().all() for pair in statistics(model).values() for t in pair)
    assert all((var >= 0).all() for _, var in statistics(model).values())
    assert outputs(model, batches_of(images(1, 1)))[0].isfinite().all()


def test_a_part_of_the_batches(net):
    model, other = copy.deepcopy(net), copy.deepcopy(net)
    norms = Norms.of(net, batches_of(images()))
    recalibrate(model, batches_of(images()[:1]), norms)
    recalibrate(other, batches_of(images()[:1]), Norms.of(net, batches_of(images()[:1])))
    close(statistics(model), statistics(other), rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_empty_batches_count_for_nothing(net, memory_format):
    model, other = copy.deepcopy(net), copy.deepcopy(net)
    data = [x.to(memory_format=memory_format) for x in images()]
    cmd_ext.recalibrate_batchnorm(model, [data[0][:0], *data, data[0][:0]], reference=net, share=0.5)
    cmd_ext.recalibrate_batchnorm(other, images(), reference=net, share=0.5)
    close(statistics(model), statistics(other))


def test_modes_counts_and_lower_precision(net):
    model = copy.deepcopy(net).train()
    model.mix.eval()
    state = copy.deepcopy(net.state_dict())
    cmd_ext.recalibrate_batchnorm(model, images(), reference=net)
    assert (model.training, model.mix.training, model.once.training, net.training) == (True, False, True, False)
    assert model.once.num_batches_tracked == 0
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert not any(norm._forward_pre_hooks for norm in (*named_norms(model).values(), *named_norms(net).values()))
    half, twin = copy.deepcopy(net).bfloat16(), copy.deepcopy(net).bfloat16()
    cmd_ext.recalibrate_batchnorm(half, [x.bfloat16() for x in images()], reference=twin)
    close(statistics(half), statistics(twin), rtol=0.02, atol=0.02)


def test_it_fails_with_one_line(net):
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 1.5"):
        cmd_ext.recalibrate_batchnorm(net, images(), reference=net, share=1.5)
    with pytest.raises(ValueError, match="reference must have the batch norms of model, got no 'twice'"):
        cmd_ext.recalibrate_batchnorm(net, images(), reference=nn.Sequential())
    with pytest.raises(ValueError, match="empty"):
        cmd_ext.recalibrate_batchnorm(net, [], reference=net)
    plain = nn.Linear(2, 2)
    assert cmd_ext.recalibrate_batchnorm(plain, [torch.ones(1, 2)], reference=plain) is plain


def test_the_share_is_what_suits_the_dense_network():
    """None where the targets belong to the running statistics, however unsure; some where they belong to the data's."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval(), torch.randn(256, 4)
    own, data = copy.deepcopy(model), cmd_ext.recalibrate_batchnorm(copy.deepcopy(model), [x])
    with torch.no_grad():
        for network in (model, own, data):
            network[1].weight *= 10
        model[0].running_mean += 1
        own[0].running_mean += 1
        reference = [model(x)]
        for labels, share in ((own(x).argmax(1), 0), (data(x).argmax(1), 0.75)):
            assert Norms.suited(model, [(x, labels)], reference).share == share
    assert Norms.suited(model, [(x, None)], reference).share == 0
    assert Norms.suited(nn.Linear(4, 3), [(x, labels)], reference).running == {}
