"""InceptionV3 in the variant that FID is defined on.

The network is Szegedy et al. (2016) as trained for the TensorFlow graph ``classify_image_graph_def`` of 2015-12-05. It
differs from the later published InceptionV3 in three things: 1008 logits; average pooling that does not count the
padding; and max pooling in the last block. Names and shapes of the parameters are those of the public conversion of its
weights to PyTorch, so that file loads as it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._files import sha256
from ..errors import DiffFitError

__all__ = ["InceptionFeatures", "InceptionV3", "load_inception", "random_inception"]

WEIGHTS_ENV = "DIFFFIT_FAST_INCEPTION"
WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_NAME}"
WEIGHTS_SHA256 = "6726825d"  # its first digits, as the file's name carries them
INPUT_SIZE = 299
SPATIAL_CHANNELS = 7  # of mixed_6/conv; 17 * 17 * 7 = 2023 values, about as many as the pooled features have


class InceptionFeatures(NamedTuple):
    """What evaluation takes from one pass.

    Attributes:
        pool: [N, 2048], global average after the last block (``pool_3:0`` of the graph): FID, precision, recall.
        spatial: [N, 2023], the first 7 channels of ``mixed_6/conv:0`` (17 × 17, rows, columns, channels): sFID.
        logits: [N, 1008], the last layer without its bias, as ADM's evaluator takes it: Inception Score.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor


class Conv(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, cin: int, cout: int, kernel: int | tuple[int, int] = 1, stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        k = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (k[0] // 2, k[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(cin, cout, k, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35 × 35: 1×1, 5×5, two 3×3, average pool."""

    def __init__(self, cin: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(cin, 64)
        self.branch5x5_1 = Conv(cin, 48)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(cin, 64)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(cin, pool)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """35 × 35 to 17 × 17."""

    def __init__(self, cin: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(cin, 384, 3, stride=2, same=False)
        self.branch3x3dbl_1 = Conv(cin, 64)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17 × 17: 7×7 convolutions as pairs of 1×7 and 7×1."""

    def __init__(self, cin: int, c: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(cin, 192)
        self.branch7x7_1 = Conv(cin, c)
        self.branch7x7_2 = Conv(c, c, (1, 7))
        self.branch7x7_3 = Conv(c, 192, (7, 1))
        self.branch7x7dbl_1 = Conv(cin, c)
        self.branch7x7dbl_2 = Conv(c, c, (7, 1))
        self.branch7x7dbl_3 = Conv(c, c, (1, 7))
        self.branch7x7dbl_4 = Conv(c, c, (7, 1))
        self.branch7x7dbl_5 = Conv(c, 192, (1, 7))
        self.branch_pool = Conv(cin, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17 × 17 to 8 × 8."""

    def __init__(self, cin: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(cin, 192)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, same=False)
        self.branch7x7x3_1 = Conv(cin, 192)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8 × 8: 3×3 convolutions as 1×3 beside 3×1. ``pool``: "avg", or "max" in the graph's last block."""

    def __init__(self, cin: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(cin, 320)
        self.branch3x3_1 = Conv(cin, 384)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(cin, 448)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(cin, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pool == "max" else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class InceptionV3(nn.Module):
    """The network of FID. Input: [N, 3, 299, 299] float32, ``(pixel − 128) / 128``; output: :class:`InceptionFeatures`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, same=False)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, "avg")
        self.Mixed_7c = BlockE(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> InceptionFeatures:
        if x.dim() != 4 or x.shape[1:] != (3, INPUT_SIZE, INPUT_SIZE):
            raise DiffFitError(f"Inception takes [N, 3, {INPUT_SIZE}, {INPUT_SIZE}]; got {tuple(x.shape)}")
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        # The graph counts its blocks from "mixed": mixed_6 is the seventh, Mixed_6d here; mixed_6/conv its 1 × 1 branch.
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))
        return InceptionFeatures(pool, spatial, F.linear(pool, self.fc.weight))


def load_inception(path: str | os.PathLike[str] | None = None, check: bool = True) -> tuple[InceptionV3, str]:
    """The network with its weights from ``path``, or from the file that ``$DIFFFIT_FAST_INCEPTION`` names.

    Args:
        check: compare the SHA-256 with the published file's; False takes any file that fits the network.

    Returns:
        The network in eval mode, and the SHA-256 of the file.

    Raises:
        DiffFitError: no file named, not found, another file than the published one, or not fitting.
    """
    path = path or os.environ.get(WEIGHTS_ENV)
    if not path:
        raise DiffFitError(
            f"FID needs the weights of the Inception network, which are not part of this package: get {WEIGHTS_URL} "
            f"(91 MB) and name the file with --inception-weights or in the environment variable {WEIGHTS_ENV}; "
            "or use features='random-inception' for a number that only ranks"
        )
    path = Path(path)
    if not path.is_file():
        raise DiffFitError(f"the Inception weights {path} do not exist; they are published at {WEIGHTS_URL}")
    digest = sha256(path)
    if check and not digest.startswith(WEIGHTS_SHA256):
        raise DiffFitError(
            f"{path} is not the published {WEIGHTS_NAME}: its SHA-256 begins with {digest[:8]}, not {WEIGHTS_SHA256}. "
            "Numbers from other weights are not FID; --any-inception-weights takes the file all the same"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler and zip reader do
        raise DiffFitError(f"{path} cannot be read as PyTorch weights: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        model = InceptionV3()
    expected = {k: v.shape for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    state = {k: v for k, v in state.items() if k in expected} if isinstance(state, dict) else {}
    wrong = [k for k, shape in expected.items() if k not in state or state[k].shape != shape]
    if wrong:
        raise DiffFitError(
            f"{path} does not fit InceptionV3: {len(wrong)} parameters missing or misshapen ({wrong[0]}, …)"
        )
    model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False)
    return model.eval().requires_grad_(False), digest


def random_inception(seed: int = 0) -> InceptionV3:
    """The network with random weights (He initialisation) that depend on ``seed`` alone; PyTorch's generator is not touched.

    Fréchet distances in its features rank sets of images by coarse likeness. They are no FID and compare only with
    numbers of the same seed.
    """
    with torch.device("meta"):
        model = InceptionV3()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return model.eval().requires_grad_(False)
