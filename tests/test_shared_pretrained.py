"""Features by a pretrained ResNet: torchvision's layout, pinned by hash, record by record."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pretrained_cases import narrow_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from training_cases import DIVISOR, make_data, make_plan

from client.guard import check_sensitivity
from client.noise import ChaChaRandom, simulation_key
from client.training import LocalTrainer
from shared.config import canonical_json
from shared.errors import ConfigError
from shared.features import PRETRAINED_WIDTHS, features_of_scaled, image_inputs
from shared.models import build_model, initial_parameters, input_shape, load_parameters
from shared.plan import StudyPlan, from_bytes
from shared.pretrained import FOLDER, pretrained, weight_shapes
from shared.task_plan import ImagePlan
from simulations.pretraining import pretrain, write_weights


class ReferenceBlock(nn.Module):
    """A residual block with torchvision's names, written as modules."""

    def __init__(self, width_in: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        out = width * expansion
        if expansion == 1:
            self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        else:
            self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.conv3 = nn.Conv2d(width, out, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(functional.relu(y)))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class Reference(nn.Module):
    """ResNet as torchvision has it, head included."""

    def __init__(self, blocks: tuple[int, ...], expansion: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        width_in = 64
        for stage, count in enumerate(blocks):
            layer = []
            for i in range(count):
                stride = 2 if stage and not i else 1
                layer.append(ReferenceBlock(width_in, 64 << stage, expansion, stride))
                width_in = (64 << stage) * expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.fc = nn.Linear(width_in, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
        return x.mean((2, 3))


def store(folder: Path, tensors: dict[str, Tensor]) -> str:
    """Write a weights' file under its hash, which is returned."""
    save_file(tensors, folder / "weights")
    sha256 = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()
    (folder / "weights").rename(folder / f"{sha256}.safetensors")
    return sha256


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def network(name: str) -> Reference:
    """A network with made-up weights and running statistics."""
    torch.manual_seed(0)
    made = Reference(*{"resnet18": ((2, 2, 2, 2), 1), "resnet50": ((3, 4, 6, 3), 4)}[name])
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(part.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(part.weight, 0.5, 1.5)
    return made.eval()


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 1), ("resnet18", 3), ("resnet50", 3)])
def test_the_features_are_the_networks(name: str, channels: int, folder: Path) -> None:
    made = network(name)
    sha256 = store(folder, {k: v.contiguous() for k, v in made.state_dict().items()})
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, channels, 40, 40)).astype(np.float32)
    got = pretrained(pixels, name, sha256)
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    seen = torch.from_numpy((pixels + 1) / 2).expand(-1, 3, -1, -1)
    with torch.no_grad():
        want = made((seen - mean.view(3, 1, 1)) / spread.view(3, 1, 1))
    want = want / want.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(got, want.numpy(), atol=2e-6)
    assert got.shape == (3, PRETRAINED_WIDTHS[name])
    alone = np.concatenate([pretrained(p[None], name, sha256) for p in pixels])
    np.testing.assert_allclose(alone, got, atol=1e-6)
    assert pretrained(pixels[:0], name, sha256).shape == (0, PRETRAINED_WIDTHS[name])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_file_that_drawings_taught_holds_the_network_that_was_trained(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known, width in list(PRETRAINED_WIDTHS.items()):
        monkeypatch.setitem(PRETRAINED_WIDTHS, known, width // 8)
    made, _ = pretrain(1, 16, 1, test_on=8, name=name)
    sha256 = write_weights(made, folder)
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 1, 24, 24)).astype(np.float32)
    made.fc = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        want = made(torch.from_numpy(pixels)).numpy() / 10  # its forward pass makes them so long
    np.testing.assert_allclose(pretrained(pixels, name, sha256), want, atol=2e-6)
    assert np.linalg.norm(want[0] - want[1]) > 1e-3


def small_file(folder: Path, **changes: Tensor) -> str:
    tensors = {n: torch.ones(s) for n, s in weight_shapes("resnet18").items()} | changes
    return store(folder, tensors)


def test_a_missing_or_exchanged_file_is_refused(folder: Path) -> None:
    pixels = np.zeros((1, 1, 32, 32), dtype=np.float32)
    with pytest.raises(ConfigError, match=f"are not here.*{FOLDER}"):
        pretrained(pixels, "resnet18", "0" * 64)
    sha256 = small_file(folder)
    path = folder / f"{sha256}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not the plan's"):
        pretrained(pixels, "resnet18", sha256)


