import copy
import math
import os
import pickle
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cmd_ext.finetune import finetune

EPOCHS = 4


def make_images(count=48):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 6, 6, generator=generator)
    return TensorDataset(images, (images.mean((1, 2, 3)) > 0).long())


def make_loader(batch_size=8):
    """Shuffled, and with noise, so that an epoch depends on the global random state."""
    return DataLoader(make_images(), batch_size, shuffle=True, collate_fn=noisy)


def noisy(items):
    images, targets = zip(*items, strict=True)
    noise = torch.randn(1) + random.gauss(0, 1) + np.random.randn()
    return torch.stack(images) + 0.01 * noise.float(), torch.stack(targets)


def make_model(seed=0, width=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(width * 16, 2),
    )


def accuracy(model):
    images, targets = make_images().tensors
    torch.rand(1), random.random(), np.random.rand()
    return (model(images).argmax(1) == targets).float().mean()


def snapshot(model):
    return copy.deepcopy(model.state_dict())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(history):
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in history]
    return rows, history.initial_score, history.best_epoch, history.best_score


def train(checkpoint=None, loader=None):
    model = make_model()
    history = finetune(
        model,
        loader or make_loader(),
        epochs=EPOCHS,
        lr=0.02,
        clip_norm=1.0,
        seed=5,
        evaluate=accuracy,
        checkpoint=checkpoint,
        progress=False,
    )
    return model, history


class Deadly:
    """A loader whose process is killed in the middle of its second epoch."""

    def __init__(self, loader):
        self.loader = loader
        self.generator = loader.generator
        self.epoch = 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.epoch += 1
        for step, batch in enumerate(self.loader):
            if self.epoch == 2 and step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def save_half_and_die(content, file):
    file.write(b"half of a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def child_killed_in_step(path):
    train(path, Deadly(make_loader()))


def child_killed_in_write(path):
    whole_save = torch.save
    torch.save = lambda content, file: (save_half_and_die if content["epoch"] == 2 else whole_save)(content, file)
    train(path)


def child_rank(folder):
    rank = int(os.environ["RANK"])
    seen, scored = [], []

    def collate(items):
        seen.extend(int(index) for index, _, _ in items)
        return torch.stack([image for _, image, _ in items]), torch.stack([target for _, _, target in items])

    def evaluate(model):
        scored.append(rank)
        return accuracy(model)

    def run():
        loader = DataLoader(
            TensorDataset(torch.arange(48), *make_images().tensors), 8, shuffle=True, collate_fn=collate
        )
        model = make_model(seed=rank)
        history = finetune(
            model, loader, epochs=2, seed=5, evaluate=evaluate, checkpoint=f"{folder}/ck", progress=False
        )
        return model.state_dict(), without_seconds(history)

    state, history = run()
    epochs_seen, times_scored = list(seen), len(scored)
    again_state, again_history = run()
    result = {"state": state, "history": history, "seen": epochs_seen, "scored": times_scored}
    result["same"] = equal(state, again_state) and history == again_history and seen == epochs_seen
    torch.save(result, f"{folder}/{rank}.pt")


def run_child(*command):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amp_dtype": torch.bfloat16},
        {"label_smoothing": 0.1, "clip_norm": 1.0, "momentum": 0.0},
        {"teacher": make_model(seed=9)},
    ],
    ids=["plain", "bfloat16", "options", "teacher"],
)
def test_loss_falls(options):
    history = finetune(make_model(), make_loader(), epochs=6, lr=0.05, seed=0, progress=False, **options)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    assert {row["score"] for row in history} == {None}
    assert history[-1]["lr"] < history[0]["lr"] <= 0.05


