"""MobileNetV2 against torchvision's, and against the meaning of its arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from onnx_helpers import randomise
from torch import fx, nn

from torch_mbv2.mobilenet import (
    Architecture,
    Block,
    MobileNetV2,
    Preprocess,
    Preprocessing,
    SamePad2d,
)

torchvision = pytest.importorskip("torchvision", reason="torchvision is the reference here")

SETTING = [[1, 8, 1, 1], [6, 16, 2, 2], [4, 24, 2, 2]]


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"width_mult": 0.35}, (64, 64)),
        ({"width_mult": 1.4, "num_classes": 3}, (33, 47)),
        ({"width_mult": 0.1, "round_nearest": 4}, (96, 32)),
        ({"inverted_residual_setting": SETTING, "num_classes": 10}, (1, 1)),
    ],
)
def test_torchvision_state_dict_both_ways(options: dict, size: tuple[int, int]) -> None:
    theirs = randomise(torchvision.models.MobileNetV2(**options), seed=1)
    ours = MobileNetV2(**options).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        assert torch.equal(ours(image), theirs(image))

    back = torchvision.models.MobileNetV2(**options).eval()
    back.load_state_dict(randomise(ours, seed=2).state_dict())
    with torch.inference_mode():
        assert torch.equal(back(image), ours(image))


def test_default_is_torchvisions() -> None:
    ours = {name: tensor.shape for name, tensor in MobileNetV2().state_dict().items()}
    theirs = {
        name: tensor.shape
        for name, tensor in torchvision.models.mobilenet_v2(weights=None).state_dict().items()
    }
    assert ours == theirs


def test_training_matches_torchvision() -> None:
    """Dropout, batch statistics and gradients too: it is a stock module."""
    theirs = torchvision.models.MobileNetV2(inverted_residual_setting=SETTING)
    ours = MobileNetV2(inverted_residual_setting=SETTING)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 32, 32)
    gradients = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        model(image).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("size", [(6, 6), (6, 7), (7, 6), (7, 7), (1, 1), (2, 1)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (3, 3), (5, 2), (2, 2)])
def test_same_pad(kernel: int, stride: int, size: tuple[int, int]) -> None:
    """Padded as TensorFlow says: ceil(size / stride) outputs, the odd zero at the end."""
    x = torch.randn(1, 1, *size)
    padded = SamePad2d(kernel, stride)(x)
    expected = []
    for length in reversed(size):
        out = -(-length // stride)
        total = max((out - 1) * stride + kernel - length, 0)
        expected += [total // 2, total - total // 2]
    assert torch.equal(padded, F.pad(x, expected))
    conv = F.conv2d(padded, torch.ones(1, 1, kernel, kernel), stride=stride)
    assert conv.shape[2:] == tuple(-(-length // stride) for length in size)


def test_same_pad_rejects_large_stride() -> None:
    with pytest.raises(ValueError, match=r"stride must be in 1\.\.3, got 4"):
        SamePad2d(3, 4)


def test_same_padding_shifts_strided_convolutions_only() -> None:
    """The stem of an even image sees rows 0, 2, ..., where symmetric padding sees -1, 1, ..."""
    model = MobileNetV2(width_mult=0.25, padding="same").eval()
    image = torch.randn(1, 3, 32, 32)
    stem = model.features[0]
    weight = dict(stem.named_children())["0"].weight
    with torch.inference_mode():
        out = stem[:2](image)  # pad and convolution
        assert torch.equal(out, F.conv2d(F.pad(image, (0, 1, 0, 1)), weight, stride=2))
    pads = [name for name, module in model.named_modules() if isinstance(module, SamePad2d)]
    assert pads == [
        "features.0.pad",
        *(f"features.{i}.conv.1.pad" for i in (2, 4, 7, 14)),
    ]


@pytest.mark.parametrize("padding", ["same", (0, 1, 0, 1), (2, 0, 1, 1)])
def test_padding_keeps_parameter_names(padding: object) -> None:
    blocks = (Block(None, 8, padding=padding), Block(16, 8, 2, padding))
    padded = MobileNetV2.from_architecture(Architecture(8, blocks, 32, stem_padding=padding))
    blocks = (Block(None, 8), Block(16, 8, 2))
    plain = MobileNetV2.from_architecture(Architecture(8, blocks, 32))
    plain.load_state_dict(padded.state_dict())


def test_architecture_without_norm_names_convolutions_alike() -> None:
    blocks = (Block(None, 5), Block(7, 5, residual=True), Block(11, 3, 2))
    folded, kept = (
        MobileNetV2.from_architecture(
            Architecture(6, blocks, 13, 4, 1, activation="relu", norm=norm)
        )
        for norm in (False, True)
    )
    convs = [
        {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        for model in (folded, kept)
    ]
    assert convs[0] == convs[1]
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.ReLU6)) for m in folded.modules())
    assert folded.eval()(torch.randn(2, 1, 9, 9)).shape == (2, 4)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_symbolic_trace(padding: str) -> None:
    model = randomise(MobileNetV2(width_mult=0.25, padding=padding))
    traced = fx.symbolic_trace(model)
    with torch.inference_mode():
        for size in (32, 45):
            image = torch.randn(2, 3, size, size)
            assert torch.equal(traced(image), model(image))


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_export_with_any_batch(padding: str) -> None:
    model = randomise(MobileNetV2(inverted_residual_setting=SETTING, padding=padding))
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes)
    image = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(image), model(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "valid"}, 'padding must be "symmetric" or "same", got \'valid\''),
        ({"width_mult": 0}, "width_mult must be positive, got 0"),
        ({"inverted_residual_setting": []}, r"rows of \(t, c, n, s\)"),
        ({"inverted_residual_setting": [[1, 16, 1]]}, r"rows of \(t, c, n, s\)"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MobileNetV2(**options)


def test_impossible_residual() -> None:
    blocks = (Block(None, 5, residual=True),)
    with pytest.raises(ValueError, match="a residual block needs stride 1"):
        MobileNetV2.from_architecture(Architecture(6, blocks, 13))


# ---------------------------------------------------------------- before the stem, behind the head

MEAN, STD = torch.tensor([123.7, 116.3, 103.5]), torch.tensor([58.4, 57.1, 57.4])
# (x - MEAN) / STD, as torchvision's transforms do it
STANDARDISED = Preprocessing(
    scale=tuple((1 / STD.double()).tolist()), shift=tuple((-MEAN.double() / STD.double()).tolist())
)


def photo(dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 16, 18), generator=generator).to(dtype)


def surrounded(**options: object) -> MobileNetV2:
    blocks = (Block(None, 8), Block(16, 8, residual=True))
    return MobileNetV2.from_architecture(Architecture(8, blocks, 32, 5, **options)).eval()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64]
)
def test_preprocess(dtype: torch.dtype, channels_last: bool) -> None:
    image = photo(dtype)
    layer = Preprocess(Preprocessing(channels_last, STANDARDISED.scale, STANDARDISED.shift))
    given = image.permute(0, 2, 3, 1).contiguous() if channels_last else image
    out = layer(given)
    expected = torchvision.transforms.functional.normalize(photo(torch.float64), MEAN, STD)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_preprocess_rounds_once(dtype: torch.dtype) -> None:
    """In the network's dtype: 255 * 257 is beyond float16, and its buffers would be rounded."""
    layer = Preprocess(Preprocessing(scale=(0.5,), shift=(-64.0,))).to(dtype)
    image = photo(torch.float32) * 257
    out = layer(image)
    assert out.dtype == dtype
    assert torch.equal(out, (image * 0.5 - 64).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_preprocess_of_16_bit_images(dtype: torch.dtype) -> None:
    """Whose pixels and scale half precision does not hold."""
    image = (photo(torch.int32) * 257).to(torch.uint16)
    layer = Preprocess(Preprocessing(scale=(1 / 65535,), shift=(-0.5,))).to(dtype)
    out = layer.to("cpu")(image)
    assert out.dtype == dtype
    expected = image.to(torch.int32).double() / 65535 - 0.5
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_preprocess_in_double_precision() -> None:
    layer = Preprocess(Preprocessing(scale=(1 / 255,))).double()
    assert torch.equal(layer(photo()), photo().double() * (1 / 255))


def test_preprocess_copies_no_channels_last_image() -> None:
    layer = Preprocess(Preprocessing(channels_last=True))
    image = photo(torch.float32).permute(0, 2, 3, 1).contiguous()
    assert layer(image).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(image), image.permute(0, 3, 1, 2))