def test_another_networks_file_is_refused_by_the_tensor(folder: Path) -> None:
    pixels = np.zeros((1, 1, 32, 32), dtype=np.float32)
    wrong = small_file(folder, **{"layer2.0.downsample.0.weight": torch.ones(128, 64, 3, 3)})
    with pytest.raises(ConfigError, match=r"layer2.0.downsample.0.weight has shape"):
        pretrained(pixels, "resnet18", wrong)
    more = small_file(folder, **{"layer5.0.conv1.weight": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"layer5.0.conv1.weight belongs to no resnet18"):
        pretrained(pixels, "resnet18", more)
    head = small_file(
        folder, **{"fc.weight": torch.ones(1), "bn1.num_batches_tracked": torch.ones(1)}
    )
    assert pretrained(pixels, "resnet18", head).shape == (1, 512)
    (folder / f"{hashlib.sha256(b'no').hexdigest()}.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        pretrained(pixels, "resnet18", hashlib.sha256(b"no").hexdigest())


def plan_with(sha256: str) -> StudyPlan:
    plan = make_plan("cnn", image=32)
    image = ImagePlan(channels=1, height=32, width=32, features="resnet18", weights_sha256=sha256)
    return replace(
        plan, task=replace(plan.task, image=image), model=replace(plan.model, name="logistic")
    )


def test_a_head_trains_on_the_features(folder: Path) -> None:
    sha256 = small_file(folder)
    plan = plan_with(sha256)
    assert from_bytes(plan.canonical_bytes) == plan
    assert input_shape(plan) == (512,)
    assert sum(p.numel() for p in build_model(plan).parameters()) == 513
    image = plan.task.image
    assert image is not None
    inputs = image_inputs(image, np.full((2, 32, 32), 7, dtype=np.uint8))
    assert inputs.shape == (2, 512)
    check_sensitivity(plan, "cpu")
    trainer = LocalTrainer(plan, "site-0", make_data(plan), 1.0, "cpu")
    assert trainer.engine_name == "book-keeping"
    assert len(initial_parameters(plan)) == 513


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": "resnet18"}, "weights_sha256"),
        ({"weights_sha256": "0" * 64}, "weights_sha256"),
        ({"features": "resnet18", "weights_sha256": "0" * 64, "depth": 8}, "flat image"),
        ({"features": "resnet18", "weights_sha256": "no"}, "weights_sha256"),
    ],
)
def test_a_plan_pins_the_weights(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImagePlan(channels=1, height=32, width=32, **settings)  # type: ignore[arg-type]


def fine_tuned(sha256: str, trainable: str, name: str = "resnet18") -> StudyPlan:
    plan = make_plan("cnn", image=24, model={"init_seed": 3})
    image = ImagePlan(
        channels=1, height=24, width=24, features=name, weights_sha256=sha256, trainable=trainable
    )  # type: ignore[arg-type]
    return replace(plan, task=replace(plan.task, image=image), model=replace(plan.model, name=name))


@pytest.mark.parametrize(
    ("name", "trainable"),
    [("resnet18", "last-stage"), ("resnet18", "all"), ("resnet50", "last-stage")],
)
def test_fine_tuning_starts_at_the_files_own_network(
    name: str, trainable: str, folder: Path
) -> None:
    sha256 = store(folder, {k: v.contiguous() for k, v in network(name).state_dict().items()})
    plan = fine_tuned(sha256, trainable, name)
    assert from_bytes(plan.canonical_bytes) == plan
    image, module = plan.task.image, build_model(plan)
    assert image is not None
    load_parameters(module, initial_parameters(plan))
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 1, 24, 24)).astype(np.float32)
    inputs = features_of_scaled(image, pixels)
    assert inputs.shape == (3, *input_shape(plan))
    seen: list[Tensor] = []
    head = module.get_submodule("head")
    head.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    with torch.no_grad():
        module(torch.from_numpy(inputs))
    np.testing.assert_allclose(seen[0].numpy(), pretrained(pixels, name, sha256), atol=1e-5)


@pytest.mark.parametrize("trainable", ["last-stage", "all"])
def test_both_engines_sum_the_same_gradients_of_a_fine_tuned_network(
    trainable: str, folder: Path
) -> None:
    plan = fine_tuned(store(folder, dict(network("resnet18").state_dict())), trainable)
    data, start = make_data(plan, patients=4), initial_parameters(plan)
    random, sums = ChaChaRandom(simulation_key(1, "site-0")), []
    for engine in ("auto", "hooks"):
        trainer = LocalTrainer(plan, "site-0", data, 0.0, "cpu", engine=engine, measuring=True)
        sums.append(trainer.gradient(start, np.arange(3), random) * DIVISOR)
        # Of this many values in float32, too, one patient's part is at most the clip norm.
        alone = trainer.gradient(start, np.arange(1), random, clip_norm=1e-3) * DIVISOR
        assert 0.99e-3 < np.linalg.norm(alone.astype(np.float64)) <= 1e-3 * (1 + 1e-4)
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-5 * float(np.abs(sums[1]).max()))


def test_a_fine_tuned_network_keeps_the_clip_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fine_tuned(narrow_weights(tmp_path, monkeypatch, blocks=1), "last-stage")
    assert 0.5 < check_sensitivity(plan, "cpu").sensitivity <= 1 + 1e-4


def test_a_released_model_needs_no_weights_file_and_training_does(folder: Path) -> None:
    plan = fine_tuned("0" * 64, "last-stage")
    build_model(plan)
    with pytest.raises(ConfigError, match="are not here"):
        initial_parameters(plan)


def test_fine_tuning_of_another_network_is_refused() -> None:
    plan = fine_tuned("0" * 64, "all")
    with pytest.raises(ConfigError, match="fine-tunes a resnet18, and its model is 'resnet50'"):
        build_model(replace(plan, model=replace(plan.model, name="resnet50")))
    with pytest.raises(ConfigError, match="needs a table"):
        build_model(replace(plan, model=replace(plan.model, name="logistic")))
    with pytest.raises(ConfigError, match="trainable 'all' is for features"):
        ImagePlan(channels=1, height=32, width=32, trainable="all")


def test_a_plan_without_the_new_key_keeps_its_hash() -> None:
    image = ImagePlan(channels=1, height=32, width=32)
    assert b"trainable" not in canonical_json(image)
    assert b"trainable" in canonical_json(fine_tuned("0" * 64, "all"))
