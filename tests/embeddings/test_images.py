import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from embeddings.images import ImageFaults, decode_image, to_pixels
from features.errors import BadInputError

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def encoded(image, kind="PNG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def noise(width=40, height=30):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def pixels(image):
    return np.asarray(image).tolist()


JPEG = encoded(noise(), "JPEG", quality=95)


def test_a_photo_is_decoded():
    image = decode_image(JPEG)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert pixels(decode_image(encoded(noise()))) == pixels(noise())


def test_transparency_shows_white():
    glass = Image.new("RGBA", (3, 1))
    glass.putpixel((0, 0), (255, 0, 0, 255))
    glass.putpixel((1, 0), (255, 0, 0, 0))
    glass.putpixel((2, 0), (0, 0, 0, 51))  # a fifth black, four fifths white
    assert pixels(decode_image(encoded(glass))) == [[list(RED), list(WHITE), [204] * 3]]


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    assert pixels(decode_image(encoded(image))) == [[list(RED), list(BLUE)]]
    assert pixels(decode_image(encoded(image, transparency=0))) == [[list(WHITE), list(BLUE)]]


def test_grey_of_8_and_of_16_bits():
    for dtype, values in ((np.uint8, [0, 128, 255]), (np.uint16, [0, 128 << 8, 65535])):
        image = Image.fromarray(np.array([values], dtype))
        assert pixels(decode_image(encoded(image))) == [[[0] * 3, [128] * 3, [255] * 3]]


def test_a_print_image_becomes_rgb():
    image = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert (image.mode, image.getpixel((4, 4))) == ("RGB", WHITE)


def test_a_photo_taken_sideways_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera's right side is up
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    assert pixels(decode_image(encoded(image, exif=exif))) == [[list(RED)], [list(BLUE)]]


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (b"", "it is empty"),
        (b"GIF89a", "it is neither JPEG nor PNG"),
        (encoded(noise(), "GIF"), "it is neither JPEG nor PNG"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (encoded(noise())[:-200], "truncated"),
        (b"\xff\xd8\xff", "neither JPEG nor PNG"),
    ],
)
def test_broken_images(blob, said):
    with pytest.raises(ValueError, match=said):
        decode_image(blob)


@pytest.mark.parametrize("side", [150, 250])  # Pillow warns of the first and refuses the second
def test_a_decompression_bomb(monkeypatch, side):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100 * 2)
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_image(encoded(Image.new("1", (side, side))))


@given(st.binary(max_size=64), st.integers(0, len(JPEG)), st.integers(0, len(JPEG)))
def test_damage_anywhere_is_counted_or_harmless(junk, start, stop):
    faults = ImageFaults(max_share=1)
    [image] = faults.decode([1], [JPEG[:start] + junk + JPEG[stop:]])
    assert faults.broken == (image is None)
    assert image is None or image.mode == "RGB"


def test_broken_images_are_missing_counted_and_named(capsys):
    faults = ImageFaults(max_share=0.5)
    images = faults.decode([7, 8, 9, 10], [JPEG, None, JPEG[:300], b""])
    assert [image and image.size for image in images] == [(40, 30), None, None, None]
    assert (faults.seen, faults.broken) == (3, 2)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0] == "product 9: its image counts as missing: Truncated File Read"
    assert said[1] == "product 10: its image counts as missing: it is empty"


def test_only_the_first_five_are_named_and_each_once(capsys):
    faults = ImageFaults(max_share=1)
    for _ in range(2):
        faults.decode(range(8), [b""] * 8)
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"product {number}" for number in range(5)
    ]
    assert faults.broken == 16


def test_too_many_broken_images_stop_the_run():
    faults = ImageFaults(max_share=0.1)
    faults.decode(range(19), [b""] + [JPEG] * 18)
    faults.decode([19], [b""])  # two of twenty: as many as may be
    with pytest.raises(BadInputError) as raised:
        faults.decode([20], [b""])
    assert str(raised.value) == (
        "3 of 21 images are broken, more than 10%; among them those of products 0, 19, 20"
    )


def test_few_images_are_judged_at_the_end():
    faults = ImageFaults()
    faults.check()
    faults.decode([3, 4], [b"", JPEG])
    with pytest.raises(BadInputError, match=r"1 of 2 images are broken, more than 10%; .* 3$"):
        faults.check()


def test_the_end_tells_how_many_were_broken(capsys):
    faults = ImageFaults()
    faults.decode(range(10), [b""] + [JPEG] * 9)
    capsys.readouterr()
    faults.check()
    assert capsys.readouterr().err == "1 of 10 images are broken and count as missing\n"


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_a_share(share):
    with pytest.raises(BadInputError, match="between 0 and 1, got"):
        ImageFaults(share)


def test_pixels_are_scaled_and_normalised():
    images = [Image.new("RGB", (4, 4), (255, 0, 51)), Image.new("RGB", (9, 9), WHITE)]
    result = to_pixels(images, 4, mean=[0.5, 0.5, 0.0], std=[0.5, 0.25, 0.1])
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    assert list(result.shape) == [2, 3, 4, 4]
    torch.testing.assert_close(result[0, :, 1, 2], torch.tensor([1.0, -2.0, 2.0]))
    torch.testing.assert_close(result[1, :, 3, 3], torch.tensor([1.0, 2.0, 10.0]))


def test_a_long_image_keeps_its_proportions_between_white():
    raw = to_pixels([Image.new("RGB", (4, 8), RED)], 8, mean=[0] * 3, std=[1] * 3)
    assert raw[0, 1].tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]] * 8  # green: only in white
    wide = to_pixels([Image.new("RGB", (32, 16), RED)], 8, mean=[0] * 3, std=[1] * 3)
    assert wide[0, 1, :, 0].tolist() == [1, 1, 0, 0, 0, 0, 1, 1]


def test_pixels_are_those_of_a_padded_square():
    image = noise(60, 40)
    square = Image.new("RGB", (60, 60), WHITE)
    square.paste(image, (0, 10))
    expected = np.asarray(square.resize((30, 30), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    result = to_pixels([image], 30, mean=[0] * 3, std=[1] * 3)[0].numpy() * 255
    inner = slice(7, 23)  # away from the seams
    np.testing.assert_allclose(result[:, inner], expected[:, inner], atol=1.01)


@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1), (1, 1)])
def test_extreme_images(shape):
    result = to_pixels([Image.new("RGB", shape, RED)], 8, mean=[0] * 3, std=[1] * 3)
    assert (result[0, 1] == 0).any()


def test_no_images():
    assert list(to_pixels([], 8, mean=[0] * 3, std=[1] * 3).shape) == [0, 3, 8, 8]
