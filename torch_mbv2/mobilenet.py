"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) of stock PyTorch layers, with torchvision's
parameter names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Padding = tuple[int, int, int, int] | Literal["same"]
"""Zeros around a 3x3 convolution: (left, right, top, bottom) as `F.pad`, or TensorFlow's SAME."""

Clamp = Literal["relu6", "relu"]
Output = Literal["logits", "softmax", "log_softmax", "sigmoid"]

# t (expansion), c (output channels), n (repeats), s (stride of the first): table 2 of the paper.
DEFAULT_SETTING = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@dataclass(frozen=True)
class Block:
    """One inverted residual: [1x1 expand], 3x3 depthwise, 1x1 project, [+ input]."""

    expanded: int | None  # channels after the expanding convolution; None where there is none
    out: int
    stride: int = 1
    padding: Padding = (1, 1, 1, 1)
    residual: bool = False


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the stem: `scale * image + shift`, in (N, C, H, W)."""

    channels_last: bool = False  # images come as (N, H, W, C)
    scale: tuple[float, ...] = (1.0,)  # one for all channels, or one for each
    shift: tuple[float, ...] = (0.0,)


@dataclass(frozen=True)
class Architecture:
    """Every number that shapes a MobileNetV2, so that any channel table can be written down."""

    stem: int
    blocks: tuple[Block, ...]
    last: int
    num_classes: int = 1000
    in_channels: int = 3
    stem_stride: int = 2
    stem_padding: Padding = (1, 1, 1, 1)
    activation: Clamp = "relu6"
    norm: bool = True  # False: batch norm is folded, so each convolution has a bias instead
    dropout: float = 0.2
    preprocessing: Preprocessing | None = None
    output: Output = "logits"


class Preprocess(nn.Module):
    """A `Preprocessing` as a layer, rounded to the network's dtype, which `.to()` gives it.

    Equivalent: `(x * scale + shift).to(dtype)`, and nothing where that is the image itself; the
    result is (N, C, H, W), of (N, H, W, C) images in channels_last without a copy.

    x: (N, C, H, W), or (N, H, W, C) if `channels_last`, of any dtype, such as uint8.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.scales = (preprocessing.scale, preprocessing.shift) != ((1.0,), (0.0,))
        self.dtype = torch.float32
        # Not in the state dict, which is the network's and torchvision's.
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self._fill(torch.device("cpu"))

    def _fill(self, device: torch.device) -> None:
        """Make the buffers, in the network's dtype or, for images of more than 8 bits, which go by
        their scale, at least in float32: half precision does not hold their pixels."""
        given = self.preprocessing
        deep = min(map(abs, given.scale)) < 1 / 300
        dtype = torch.promote_types(self.dtype, torch.float32) if deep else self.dtype
        for name in ("scale", "shift"):
            values = torch.tensor(getattr(given, name), dtype=dtype, device=device)
            setattr(self, name, values.reshape(-1, 1, 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Preprocess:
        super()._apply(fn, recurse)
        like = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device))
        self.dtype = like.dtype
        self._fill(like.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.preprocessing.channels_last:
            x = x.permute(0, 3, 1, 2)
        if self.scales:
            x = torch.addcmul(self.shift, x, self.scale)  # one kernel, also for uint8
        return x.to(self.dtype)

    def extra_repr(self) -> str:
        given = self.preprocessing
        return f"channels_last={given.channels_last}, scale={given.scale}, shift={given.shift}"


class SamePad2d(nn.Module):
    """TensorFlow's SAME padding with zeros, computed from each input's own height and width.

    Equivalent: `F.pad(x, (p // 2, p - p // 2, q // 2, q - q // 2))` where `p` (`q`) is
    `kernel_size - stride + (-width) % stride` (the same of the height); the convolution behind it
    pads nothing, and its output has `ceil(size / stride)` rows and columns.

    x: (..., H, W) of any dtype. Raises ValueError unless `1 <= stride <= kernel_size`.
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        if not 1 <= stride <= kernel_size:
            raise ValueError(f"SamePad2d: stride must be in 1..{kernel_size}, got {stride}")
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        across = self.kernel_size - self.stride + (-x.shape[-1]) % self.stride
        down = self.kernel_size - self.stride + (-x.shape[-2]) % self.stride
        return F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class InvertedResidual(nn.Module):
    """`x + conv(x)` where the block has a residual, else `conv(x)`."""

    def __init__(self, in_channels: int, block: Block, architecture: Architecture) -> None:
        super().__init__()
        if block.residual and (block.stride != 1 or in_channels != block.out):
            raise ValueError(
                "a residual block needs stride 1 and as many output as input channels, got stride "
                f"{block.stride}, {in_channels} -> {block.out}"
            )
        self.residual = block.residual
        hidden = in_channels if block.expanded is None else block.expanded
        layers: list[nn.Module] = []
        if block.expanded is not None:
            layers.append(_conv_norm_act(in_channels, hidden, 1, 1, None, 1, architecture))
        layers.append(
            _conv_norm_act(hidden, hidden, 3, block.stride, block.padding, hidden, architecture)
        )
        layers.append(nn.Conv2d(hidden, block.out, 1, bias=not architecture.norm))
        if architecture.norm:
            layers.append(nn.BatchNorm2d(block.out))
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNetV2 of stock layers: (N, in_channels, H, W) -> (N, num_classes) logits.

    Equivalent: `torchvision.models.mobilenet_v2(...)` with the same arguments; with
    `padding="symmetric"` the state dicts are interchangeable and the outputs identical.

    num_classes: rows of the classifier.
    width_mult: scales every channel count; the last one only upwards, as torchvision does.
    inverted_residual_setting: rows (t, c, n, s): expansion, channels, repeats, first stride.
    round_nearest: channel counts are rounded to multiples of this; 1 leaves them.
    padding: "symmetric" (PyTorch: 1 on every side) or "same" (TensorFlow: strided convolutions pad
        an even size at the right and the bottom only).
    dropout: probability before the classifier, in training.
    in_channels: channels of the image.

    `MobileNetV2.from_architecture` takes explicit channel counts, paddings and activation instead,
    and what a deployed network does before its stem and after its classifier.
    Raises ValueError for arguments outside these ranges.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        padding: Literal["symmetric", "same"] = "symmetric",
        dropout: float = 0.2,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self._build(
            _architecture(
                num_classes,
                width_mult,
                DEFAULT_SETTING if inverted_residual_setting is None else inverted_residual_setting,
                round_nearest,
                padding,
                dropout,
                in_channels,
            )
        )
        self._initialise()

    @classmethod
    def from_architecture(cls, architecture: Architecture) -> MobileNetV2:
        """The network that `architecture` describes, with freshly initialised weights."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._build(architecture)
        model._initialise()
        return model

    def _build(self, architecture: Architecture) -> None:
        self.architecture = architecture
        channels = architecture.stem
        features: list[nn.Module] = [
            _conv_norm_act(
                architecture.in_channels,
                channels,
                3,
                architecture.stem_stride,
                architecture.stem_padding,
                1,
                architecture,
            )
        ]
        for block in architecture.blocks:
            features.append(InvertedResidual(channels, block, architecture))
            channels = block.out
        features.append(_conv_norm_act(channels, architecture.last, 1, 1, None, 1, architecture))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(
            nn.Dropout(architecture.dropout), nn.Linear(architecture.last, architecture.num_classes)
        )
        given = architecture.preprocessing
        self.preprocess = None if given is None else Preprocess(given)
        outputs = {
            "logits": None,
            "softmax": nn.Softmax(1),
            "log_softmax": nn.LogSoftmax(1),
            "sigmoid": nn.Sigmoid(),
        }
        self.postprocess = outputs[architecture.output]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.preprocess is not None:
            x = self.preprocess(x)
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x if self.postprocess is None else self.postprocess(x)


def _conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    padding: Padding | None,
    groups: int,
    architecture: Architecture,
) -> nn.Sequential:
    """[pad], convolution, [batch norm], activation.

    A pad that `nn.Conv2d` cannot express is the child `pad` in front of child `0`, so the
    convolution and its batch norm keep torchvision's names whatever the padding is.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inside = (0, 0)
    if padding == "same":
        layers["pad"] = SamePad2d(kernel_size, stride)
    elif padding is not None:
        left, right, top, bottom = padding
        if left == right and top == bottom:
            inside = (top, left)
        else:
            layers["pad"] = nn.ZeroPad2d((left, right, top, bottom))
    layers["0"] = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        inside,
        groups=groups,
        bias=not architecture.norm,
    )
    if architecture.norm:
        layers["1"] = nn.BatchNorm2d(out_channels)
    activation = nn.ReLU6 if architecture.activation == "relu6" else nn.ReLU
    layers["2" if architecture.norm else "1"] = activation(inplace=True)
    return nn.Sequential(layers)


def _architecture(
    num_classes: int,
    width_mult: float,
    setting: Sequence[Sequence[int]],
    round_nearest: int,
    padding: str,
    dropout: float,
    in_channels: int,
) -> Architecture:
    if padding not in ("symmetric", "same"):
        raise ValueError(f'padding must be "symmetric" or "same", got {padding!r}')
    if width_mult <= 0:
        raise ValueError(f"width_mult must be positive, got {width_mult}")
    if not setting or any(len(row) != 4 for row in setting):
        raise ValueError(
            f"inverted_residual_setting must be rows of (t, c, n, s), got {list(setting)}"
        )

    def pad(stride: int) -> Padding:
        return "same" if padding == "same" and stride > 1 else (1, 1, 1, 1)

    stem = channels = _make_divisible(32 * width_mult, round_nearest)
    blocks = []
    for t, c, n, s in setting:
        out = _make_divisible(c * width_mult, round_nearest)
        for i in range(n):
            stride = s if i == 0 else 1
            expanded = None if t == 1 else round(channels * t)
            residual = stride == 1 and channels == out
            blocks.append(Block(expanded, out, stride, pad(stride), residual))
            channels = out
    return Architecture(
        stem=stem,
        blocks=tuple(blocks),
        last=_make_divisible(1280 * max(1.0, width_mult), round_nearest),
        num_classes=num_classes,
        in_channels=in_channels,
        stem_padding=pad(2),
        dropout=dropout,
    )


def _make_divisible(channels: float, divisor: int) -> int:
    """`channels` rounded to a multiple of `divisor`, at least one of it, losing at most 10 %."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded
