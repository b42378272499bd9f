"""Networks and their layers: diffusion on graphs inside of networks."""

from kantor.nn._fit_result import FitInfo, FitResult, FitStatus
from kantor.nn.coin import COIN
from kantor.nn.diff_resnet import DiffResNet
from kantor.nn.diffusion_block import DiffusionBlock
from kantor.nn.episode import Episode, EpisodeResult
from kantor.nn.node_splits import Split, split_per_class
from kantor.nn.output_diffusion import OutputDiffusion, OutputInfo
from kantor.nn.semi_supervised import fit_nodes

__all__ = [
    "COIN",
    "DiffResNet",
    "DiffusionBlock",
    "Episode",
    "EpisodeResult",
    "FitInfo",
    "FitResult",
    "FitStatus",
    "OutputDiffusion",
    "OutputInfo",
    "Split",
    "fit_nodes",
    "split_per_class",
]