def test_preprocess_is_not_in_the_state_dict() -> None:
    """Which stays the network's, and torchvision's."""
    plain, full = surrounded(), surrounded(preprocessing=STANDARDISED, output="softmax")
    assert list(full.state_dict()) == list(plain.state_dict())
    full.load_state_dict(plain.state_dict())
    image = photo()
    with torch.inference_mode():
        standardised = torchvision.transforms.functional.normalize(image.float(), MEAN, STD)
        expected = plain(standardised).softmax(1)
        torch.testing.assert_close(full(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("output", "function"),
    [
        ("logits", lambda logits: logits),
        ("softmax", lambda logits: logits.exp() / logits.exp().sum(1, keepdim=True)),
        ("log_softmax", lambda logits: logits - logits.exp().sum(1, keepdim=True).log()),
        ("sigmoid", lambda logits: 1 / (1 + (-logits).exp())),
    ],
)
def test_output(output: str, function: object) -> None:
    plain, full = surrounded(), surrounded(output=output)
    full.load_state_dict(randomise(plain).state_dict())
    image = torch.randn(2, 3, 16, 18, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = function(plain(image).double())
        assert expected.std() > 0.01
        torch.testing.assert_close(full(image).double(), expected, rtol=1e-4, atol=1e-5)


def test_output_that_is_unknown() -> None:
    with pytest.raises(KeyError, match="argmax"):
        surrounded(output="argmax")


def test_preprocessing_traces_and_exports() -> None:
    model = surrounded(preprocessing=STANDARDISED, output="softmax")
    image = photo()
    program = torch.export.export(model, (image,))
    with torch.inference_mode():
        assert torch.equal(fx.symbolic_trace(model)(image), model(image))
        torch.testing.assert_close(program.module()(image), model(image))
