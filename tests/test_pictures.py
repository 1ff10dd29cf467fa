"""Pictures: bytes, grids, strips, archives, curves."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.pictures import save_curve, save_grid, save_npz, save_strip, to_uint8


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_every_byte_survives_the_way_to_float_and_back():
    k = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(k.float() / 127.5 - 1), k)
    assert torch.equal(to_uint8(k.double().numpy() / 127.5 - 1), k)


def test_to_uint8_rounds_and_clamps_and_leaves_its_input_alone():
    x = torch.tensor([-torch.inf, -2.0, -1.0, -0.9977, 0.0, 0.9977, 1.0, 3.0])
    before = x.clone()
    # 127.5 * 0.0023 = 0.29 rounds to 0; 127.5 itself lies between two bytes and goes to the even one
    assert to_uint8(x).tolist() == [0, 0, 0, 0, 128, 255, 255, 255]
    assert torch.equal(x, before)


def test_to_uint8_takes_half_precision_and_non_contiguous_images():
    x = torch.linspace(-1, 1, 24).reshape(4, 6).T
    assert torch.equal(to_uint8(x.bfloat16()), to_uint8(x.bfloat16().float()))
    assert to_uint8(x).tolist() == to_uint8(x.contiguous()).tolist()


def test_a_grid_holds_every_image_at_its_place(tmp_path):
    x = torch.arange(5, dtype=torch.uint8).mul(40).view(5, 1, 1, 1).expand(5, 1, 2, 3)
    grid = pixels(save_grid(x, tmp_path / "grid.png", columns=2, scale=4, pad=1))
    assert grid.shape == (3 * (2 * 4 + 1) + 1, 2 * (3 * 4 + 1) + 1)
    for i in range(5):
        top, left = (i // 2) * 9 + 1, (i % 2) * 13 + 1
        assert (grid[top : top + 8, left : left + 12] == 40 * i).all()
    assert (grid[19:, 14:] == 255).all()  # the sixth place is empty
    assert (grid[::9] == 255).all()
    assert (grid[:, ::13] == 255).all()


def test_a_grid_of_one_pixel_checkerboards_is_enlarged_without_blur(tmp_path):
    x = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).view(1, 1, 2, 2)
    grid = pixels(save_grid(x, tmp_path / "grid.png", scale=3, pad=0))
    assert grid.tolist() == np.kron([[0, 255], [255, 0]], np.ones((3, 3))).tolist()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels_choose_the_mode(tmp_path, channels, mode):
    x = torch.rand(3, channels, 8, 8) * 2 - 1
    image = Image.open(save_grid(x, tmp_path / "grid.png", columns=3, pad=0))
    assert image.mode == mode
    assert image.size == (3 * 64, 64)  # 8x8 digits are enlarged to 64x64
    first = np.asarray(image).reshape(64, 192, channels)[::8, :64:8]
    assert torch.equal(torch.from_numpy(first.copy()).permute(2, 0, 1), to_uint8(x[0]))


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp", ".bmp"])
def test_the_suffix_chooses_the_format(tmp_path, suffix):
    path = save_grid(torch.zeros(1, 3, 4, 4), tmp_path / f"grid{suffix}")
    wanted = {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}.get(suffix.lower(), "JPEG")
    assert Image.open(path).format == wanted


def test_a_strip_has_a_line_for_each_sample_and_a_column_for_each_moment(tmp_path):
    # moment m of sample b is the shade 10 m + b
    shade = 10 * torch.arange(7).view(7, 1) + torch.arange(2)
    chain = shade.to(torch.uint8).view(7, 2, 1, 1, 1)
    whole = pixels(save_strip(chain, tmp_path / "strip.png", scale=1, pad=0))
    assert whole.tolist() == shade.T.tolist()
    fewer = pixels(save_strip(list(chain), tmp_path / "strip.png", columns=4, scale=1, pad=0))
    assert fewer.tolist() == shade[[0, 2, 4, 6]].T.tolist()
    last = pixels(save_strip(chain, tmp_path / "strip.png", columns=1, scale=1, pad=0))
    assert last.tolist() == shade[[6]].T.tolist()


def test_an_archive_is_uint8_nhwc_and_the_same_bytes_every_time(tmp_path):
    x = torch.rand(4, 2, 3, 5) * 2 - 1
    path = save_npz(x, tmp_path / "a.npz", labels=torch.tensor([3, 1, 2, 0]))
    with np.load(path) as archive:
        assert sorted(archive) == ["arr_0", "arr_1"]
        assert archive["arr_0"].dtype == np.uint8
        assert archive["arr_0"].tolist() == to_uint8(x).permute(0, 2, 3, 1).tolist()
        assert archive["arr_1"].tolist() == [3, 1, 2, 0]
    assert list(np.load(save_npz(x, tmp_path / "b.npz"))) == ["arr_0"]
    again = save_npz(x, tmp_path / "c.npz", labels=np.array([3, 1, 2, 0]))
    assert again.read_bytes() == path.read_bytes()


def test_a_curve_is_drawn_where_its_values_are(tmp_path):
    falling = pixels(save_curve([4.0, 3.0, 2.0, 1.0], tmp_path / "curve.png"))
    dark = (falling == (0x1B, 0x4F, 0x8F)).all(-1)
    rows = [np.nonzero(dark[:, column])[0].mean() for column in (100, 500, 900)]
    assert rows[0] < rows[1] < rows[2]  # picture rows count downwards


@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0, 0.0], [1e-8, 1.0, 1e8], [-1.0, 2.0], [1.0, float("nan"), float("inf"), 2.0]]
)
def test_a_curve_of_any_values_can_be_drawn(tmp_path, values):
    picture = pixels(save_curve(values, tmp_path / "curve.png"))
    assert (picture == (0x1B, 0x4F, 0x8F)).all(-1).any()


def test_the_parts_of_a_curve_are_drawn_beside_it_with_gaps_and_names(tmp_path):
    upper = [3.0, None, 3.0, float("nan"), 3.0]
    values = [2.0, 2.1, 2.0, 1.9, 2.0]
    parts = {"upper": upper, "empty": [None] * 5, "lower": [1.0] * 5}
    picture = pixels(save_curve(values, tmp_path / "curve.png", parts=parts))
    where = {}
    for name, colour in (("whole", (0x1B, 0x4F, 0x8F)), ("upper", (0x3F, 0x7F, 0x3F)),
                         ("lower", (0xC9, 0x8A, 0x1B))):  # fmt: skip
        rows, _ = np.nonzero((picture == colour).all(-1))
        where[name] = rows
    assert where["upper"][where["upper"] > 38].max() < where["whole"].min()
    assert where["whole"].max() < where["lower"][where["lower"] > 38].min()
    # the names stand above, in colour: text is smoothed, so of the colour itself there need be no pixel
    assert np.ptp(picture[:30].astype(int), axis=-1).max() > 60
    assert np.ptp(pixels(save_curve(values, tmp_path / "plain.png"))[:30].astype(int), axis=-1).max() == 0


def test_a_long_curve_is_drawn_in_time(tmp_path):
    values = np.linspace(2.0, 1.0, 200_000)
    start = time.perf_counter()
    save_curve(values, tmp_path / "curve.png", parts={"all": values.tolist()})
    assert time.perf_counter() - start < 5  # 0.4 s where nothing else runs


def test_a_failed_picture_leaves_the_old_file_and_no_temporary(tmp_path):
    path = save_grid(torch.zeros(1, 3, 4, 4), tmp_path / "grid.jpg")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"`path` must end in \.png or \.webp"):
        save_grid(torch.zeros(1, 4, 4, 4), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["grid.jpg"]


X = torch.zeros(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: to_uint8([0.0]), TypeError, "`x` must be a tensor"),
        (lambda d: to_uint8(torch.arange(3)), TypeError, "`x` must be floating point .* got torch.int64"),
        (
            lambda d: to_uint8(torch.tensor([0.0, torch.nan])),
            ValueError,
            "`x` must hold numbers, got 1 NaN of 2",
        ),
        (lambda d: save_grid(X[0], d / "a.png"), ValueError, r"`x` must be \[B, C, H, W\]"),
        (lambda d: save_grid(X[:0], d / "a.png"), ValueError, r"`x` must be .* B >= 1"),
        (
            lambda d: save_grid(torch.zeros(2, 5, 5, 1), d / "a.png"),
            ValueError,
            r"RGBA\) channels .* permute",
        ),
        (lambda d: save_grid(X.expand(2, 2, 4, 4), d / "a.png"), ValueError, "`x` must have 1 .* got 2"),
        (lambda d: save_grid(X, d / "a.tiff"), ValueError, "`path` must end in .png or"),
        (lambda d: save_grid(X, d / "a"), ValueError, "`path` must end in"),
        (lambda d: save_grid(X, d / "no" / "a.png"), ValueError, "`path` .* folder that exists.* create"),
        (lambda d: save_grid(X, d / "dir.png"), ValueError, "`path` must name a file"),
        (lambda d: save_grid(X, d / "a.png", columns=0), ValueError, "`columns` .* at least 1, got 0"),
        (lambda d: save_grid(X, d / "a.png", scale=1.5), ValueError, "`scale` .* whole number .* got 1.5"),
        (lambda d: save_grid(X, d / "a.png", pad=-1), ValueError, "`pad` .* at least 0, got -1"),
        (lambda d: save_strip([], d / "a.png"), ValueError, "`trajectory` must hold at least one"),
        (lambda d: save_strip(X, d / "a.png"), ValueError, "`trajectory` must be"),
        (lambda d: save_strip([X, X[:1]], d / "a.png"), ValueError, "`trajectory` must keep one shape"),
        (lambda d: save_npz(X, d / "a.png"), ValueError, "`path` must end in .npz"),
        (lambda d: save_npz(X, d / "a.npz", labels=[0.5, 1]), ValueError, "`labels` must be 2 whole numbers"),
        (lambda d: save_npz(X, d / "a.npz", labels=[1]), ValueError, "`labels` must be 2 whole numbers"),
        (lambda d: save_curve([], d / "a.png"), ValueError, "`values` must be"),
        (lambda d: save_curve([float("nan")], d / "a.png"), ValueError, "`values` .* at least one finite"),
        (lambda d: save_curve([1, 2], d / "a.png", steps=[2, 1]), ValueError, "`steps` must be 2 rising"),
        (lambda d: save_curve([1, 2], d / "a.png", steps=[1]), ValueError, "`steps` must be 2 rising"),
        (lambda d: save_curve([1, 2], d / "a.png", parts={"a": [1]}), ValueError, "`parts.*a.* 2 numbers"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, call, error, message):
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(error, match=message):
        call(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dir.png"]
