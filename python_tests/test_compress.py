"""compress(), plans, profile: what is chosen, what is skipped, what is refused."""

import copy
import itertools
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import cmd_ext
from cmd_ext import CMDConv2d, CMDLinear, Plan, UnsatisfiableError, data, models
from cmd_ext.allocation import Candidate, Layer, allocate, total_costs, uniform
from cmd_ext.batchnorm import Norms, recalibrate_if_better
from cmd_ext.calibrate import accuracy


class Net(nn.Module):
    """A little of everything that compress must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 32, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(32, 32, 2, stride=2, groups=4)
        self.head = nn.Linear(32, 64)
        self.tied = nn.Linear(64, 64)
        self.tied_too = nn.Linear(64, 64)
        self.tied_too.weight = self.tied.weight
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        x = self.norm(self.body(self.stem(x).relu())).relu()
        x = self.up(self.grouped(self.depthwise(x))).mean((2, 3))
        return self.out(self.tied_too(self.tied(self.head(x)).relu()))


def batches(count: int = 2, size: int = 16, targets: bool = True):
    g = torch.Generator().manual_seed(5)
    for _ in range(count):
        x = torch.randn(size, 3, 12, 12, generator=g)
        yield (x, torch.randint(10, (size,), generator=g)) if targets else x


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


@pytest.mark.parametrize("search", ["uniform", "allocate"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_meets_the_constraint_and_leaves_the_model_alone(net, search, calibrated):
    before = copy.deepcopy(net.state_dict())
    x = next(batches())[0]
    calibration = batches(targets=False) if calibrated else None
    result = cmd_ext.compress(
        net, x, constraints={"params": "50%"}, search=search, calibration=calibration, progress=False
    )
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    dense, kept = result.stats.params
    assert dense == sum(p.numel() for p in net.parameters())
    assert kept == sum(p.numel() for p in result.model.parameters()) <= dense / 2
    assert kept > 0.42 * dense  # and spends it
    assert result.model(x).shape == net(x).shape
    assert isinstance(result.model.body, (CMDConv2d, nn.Conv2d))
    if search == "allocate":
        shares = [row["share"] for row in result.front]
        losses = [row["loss"] for row in result.front]
        assert shares == sorted(shares)
        assert losses == sorted(losses, reverse=True)


def test_every_skipped_layer_has_its_reason(net):
    x = next(batches())[0]
    skip = cmd_ext.compress(
        net, x, constraints={"params": "80%"}, filter_fn=lambda name, _: name != "head", progress=False
    ).stats.skipped
    assert skip["stem"] == "too small: 216 weights, fewer than min_size = 1024"
    assert skip["depthwise"] == "depthwise convolution, 9 weights a channel"
    assert skip["up"] == "transposed convolution"
    assert skip["head"] == "excluded by filter_fn"
    assert skip["tied"] == "shared weight (also tied_too)"
    assert skip["tied_too"] == "shared weight (also tied)"
    assert "too small" in skip["out"]


def test_a_layer_that_would_not_pay_stays_dense_and_says_so(net):
    result = cmd_ext.compress(net, next(batches())[0], constraints={"params": "100%"}, progress=False)
    assert "would not pay" in result.stats.skipped["body"]
    assert type(result.model.body) is nn.Conv2d
    assert "body: 32x72 would not pay" in str(result.stats)


def test_overrides_win(net):
    x = next(batches())[0]
    overrides = {
        "head": "dense",
        "body": {"rank": 3, "density": 0.25},
        "grouped": {"budget": 0.5, "sparse_coefficient": 0.0},
        "stem": {"rank": 2, "nnz": 10},
    }
    result = cmd_ext.compress(net, x, constraints={"params": "85%"}, overrides=overrides, progress=False)
    model = result.model
    assert (model.body.rank, model.body.nnz) == (3, round(0.25 * 32 * 72))
    assert (model.grouped.nnz, model.grouped.rank) == (0, int(0.5 * 32 * 144 / (32 + 2 * 144)))
    assert (model.stem.rank, model.stem.nnz) == (2, 10)  # also where it is too small by itself
    assert result.stats.skipped["head"] == "dense by overrides"


def test_several_constraints_hold_together(net):
    limits = {"params": "60%", "macs": "45%", "bytes": "70%"}
    stats = cmd_ext.compress(net, next(batches())[0], constraints=limits, progress=False).stats
    for kind, share in limits.items():
        dense, kept = getattr(stats, kind)
        assert kept <= float(share[:-1]) / 100 * dense


@pytest.mark.parametrize("search", ["uniform", "allocate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constraint_on_bytes_is_met_by_the_file(net, tmp_path, search, dtype):
    net.to(dtype)
    path, dense_path = tmp_path / "x.safetensors", tmp_path / "dense.safetensors"
    x = next(batches())[0].to(dtype)
    result = cmd_ext.compress(net, x, constraints={"bytes": "55%"}, search=search, progress=False)
    dense, kept = result.stats.bytes
    cmd_ext.save(result.model, path)
    cmd_ext.save(net, dense_path)
    assert result.plan.layers
    assert (tensor_bytes(dense_path), tensor_bytes(path)) == (dense, kept)
    assert 0.5 * dense < kept <= 0.55 * dense
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")  # the length of the JSON, and the JSON
    assert path.stat().st_size == kept + header
    tensors = len(load_file(path))
    assert header < 512 + 256 * tensors


def tensor_bytes(path) -> int:
    return sum(t.numel() * t.element_size() for t in load_file(path).values())


def test_a_uniform_share_of_bytes_is_one_of_every_layer():
    layers = [Layer(f"{n}", torch.empty(64, n), 64, n, 1, 1) for n in (64, 2048)]
    dense = {layer.name: layer.costs(None, None) for layer in layers}
    nothing = dict.fromkeys(("params", "macs", "bytes"), 0.0)
    for kind, same in (("bytes", True), ("params", False)):
        limits = {kind: 0.1 * sum(costs[kind] for costs in dense.values())}
        choice = uniform(layers, 1.0, nothing, limits)
        a, b = (choice[name].costs["bytes"] / dense[name]["bytes"] for name in dense)
        assert (abs(a - b) < 0.001) is same


def test_overrides_may_count_bytes(net):
    overrides = {"body": {"budget": 0.5, "sparse_coefficient": 1.0, "budget_unit": "bytes"}}
    options = {"constraints": {"params": "85%"}, "overrides": overrides, "progress": False}
    layer = cmd_ext.compress(net, next(batches())[0], **options).plan.layers["body"]
    assert (layer["rank"], layer["nnz"]) == (0, (4 * 32 * 72 // 2 - 32 * 72 // 8) // 4)


def test_round_to(net):
    overrides = {"body": {"rank": 3, "nnz": 0}}
    result = cmd_ext.compress(
        net, next(batches())[0], constraints={"params": "60%"}, round_to=4, search="uniform", sparse_coefficient=0.2,
        overrides=overrides, progress=False,
    )  # fmt: skip
    ranks = {name: entry["rank"] for name, entry in result.plan.layers.items()}
    assert ranks.pop("body") == 3  # an override is taken literally
    assert all(rank % 4 == 0 for rank in ranks.values())


def test_evaluate_is_called_for_both_models(net):
    seen = []

    def evaluate(model):
        seen.append(model)
        return float(len(seen))

    result = cmd_ext.compress(net, next(batches())[0], constraints={"params": "60%"}, evaluate=evaluate, progress=False)
    assert seen == [net, result.model]
    assert result.stats.score == (1.0, 2.0)
    assert "score: 1.0000 dense, 2.0000 compressed" in str(result.stats)


def test_batchnorm_recalibration_is_kept_only_where_the_loss_falls(net):
    x = next(batches())[0]
    data = list(batches(4))
    result = cmd_ext.compress(net, x, constraints={"params": "50%"}, calibration=data, progress=False)
    before, after = result.stats.batchnorm
    moved = not torch.equal(result.model.norm.running_mean, net.norm.running_mean)
    assert moved == (after < before)


def test_batchnorm_recalibration_heals_spoilt_statistics():
    model, x = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval(), torch.randn(64, 4)
    with torch.no_grad():
        model[1].weight *= 10
        cmd_ext.recalibrate_batchnorm(model, [x])
        batches, reference = [(x, model(x).argmax(1))], [model(x)]
    dense, healthy = Norms.of(model, batches), model[0].running_mean.clone()
    model[0].running_mean += 3
    before, after = recalibrate_if_better(model, batches, reference, dense)
    assert after < before
    torch.testing.assert_close(model[0].running_mean, healthy)


def test_batchnorm_recalibration_that_hurts_is_undone():
    model, x = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval(), torch.randn(64, 4)
    with torch.no_grad():
        model[1].weight *= 10
        model[0].running_mean += 3  # the statistics that the targets belong to
        batches, reference = [(x, model(x).argmax(1))], [model(x)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before, after = recalibrate_if_better(model, batches, reference, Norms.of(model, batches, share=1.0))
    assert after > before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_recalibrate_batchnorm_averages_over_the_batches():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.9)).train()
    model[0].momentum = 0.3
    x = torch.randn(6, 20, 4) * 2 + 1
    cmd_ext.recalibrate_batchnorm(model, list(x), n_batches=5)
    torch.testing.assert_close(model[0].running_mean, x[:5].mean((0, 1)))
    torch.testing.assert_close(model[0].running_var, x[:5].var(1).mean(0))
    assert (model[0].momentum, model.training, model[1].training) == (0.3, True, True)
    with pytest.raises(ValueError, match="calibration: want an iterable.*empty"):
        cmd_ext.recalibrate_batchnorm(model, [])


def test_plan_round_trip_gives_the_same_network(net):
    x = next(batches())[0]
    result = cmd_ext.compress(net, x, constraints={"params": "50%"}, progress=False)
    plan = Plan.from_json(result.plan.to_json())
    assert plan == result.plan
    again = cmd_ext.apply_plan(copy.deepcopy(net), plan)
    assert torch.equal(again(x), result.model(x))


def test_a_plan_knows_the_weights_and_the_data_that_it_was_made_with(net, caplog):
    data = list(batches(4))
    x = data[0][0]
    options = {"constraints": {"params": "50%"}, "search": "allocate", "n_iter": 2, "progress": False}
    plan = cmd_ext.compress(net, x, calibration=data, **options).plan
    assert Plan.from_json(plan.to_json()).fingerprints == plan.fingerprints
    assert plan.fingerprints.keys() == {"weights", "data"}
    same = cmd_ext.compress(copy.deepcopy(net), x, calibration=list(batches(4)), **options).plan
    assert same == plan
    weights, changed = plan.fingerprints["weights"], copy.deepcopy(net)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-4
    assert cmd_ext.compress(changed, x, **options).plan.fingerprints["weights"] != weights
    assert cmd_ext.compress(net, x, **options).plan.fingerprints == {"weights": weights}
    with caplog.at_level("WARNING", "cmd_ext"):
        cmd_ext.apply_plan(copy.deepcopy(net), plan, calibration=data)
        assert not caplog.records
        cmd_ext.apply_plan(changed, plan, calibration=data)
    assert "made for other weights" in caplog.text


def test_a_foreign_plan_is_refused_and_changes_nothing(net):
    plan = Plan({"body": {"rank": 1, "nnz": 5, "shape": [32, 72], "groups": 1},
                 "head": {"rank": 1, "nnz": 5, "shape": [64, 33], "groups": 1}})  # fmt: skip
    with pytest.raises(
        ValueError, match=r"wants a convolution or linear layer 'head' \[64, 33\].*got Linear 'head' \[64, 32\]"
    ):
        cmd_ext.apply_plan(net, plan)
    assert type(net.body) is nn.Conv2d
    with pytest.raises(ValueError, match="got no 'neck'"):
        cmd_ext.apply_plan(net, Plan({"neck": {"rank": 1, "nnz": 0, "shape": [1, 1], "groups": 1}}))
    for text in ("[]", "{", '{"cmd_ext_plan": 1}', '{"cmd_ext_plan": 7, "layers": {}}'):
        with pytest.raises(ValueError, match="Plan: want"):
            Plan.from_json(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constraints": {"joules": "50%"}}, "must be one of params, macs, bytes, latency, score_drop, got 'joules'"),
        ({"constraints": {}}, "constraints must name at least one"),
        ({"constraints": {"params": "0%"}}, "params must be '1%' to '100%' or a number, got '0%'"),
        ({"constraints": {"params": "half"}}, "got 'half'"),
        ({"constraints": {"params": 0.25}}, "a number >= 1 or a share like '25%', got 0.25"),
        ({"search": "magic"}, "search must be one of cmd, allocate, uniform, got 'magic'"),
        ({"overrides": {"boddy": "dense"}}, "overrides names no layer 'boddy'; did you mean 'body'"),
        ({"overrides": {"body": {"ranks": 3}}}, "must be 'dense' or a dict of .*got {'ranks': 3}"),
        ({"overrides": {"body": {"rank": 33}}}, r"wants rank in \[0, 32\]"),
        ({"round_to": 0}, "round_to must be >= 1, got 0"),
        ({"sparse_coefficient": 1.5, "search": "uniform"}, r"sparse_coefficient must lie in \[0, 1\], got 1.5"),
        ({"calibration": []}, "calibration: want an iterable.*empty"),
    ],
)
def test_bad_arguments_are_named(net, options, message):
    options = {"constraints": {"params": "50%"}, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        cmd_ext.compress(net, next(batches())[0], **options)


@pytest.mark.parametrize("search", ["uniform", "allocate"])
def test_an_unsatisfiable_constraint_names_the_closest_value(net, search):
    x = next(batches())[0]
    with pytest.raises(UnsatisfiableError, match="closest reachable value is") as caught:
        cmd_ext.compress(net, x, constraints={"params": 1000}, search=search, progress=False)
    closest = math.ceil(caught.value.closest)
    result = cmd_ext.compress(net, x, constraints={"params": closest}, search=search, progress=False)
    assert result.stats.params[1] <= closest


def test_the_random_state_of_the_caller_is_untouched(net):
    state = torch.random.get_rng_state()
    cmd_ext.compress(net, next(batches())[0], constraints={"params": "50%"}, progress=False)
    assert torch.equal(state, torch.random.get_rng_state())


def test_allocate_finds_the_best_choice_of_a_small_problem():
    curves = {}
    g = torch.Generator().manual_seed(0)
    for name in "abcd":  # convex curves, for which the Lagrangian with a greedy fill is near the optimum
        scale = torch.rand((), generator=g).item() + 0.1
        curves[name] = [
            Candidate(c, 0, 0.0, scale * (1 - c / 8) ** 2, {"params": float(c), "macs": float(c * (1 + len(curves)))})
            for c in range(9)
        ]
    limits = {"params": 17.0}
    fixed = {"params": 1.0}
    choice = allocate(curves, fixed, limits)
    assert total_costs(choice, fixed)["params"] <= 17

    best = min(
        sum(c.loss for c in combination)
        for combination in itertools.product(*curves.values())
        if sum(c.costs["params"] for c in combination) <= 16
    )
    assert sum(c.loss for c in choice.values()) <= best * 1.02 + 1e-9


def test_a_single_layer_is_a_network_too():
    linear, x = nn.Linear(64, 64), torch.randn(3, 64)
    result = cmd_ext.compress(linear, x, constraints={"params": "50%"}, progress=False)
    assert isinstance(result.model, CMDLinear)
    assert result.model(x).shape == (3, 64)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_layers_run_their_compressed_linears():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x = torch.randn(2, 7, 64)
    result = cmd_ext.compress(model, x, constraints={"params": "70%"}, progress=False)
    assert "NonDynamicallyQuantizableLinear is a subclass" in result.stats.skipped["layers.0.self_attn.out_proj"]
    calls = []
    layer = result.model.layers[0].linear1
    assert isinstance(layer, CMDLinear)
    for module in result.model.modules():
        if isinstance(module, CMDLinear):
            module.backend = "fused"
    layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        y = result.model(x)
        padded = result.model(x, src_key_padding_mask=torch.zeros(2, 7, dtype=torch.bool))
    assert calls
    torch.testing.assert_close(y, cmd_ext.to_dense(result.model)(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(y, padded, rtol=1e-3, atol=1e-4)


def test_to_dense_is_a_copy_with_the_same_outputs(net):
    x = next(batches())[0]
    model = cmd_ext.compress(net, x, constraints={"params": "50%"}, progress=False).model
    dense = cmd_ext.to_dense(model)
    assert not any(isinstance(m, (CMDConv2d, CMDLinear)) for m in dense.modules())
    assert any(isinstance(m, (CMDConv2d, CMDLinear)) for m in model.modules())
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)


def test_profile_counts_what_can_be_counted_by_hand():
    net, x = Net(), next(batches())[0]
    profile = cmd_ext.profile(net, x, repeats=1)
    body = profile["body"]
    assert (body.shape, body.params, body.bytes) == ("32x72", 32 * 72 + 32, 4 * (32 * 72 + 32))
    assert body.macs == 16 * 36 * 32 * 72
    assert profile["up"].macs == 16 * 36 * 32 * 8 * 4
    assert profile.total.params == sum(p.numel() for p in net.parameters())
    assert profile.total.bytes == sum(t.numel() * t.element_size() for t in net.state_dict().values()) - 4 * 64 * 64
    assert profile.total.ms > 0
    assert all(row.ms > 0 for row in profile)
    assert net.training  # the mode is given back
    layer = CMDConv2d(8, 32, 3, rank=2, density=0.25)
    row = next(iter(cmd_ext.profile(layer, torch.randn(2, 8, 5, 5), repeats=1)))
    assert row.macs == 2 * 9 * (2 * (32 + 72) + 576)
    assert row.bytes == 4 * (2 * (32 + 72) + 576 + 32) + 32 * 72 // 8  # S: a bitmap
    assert "32x72" in str(profile)


def test_profile_takes_arguments_as_tuple_and_dict():
    model = nn.Bilinear(3, 4, 5)
    a, b = torch.randn(2, 3), torch.randn(2, 4)
    assert cmd_ext.profile(model, (a, b), repeats=1).total.params == 65
    assert cmd_ext.profile(model, {"input1": a, "input2": b}, repeats=1).total.params == 65


TORCHVISION = ("resnet18", "alexnet", "vgg16", "mobilenet_v3_small")


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks(name):
    torchvision = pytest.importorskip("torchvision", exc_type=Exception, reason="torchvision does not import here")
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    x = torch.randn(2, 3, 224, 224)
    result = cmd_ext.compress(model, x, constraints={"params": "40%"}, search="uniform", n_iter=1, progress=False)
    assert result.stats.params[1] <= 0.4 * result.stats.params[0]
    with torch.no_grad():
        assert result.model(x).shape == model(x).shape
    if name == "mobilenet_v3_small":
        assert any("depthwise" in reason for reason in result.stats.skipped.values())
    check_full_decompositions(model, x[:1], 1 << 22, KINDS[2:] if name in ("vgg16", "alexnet") else KINDS)


KINDS = ("rank", "s", "both")


def check_full_decompositions(model: nn.Module, x: torch.Tensor, largest: int, kinds=KINDS) -> None:
    """Full rank, full S, and both together give the dense outputs, computed by the sparse kernels."""
    with torch.no_grad():
        want = model(x)
    for kind in kinds:
        layers = {}
        for name, module in model.named_modules():
            if type(module) in (nn.Conv2d, nn.Linear):
                m, n, groups = len(module.weight), module.weight[0].numel(), getattr(module, "groups", 1)
                nnz = m * n if kind != "rank" and m * n <= largest else 0
                rank = min(m // groups, n) if kind != "s" or nnz == 0 else 0
                layers[name] = {"rank": rank, "nnz": nnz, "shape": [m, n], "groups": groups}
        full = cmd_ext.apply_plan(copy.deepcopy(model), Plan(layers))
        for module in full.modules():
            if isinstance(module, (CMDConv2d, CMDLinear)):
                module.backend = "fused"
        with torch.no_grad():
            got = full(x)
        assert ((got - want).norm() / want.norm()).item() < 1e-4, kind


@pytest.mark.parametrize("build", ["resnet20", "vgg16", "alexnet"])
def test_full_rank_and_full_s_reproduce_the_network(build):
    check_full_decompositions(models.create(build).eval(), torch.randn(2, 3, 32, 32), 1 << 22)


def test_full_rank_and_full_s_reproduce_a_transformer():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 32)
    check_full_decompositions(model, x, 1 << 22)


@pytest.mark.data
def test_a_trained_network_keeps_its_accuracy_at_half_of_the_parameters(data_dir):
    mean_std = models.NORMALIZATION["resnet20"]
    train, test = (data.open_dataset(data_dir / "cifar10.tar", split, *mean_std) for split in ("train", "test"))
    net = models.load_weights(models.create("resnet20"), data_dir / "pretrained" / "resnet20.safetensors").eval()
    calibration = list(data.loader(train, 128, limit=256))
    scores = {}
    for search in ("uniform", "allocate"):
        result = cmd_ext.compress(
            net,
            calibration[0][0],
            constraints={"params": "50%"},
            search=search,
            calibration=calibration,
            progress=False,
        )
        scores[search] = accuracy(result.model, data.loader(test, 250, limit=2000))
    dense = accuracy(net, data.loader(test, 250, limit=2000))
    assert scores["allocate"] > dense - 0.06
    assert scores["allocate"] >= scores["uniform"] - 0.01