def test_learning_rate_rises_then_falls_over_all_steps():
    model, rates = make_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    finetune(model, make_loader(), epochs=2, optimizer=optimizer, warmup=0.25, progress=False)
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[3 + 9 // 3] == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    assert 0 < rates[-1] < 0.05


def test_zero_epochs_change_nothing():
    model = make_model()
    before = snapshot(model)
    history = finetune(model, make_loader(), epochs=0, evaluate=lambda model: 0.25, progress=False)
    assert (list(history), history.initial_score, history.best_epoch, history.best_score) == ([], 0.25, 0, 0.25)
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("moment", ["step", "write"])
def test_killed_run_continues_to_the_same_weights(tmp_path, moment):
    checkpoint = tmp_path / "run.ckpt"
    child = run_child(__file__, f"child_killed_in_{moment}", str(checkpoint))
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    random.seed(77)
    np.random.seed(77)
    torch.manual_seed(77)
    continued, continued_history = train(checkpoint)
    whole, whole_history = train()
    assert equal(continued.state_dict(), whole.state_dict())
    assert without_seconds(continued_history) == without_seconds(whole_history)
    assert os.listdir(tmp_path) == ["run.ckpt"]


def test_finished_run_is_not_trained_again(tmp_path):
    model, history = train(tmp_path / "run.ckpt")
    again, again_history = train(tmp_path / "run.ckpt", [None] * len(make_loader()))
    assert equal(model.state_dict(), again.state_dict())
    assert again_history == history


def test_generator_of_the_loader_is_part_of_the_checkpoint(tmp_path):
    def run(path, scores):
        model, scores = make_model(), iter(scores)
        loader = DataLoader(make_images(), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
        finetune(model, loader, epochs=3, seed=1, evaluate=lambda _: next(scores), checkpoint=path, progress=False)
        return model.state_dict()

    with pytest.raises(StopIteration):
        run(tmp_path / "a", [0, 1])
    assert equal(run(tmp_path / "a", [2, 3]), run(tmp_path / "b", [0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, "epochs: wanted 3, got 1"),
        ({"lr": 0.5}, r"optimizer: wanted SGD .*'lr': 0.5.*, got SGD .*'lr': 0.01"),
        ({"model": make_model(width=5)}, r"0.weight: wanted torch.float32 \[5, 1, 3, 3\], got torch.float32 \[4, 1"),
        ({"train_loader": make_loader(16)}, "steps per epoch: wanted 3, got 6"),
        ({"evaluate": accuracy}, "evaluate: wanted given, got None"),
    ],
)
def test_foreign_checkpoint_is_refused(tmp_path, change, message):
    settings = {"model": make_model(), "train_loader": make_loader(), "epochs": 1, "progress": False}
    finetune(checkpoint=tmp_path / "x", **settings)
    settings["model"] = make_model(seed=1)
    settings |= change
    before = snapshot(settings["model"])
    with pytest.raises(ValueError, match=f"x is of another run: {message}"):
        finetune(checkpoint=tmp_path / "x", **settings)
    assert equal(settings["model"].state_dict(), before)


def test_checkpoint_of_another_sparse_support_is_refused(tmp_path):
    def run(support):
        model = make_model()
        model.register_buffer("col_idx", torch.tensor(support, dtype=torch.int32))
        finetune(model, make_loader(), epochs=1, checkpoint=tmp_path / "x", progress=False)

    run([0, 2])
    run([0, 2])
    with pytest.raises(ValueError, match="another run: col_idx: wanted"):
        run([0, 3])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_damaged_and_malicious_checkpoints_are_refused(tmp_path):
    path = tmp_path / "x"

    def run():
        finetune(make_model(), make_loader(), epochs=1, checkpoint=path, progress=False)

    run()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text", pickle.dumps(Malicious(str(tmp_path / "ran")))):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint .*x is damaged or no checkpoint, delete it"):
            run()
    torch.save({"format": Malicious(str(tmp_path / "ran"))}, path)
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        run()
    assert not (tmp_path / "ran").exists()
    torch.save(make_model().state_dict(), path)
    with pytest.raises(ValueError, match="must be a checkpoint of finetune"):
        run()


@pytest.mark.parametrize("name", ["missing/x", "."])
def test_unwritable_checkpoint_is_refused_before_training(tmp_path, name):
    def never(model):
        raise AssertionError("evaluated")

    with pytest.raises(OSError, match="the checkpoint cannot be written"):
        finetune(make_model(), make_loader(), epochs=1, evaluate=never, checkpoint=tmp_path / name, progress=False)


def test_loss_that_is_not_finite_restores_the_last_epoch():
    class Poisoned(list):
        epoch = 0

        def __iter__(self):
            self.epoch += 1
            for step, (images, targets) in enumerate(super().__iter__(), 1):
                yield (images * math.inf if (self.epoch, step) == (2, 3) else images), targets

    states = []
    model = make_model()

    def evaluate(model):
        states.append(snapshot(model))
        return len(states)

    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch 2, step 3 of 6; .* after epoch 1 again"):
        finetune(model, Poisoned(make_loader()), epochs=3, evaluate=evaluate, progress=False)
    assert equal(model.state_dict(), states[1])
    assert not equal(model.state_dict(), states[0])


def test_parameter_that_is_not_finite_after_the_last_step_restores_the_last_epoch():
    model, steps = make_model(), []
    before = snapshot(model)

    def poison(optimizer, *_):
        steps.append(1)
        if len(steps) == 6:
            optimizer.param_groups[0]["params"][0].data[0] = math.inf

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.register_step_post_hook(poison)
    with pytest.raises(FloatingPointError, match=r"a parameter is not finite .* in epoch 1, step 6 of 6"):
        finetune(model, make_loader(), epochs=1, optimizer=optimizer, progress=False)
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize(("scores", "best"), [([0.1, 0.9, 0.2], 1), ([1.0, 0.5, 1.0], 0), ([math.nan, -3.0, -4.0], 1)])
def test_best_state_is_kept(scores, best):
    states = []

    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        states.append(snapshot(model))
        return scores[len(states) - 1]

    model = make_model()
    history = finetune(model, make_loader(), epochs=2, evaluate=evaluate, progress=False)
    assert [row["score"] for row in history] == scores[1:]
    assert (history.best_epoch, history.best_score) == (best, scores[best])
    assert [equal(model.state_dict(), state) for state in states].index(True) == best


def test_frozen_parameters_stay_and_small_ones_do_not_decay():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(36, 2)
            self.frozen = nn.Linear(36, 2).requires_grad_(False)

        def forward(self, x):
            return self.linear(x.flatten(1)) * 0 + self.frozen(x.flatten(1))

    model = Scaled()
    before = snapshot(model)
    finetune(model, make_loader(), epochs=1, lr=0.1, weight_decay=0.5, progress=False)
    after = model.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["linear.weight"]
    assert after["linear.weight"].norm() < before["linear.weight"].norm()


def test_distillation_loss():
    inputs, targets = make_images(8).tensors
    model, teacher = make_model().eval(), make_model(seed=1)
    model[4].p = 0.0
    before = snapshot(teacher)
    with torch.no_grad():
        student_logits = copy.deepcopy(model).train()(inputs).double()
        teacher_logits = copy.deepcopy(teacher).eval()(inputs).double()
    soft = F.softmax(teacher_logits / 3, 1)
    divergence = (soft * (soft.log() - F.log_softmax(student_logits / 3, 1))).sum() / 8
    expected = 0.3 * F.cross_entropy(student_logits, targets) + 0.7 * 9 * divergence
    history = finetune(
        model, [(inputs, targets)], epochs=1, teacher=teacher, distill_weight=0.7, temperature=3.0, progress=False
    )
    assert history[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert equal(teacher.state_dict(), before)
    assert teacher.training
    assert all(parameter.grad is None for parameter in [*teacher.parameters(), *model.parameters()])


def test_training_modes_are_restored():
    model = make_model().eval()
    model[1].train()
    finetune(model, make_loader(), epochs=1, progress=False)
    assert [module.training for module in model.modules()] == [False, False, True, False, False, False, False]


def test_progress_lines(capsys):
    finetune(make_model(), make_loader(), epochs=2, evaluate=lambda model: 0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "finetune: epoch 0/2  score 0.5000"
    assert lines[2].startswith("finetune: epoch 2/2  loss 0.")
    assert len(lines) == 3
    finetune(make_model(), make_loader(), epochs=1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_two_ranks_end_with_equal_weights(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    child = run_child(*launcher, __file__, "child_rank", str(tmp_path))
    assert child.returncode == 0, child.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first["state"], second["state"])
    assert first["history"] == second["history"]
    assert not equal(first["state"], make_model().state_dict())
    for epoch in (slice(0, 24), slice(24, 48)):
        assert sorted(first["seen"][epoch] + second["seen"][epoch]) == list(range(48))
    assert first["seen"][:24] != first["seen"][24:]
    assert (first["scored"], second["scored"]) == (3, 0)
    assert first["same"]
    assert second["same"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp_dtype", [None, torch.float16, torch.bfloat16])
def test_on_cuda(amp_dtype, tmp_path):
    model, teacher = make_model(), make_model(seed=1)
    history = finetune(
        model,
        make_loader(),
        epochs=6,
        lr=0.05,
        teacher=teacher,
        amp_dtype=amp_dtype,
        clip_norm=1.0,
        seed=0,
        device="cuda",
        checkpoint=tmp_path / "x",
        progress=False,
    )
    assert next(model.parameters()).is_cuda
    assert history[-1]["train_loss"] < history[0]["train_loss"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": -1}, ValueError, "epochs must be an integer of at least 0, got -1"),
        ({"epochs": 0.5}, ValueError, "epochs must be an integer"),
        ({"lr": 0.0}, ValueError, "lr must be above 0, got 0"),
        ({"distill_weight": 1.5}, ValueError, "distill_weight must be from 0 to 1, got 1.5"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0, got 0"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm must be above 0"),
        ({"amp_dtype": torch.float64}, ValueError, "amp_dtype must be torch.float16, torch.bfloat16 or None, got"),
        ({"train_loader": []}, ValueError, "at least one batch"),
        ({"train_loader": iter([])}, TypeError, "must have a length and be iterable, got list_iterator"),
        ({"train_loader": [torch.zeros(1)]}, ValueError, r"must yield \(inputs, targets\), got Tensor"),
        ({"model": nn.ReLU()}, ValueError, "must have a parameter with requires_grad=True"),
        ({"evaluate": lambda model: None}, TypeError, "evaluate must return a number, got NoneType"),
        ({"optimizer": torch.optim.SGD(make_model().parameters())}, ValueError, "of the model only, got 6 others"),
    ],
)
def test_bad_arguments(options, error, message):
    arguments = {"model": make_model(), "train_loader": make_loader(), "epochs": 1, "progress": False} | options
    with pytest.raises(error, match=f"finetune: .*{message}"):
        finetune(**arguments)


def test_teacher_must_be_another_network_and_lr_goes_with_the_default_optimizer():
    model = make_model()
    with pytest.raises(ValueError, match="teacher must be another network"):
        finetune(model, make_loader(), epochs=1, teacher=model)
    with pytest.raises(ValueError, match="lr is of the default optimizer"):
        finetune(model, make_loader(), epochs=1, optimizer=torch.optim.SGD(model.parameters()), lr=0.1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](sys.argv[2])
