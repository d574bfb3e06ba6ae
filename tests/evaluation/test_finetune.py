from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsejepa.data.images import ImageSet, Target
from sparsejepa.encoders.encoder import Encoder
from sparsejepa.errors import UserError
from sparsejepa.evaluation.finetune import FineTune, Recipe, layer_groups
from sparsejepa.model.vit import ViT

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
SHORT = Recipe(passes=2, least_steps=80, batch_size=32)


def lamps(count: int, seed: int) -> ImageSet:
    """Bright above or below: as many bright pixels either way, and mirroring changes nothing."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, count)
    images = rng.uniform(0, 60, (count, 8, 8, 3))
    images[label == 0, :4] += 160
    images[label == 1, 4:] += 160
    targets = {"place": Target(label, ("above", "below"))}
    return ImageSet("lamps", "train", images.astype(np.uint8), targets, MEAN, STD)


def make_encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(ViT(8, 2, embed_dim=24, depth=2, num_heads=3), name="a", mean=MEAN, std=STD)


def labels(images: ImageSet) -> np.ndarray:
    return images.targets["place"].values


def test_it_learns_what_only_a_changed_encoder_tells() -> None:
    train, test = lamps(160, 0), lamps(100, 1)
    tuned = FineTune(make_encoder(), recipe=SHORT).fit(train, labels(train))
    assert tuned.score(test, labels(test)) > 0.95


def test_labels_of_any_kind_and_the_encoder_that_was_given() -> None:
    train, encoder = lamps(64, 0), make_encoder()
    before = encoder.fingerprint()
    named = np.where(labels(train) == 0, 7, 93)
    tuned = FineTune(encoder, recipe=SHORT).fit(train, named)
    assert list(tuned.classes_) == [7, 93] and set(tuned.predict(train)) <= {7, 93}
    assert encoder.fingerprint() == before != tuned.encoder_.fingerprint()
    assert not tuned.encoder_.model.training


def test_a_loss_that_is_not_finite_is_named() -> None:
    train, wild = lamps(64, 0), Recipe(lr=1e30, least_steps=8, passes=1, warmup=0.5)
    with pytest.raises(UserError, match=r"^finetune: loss is not finite at step [1-7]$"):
        FineTune(make_encoder(), recipe=wild).fit(train, labels(train))


def test_equal_seeds_are_equal_to_the_bit_and_state_outside_plays_no_part() -> None:
    train = lamps(64, 0)
    found = []
    for noise, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        tuned = FineTune(make_encoder(), random_state=seed, recipe=SHORT)
        torch.set_rng_state(state)
        tuned.fit(train, labels(train))
        assert torch.equal(torch.get_rng_state(), state)  # and is left as it was
        found.append(tuned.encoder_.fingerprint())
    assert found[0] == found[1] != found[2]


def test_only_the_named_rows_are_seen() -> None:
    train = lamps(90, 0)
    rows = np.arange(0, 90, 2)
    spoilt = train.images.copy()
    spoilt[1::2] = 0
    other = ImageSet("lamps", "train", spoilt, train.targets, MEAN, STD)
    first, second = (
        FineTune(make_encoder(), recipe=SHORT).fit(images, labels(train)[rows], rows)
        for images in (train, other)
    )
    assert first.encoder_.fingerprint() == second.encoder_.fingerprint()
    assert first.settings_["batch_size"] == 32


def test_every_image_is_seen_once_a_pass() -> None:
    tuned = FineTune(make_encoder())
    for start in (0, 4):
        one_pass = torch.cat([tuned._batch(step, 21, 5) for step in range(start, start + 4)])
        assert len(one_pass.unique()) == 20  # the incomplete batch is dropped
    assert not torch.equal(tuned._batch(0, 21, 5), tuned._batch(4, 21, 5))


@pytest.mark.parametrize(
    ("n", "steps"), [(5_000, 781), (50_000, 7_812), (100_000, 8_000), (500, 200), (40, 200)]
)
def test_the_budget_is_passes_within_two_bounds(n: int, steps: int) -> None:
    recipe = Recipe(passes=20, least_steps=200, most_steps=8_000, batch_size=128)
    assert recipe.steps(n) == steps


def test_learning_rates_fall_with_depth_and_each_parameter_is_there_once() -> None:
    model, head = make_encoder().model, torch.nn.Linear(24, 3)
    recipe = Recipe(lr=1.0, layer_decay=0.5, weight_decay=0.1)
    groups = layer_groups(model, head, 2, recipe)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    trained = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    assert sorted(rate) == sorted(map(id, trained))
    assert sum(len(g["params"]) for g in groups) == len(trained)
    named = dict(model.named_parameters())
    assert rate[id(head.weight)] == rate[id(named["norm.weight"])] == 1
    assert rate[id(named["blocks.1.norm1.weight"])] == 0.5
    assert rate[id(named["blocks.0.attn.qkv.weight"])] == 0.25
    assert rate[id(named["patch_embed.proj.weight"])] == 0.125
    assert decay[id(head.weight)] == 0.1 and decay[id(head.bias)] == 0
    assert id(named["pos_embed"]) not in rate  # fixed positions stay fixed


def test_a_single_class_is_one_clear_line() -> None:
    train = lamps(20, 0)
    with pytest.raises(UserError, match="one class only"):
        FineTune(make_encoder()).fit(train, np.zeros(20, int))
