"""The training step: fast against plain, compiled against eager, and that it waits for nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsejepa.config import Config, preset
from sparsejepa.data.augment import Augment, _scale_and_shift
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.rng import generator
from sparsejepa.training import step as step_module
from sparsejepa.training.build import ADAM_BETA2, build_model
from sparsejepa.training.step import TERMS, TrainStep

SIDE, BATCH = 32, 8


def small(**settings: Any) -> Config:
    return preset("nano").replace(patch_size=8, batch_size=BATCH, group_weight=0.5, **settings)


def make(config: Config, **kw: Any) -> TrainStep:
    model = build_model(config, (SIDE, SIDE), 100)
    augment = Augment((SIDE, SIDE), mean=(0.5,) * 3, std=(0.25,) * 3)
    return TrainStep(config, model, augment, 100, **kw)


def pictures() -> Tensor:
    seeded = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (BATCH, SIDE, SIDE, 3), dtype=torch.uint8, generator=seeded)


class Waits(TorchDispatchMode):
    """Records what makes the host wait for the device: values read, sizes that depend on values,
    and copies between the two."""

    reading = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [x for x in args if isinstance(x, Tensor)]
        if name.startswith(self.reading):
            self.found.append(name)
        if name == "index" and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        ):
            self.found.append("index by a mask")
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and isinstance(out, Tensor):
            devices = {x.device.type for x in [*tensors, out]}
            if devices == {"cpu", "cuda"}:
                self.found.append(f"{name} between devices")
        self.calls += 1
        return out


class OnCuda(torch.Generator):
    """A host generator that says it lives on the GPU: no numbers are drawn from it here."""

    def __new__(cls, device: Any = None) -> OnCuda:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def on_fake_gpu(model: SparseJEPA) -> SparseJEPA:
    """Replace all parameters and buffers; call it inside a FakeTensorMode."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(empty, requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
    return model


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(
    "settings",
    [
        {"groups": "none"},
        {"groups": "region"},
        {"groups": "region", "density": 0.5},
        {"groups": "region", "predictor_pass": "union", "drop_path": 0.1},
        {"groups": "concept"},
        {"groups": "feature", "kl": "posterior", "w_form": "plain"},
        {"groups": "region", "predictor": "groups", "checkpoint_activations": True},
        {"predict": "pixels", "pattern": "random", "density": 0.5},
    ],
    ids=str,
)
def test_no_step_waits_for_the_gpu(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step on fake tensors of a GPU, which have sizes and a device but no values.

    Autograd wants a real GPU, so the gradients are put in place instead: all but `backward` runs.
    """
    config = small(precision="bf16", **settings)
    step = make(config)
    monkeypatch.setattr(torch, "Generator", OnCuda)
    _scale_and_shift.cache_clear()  # fake tensors of one mode are not for the next
    with FakeTensorMode():
        model = on_fake_gpu(step.model)

        def backward(loss: Tensor) -> None:
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = torch.zeros_like(p)

        monkeypatch.setattr(Tensor, "backward", backward)
        step = TrainStep(config, model, step.augment, 100)
        pixels = torch.empty(BATCH, SIDE, SIDE, 3, dtype=torch.uint8, device="cuda")
        step(pixels, 0)  # fills caches and the optimiser's state
        freeze = step.schedule.penalised_steps
        for index in (1, 2, freeze, freeze + 1):
            with Waits() as waits:
                values = step(pixels, index)
            assert values.device.type == "cuda" and values.shape == (len(TERMS),)
            assert waits.calls > 500
            assert waits.found == []
    _scale_and_shift.cache_clear()


def test_the_watch_sees_what_waits() -> None:
    with FakeTensorMode(), Waits() as waits:
        x = torch.ones(3, device="cuda")
        x.cpu()
        torch.ones(3).to("cuda")
        with pytest.raises(RuntimeError):
            x.sum().item()
        with pytest.raises(RuntimeError):
            x.nonzero()
        with pytest.raises(RuntimeError):
            x[x > 0]
    assert len(waits.found) >= 5


def test_the_step_is_the_plain_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, against the same step written out: autograd, clipping, AdamW, prox and EMA."""
    monkeypatch.setattr(step_module, "CLIP", 0.05)
    config = small(groups="region", precision="fp32")
    fast = make(config)
    plain = copy.deepcopy(fast.model.double())
    fast = TrainStep(config, fast.model, lambda *_: images, 100)  # type: ignore[arg-type]
    images = torch.randn(BATCH, 3, SIDE, SIDE, dtype=torch.float64)
    matrices, rest = plain.network_parameters()
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.optim.weight_decay}, {"params": rest}],
        betas=(0.9, ADAM_BETA2), weight_decay=0.0, foreach=False, fused=False,
    )  # fmt: skip
    for index in range(3):
        values = fast(pictures(), index)
        terms = plain(images, step=index)
        terms.total.backward()
        norm = sum(float(p.grad.square().sum()) for p in matrices + rest if p.grad is not None)
        share = min(1.0, 0.05 / (norm**0.5 + 1e-6))
        for p in matrices + rest:
            if p.grad is not None:
                p.grad *= share
        for group in optimizer.param_groups:
            group["lr"] = fast.schedule.lr(index)
        optimizer.step()
        optimizer.zero_grad()
        old = {n: p.clone() for n, p in plain.target_encoder.named_parameters()}
        plain.after_step(index)
        decay = plain.rates.ema(index)
        for name, p in plain.target_encoder.named_parameters():
            online = plain.context_encoder.get_parameter(name)
            torch.testing.assert_close(p, decay * old[name] + (1 - decay) * online)
        assert float(values[-1]) == pytest.approx(norm**0.5, rel=1e-6)
        torch.testing.assert_close(values[:-1], terms.stacked())
    for name, p in plain.named_parameters():
        torch.testing.assert_close(
            fast.model.get_parameter(name), p, rtol=1e-9, atol=1e-11, msg=name
        )


