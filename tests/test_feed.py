"""Batches prepared beside the step: always the same ones, in time, augmented as asked, never too many."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import chains
import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import CONFIG, Plain, log, state, tiny_data, trainer

from fastdiff.train import ImageData, TrainConfig, load_data
from fastdiff.train.augment import augmented
from fastdiff.train.feed import Feed, cut

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on networks this small only wait for each other."""
    yield from chains.one_thread()


def feed(data, config, step=0, parts=1):
    return Feed(data, config, cut(config.batch_size, parts), CPU, step)


def take(made, steps):
    try:
        return [made.next_parts() for _ in range(steps)]
    finally:
        made.close()


# Ahead of the step


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_batches_are_the_same_however_they_are_prepared_and_cut(ahead, parts):
    config = replace(CONFIG, flip=True, crop=5)
    plain = take(feed(tiny_data(), replace(config, prefetch=0)), 4)
    got = take(feed(tiny_data(), replace(config, prefetch=ahead), parts=parts), 4)
    for [whole], cut_up in zip(plain, got, strict=True):
        assert torch.equal(torch.cat([part.x0 for part in cut_up]), whole.x0)
        assert torch.equal(torch.cat([part.labels for part in cut_up]), whole.labels)
        assert np.concatenate([part.ids for part in cut_up]).tolist() == list(range(8))


def test_a_feed_begins_at_any_step():
    late = take(feed(tiny_data(), CONFIG, step=3), 2)
    assert torch.equal(late[0][0].x0, take(feed(tiny_data(), CONFIG), 5)[3][0].x0)


def test_an_error_in_the_thread_reaches_the_step():
    class Broken(ImageData):
        def rows(self, index):
            raise OSError("the disk went away")

    made = feed(Broken(torch.zeros(20, 1, 6, 6)), CONFIG)
    with pytest.raises(OSError, match="the disk went away"):
        made.next_parts()
    made.close()


def test_the_thread_keeps_no_more_than_it_may_and_ends_when_it_is_told(monkeypatch):
    made = []
    rows = ImageData.rows
    monkeypatch.setattr(ImageData, "rows", lambda self, index: (made.append(1), rows(self, index))[1])
    running = feed(tiny_data(), replace(CONFIG, steps=1000, prefetch=3))
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 4  # three wait, and one is in the thread's hand
    running.next_parts()
    running.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "fastdiff-feed"]


def test_a_run_leaves_no_thread_behind_when_it_fails(tmp_path):
    class Fails(Plain):
        def forward(self, x, t, labels):
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        trainer(tmp_path / "run", model=Fails()).run(progress=False)
    assert not [thread for thread in threading.enumerate() if thread.name == "fastdiff-feed"]


def pictures(folder, count=60, size=48):
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


def test_the_step_does_not_wait_for_a_folder_of_pictures(tmp_path):
    """Steps of 20 ms wait less than a quarter of their time for 32 augmented pictures (a thousandth where
    nothing else runs), and less than without the thread. The first, prepared at the start, does not count."""
    pictures(tmp_path)
    data = load_data(tmp_path, size=40, cache=tmp_path / "kept")
    waited = {}
    for ahead in (0, 2):
        config = TrainConfig(steps=40, batch_size=32, flip=True, crop=32, prefetch=ahead)
        running = feed(data, config)
        running.next_parts()
        running.waited = 0.0
        for _ in range(20):
            time.sleep(0.02)
            running.next_parts()
        running.close()
        waited[ahead] = running.waited
    assert waited[2] < 0.25 * 20 * 0.02
    assert waited[2] < waited[0]


def test_a_run_says_how_long_its_steps_waited(tmp_path):
    result = trainer(tmp_path / "run").run(progress=False)
    assert 0 <= result.waited < result.seconds


# Flips and crops


def numbered(count=6, channels=2, height=5, width=7):
    return torch.arange(count * channels * height * width, dtype=torch.int32).view(
        count, channels, height, width
    )


def test_a_flip_mirrors_about_half_of_the_images_and_leaves_the_others():
    images, ids = numbered(2000, 1, 2, 3), np.arange(2000)
    got = augmented(images, replace(CONFIG, flip=True), 0, ids)
    mirrored = (got == images.flip(-1)).flatten(1).all(1)
    assert ((got == images).flatten(1).all(1) != mirrored).all()  # each is the one or the other
    assert abs(mirrored.double().mean().item() - 0.5) < 5 * 0.5 / 2000**0.5  # five standard errors


def test_a_crop_is_a_window_of_its_own_image_and_every_window_comes():
    images, ids = numbered(2000), np.arange(2000)
    got = augmented(images, replace(CONFIG, crop=4), 0, ids)
    assert got.shape == (2000, 2, 4, 4)
    corner = got[:, 0, 0, 0] - images[:, 0, 0, 0]
    tops, lefts = corner // 7, corner % 7
    for i in (0, 1, 1999):
        window = images[i, :, tops[i] : tops[i] + 4, lefts[i] : lefts[i] + 4]
        assert torch.equal(got[i], window)
    counts = torch.bincount(tops * 4 + lefts, minlength=8)
    assert len(counts) == 8
    expected = 2000 / 8
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square of 7 degrees, one in a thousand


def test_a_choice_depends_on_seed_step_and_sample_alone():
    images, config = numbered(), replace(CONFIG, flip=True, crop=3)
    whole = augmented(images, config, 4, np.arange(6))
    assert torch.equal(augmented(images[[5, 2]], config, 4, np.array([5, 2])), whole[[5, 2]])
    assert torch.equal(augmented(images, config, 4, np.arange(6)), whole)
    others = (
        augmented(images, config, 5, np.arange(6)),
        augmented(images, replace(config, seed=1), 4, np.arange(6)),
        augmented(images, config, 4, np.arange(6, 12)),
    )
    assert all(not torch.equal(other, whole) for other in others)


def test_an_augmented_run_resumes_bit_for_bit_and_its_model_has_the_crop_s_shape(tmp_path):
    config = replace(CONFIG, flip=True, crop=4)
    seen = []
    run = trainer(tmp_path / "straight", config)
    run.model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))
    run.run(progress=False)
    assert set(seen) == {(8, 1, 4, 4)}
    trainer(tmp_path / "run", replace(config, steps=6)).run(progress=False)
    trainer(tmp_path / "run", config, resume=True).run(progress=False)
    assert log(tmp_path / "run") == log(tmp_path / "straight")
    assert state(tmp_path / "run") == state(tmp_path / "straight")
    with pytest.raises(ValueError, match=r"`crop` must be at most the images' size, got 7 for images of 6x6"):
        trainer(tmp_path / "large", replace(CONFIG, crop=7))
    assert not (tmp_path / "large").exists()