@pytest.mark.parametrize("passes", ["blocks", "union"])
def test_bf16_stays_near_fp32(passes: str) -> None:
    """Loss terms within 1 %, the whole gradient within 3 degrees, each matrix within 12."""
    kw = {"groups": "region", "predictor_pass": passes}
    exact, fast = make(small(precision="fp32", **kw)), make(small(precision="bf16", **kw))
    fast.model.load_state_dict(exact.model.state_dict())
    x = exact.augment(pictures(), generator(0, 0, "augment"))
    grads = []
    for step in (exact, fast):
        with step.autocast:
            losses = step.model(x, step=0)
        losses.total.backward()
        named = step.model.named_parameters()
        grads.append(({n: p.grad for n, p in named if p.grad is not None}, losses.stacked()))
    (g32, l32), (g16, l16) = grads
    torch.testing.assert_close(l16, l32, rtol=1e-2, atol=1e-3)
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (g32, g16)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.9986
    for name, g in g32.items():
        if g.ndim >= 2 and g.norm() > 1e-3 * flat[0].norm():
            assert torch.cosine_similarity(g.flatten(), g16[name].flatten(), dim=0) > 0.978, name


def test_compilation_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **kw: Any) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    said: list[str] = []
    config = small(groups="region", precision="fp32")
    step, plain = make(config.replace(compile=True), say=said.append), make(config)
    for index in range(2):
        assert torch.equal(step(pictures(), index), plain(pictures(), index))
    assert said == ["--compile: not possible here, going on without it (no C++ compiler)"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"predict": "pixels", "pattern": "random", "density": 0.5},
    ],
    ids=lambda s: "-".join(s) or "default",
)
def test_compiled_is_eager(settings: dict[str, Any]) -> None:
    """One compilation for all numbers of context and target patches, the same losses."""
    config = small(groups="region", precision="fp32", context_counts=(3, 4, 5), **settings)
    said: list[str] = []
    fast, plain = make(config.replace(compile=True), say=said.append), make(config)
    torch._dynamo.utils.counters.clear()
    shapes = set()
    for index in range(6):
        shapes.add(plain.model.sampler.plan(seed=config.run.seed, step=index).count)
        a, b = fast(pictures(), index), plain(pictures(), index)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert said == []
    assert len(shapes) > 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
