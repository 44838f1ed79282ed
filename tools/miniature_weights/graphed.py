"""CUDA graphs for the miniature's trainings.

A step of so small a network is some thousand kernels of microseconds each; started one by one from Python they leave a GPU
idle most of the time. A graph holds them all and is started at once. Where a graph cannot be made, everything runs as without.
"""

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from facediffuser.training.attention import AttentionMaps

logger = logging.getLogger(__name__)

WARM_UP = 3
CAPTURE = "thread_local"
"""Other threads (the one that copies batches into page-locked memory) may go on during a capture."""
TOLERANCE = 0.02
"""Largest mean difference, as a share of the eager result's mean, at which a graph counts as the same computation."""


def alike(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    difference = float((found - wanted).abs().mean() / wanted.abs().mean().clamp(min=1e-12))
    logger.info("graph and eager differ by %.2g of the mean", difference)
    return difference < TOLERANCE


class GraphedGradients:
    """`compute(*inputs)`, a scalar loss, with its gradients, as one graph. A call returns the loss, without a gradient of its own.

    Args:
        compute: the loss of tensors whose shapes and types never change; no random numbers, nothing copied to the CPU.
        inputs: such tensors, on the GPU.
        parameters: what gets gradients.
    """

    def __init__(
        self,
        compute: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        parameters: Iterable[nn.Parameter],
    ):
        parameters = list(parameters)
        self.inputs = [value.clone() for value in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                _clear(parameters)
                eager = compute(*self.inputs)
                eager.backward()
        torch.cuda.current_stream().wait_stream(side)
        norm = _size(p.grad for p in parameters)
        # Gradients that are made inside of the graph: each run of it writes them anew.
        _clear(parameters)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode=CAPTURE):
            self.loss = compute(*self.inputs)
            self.loss.backward()
        self.graph.replay()
        if not (alike(self.loss.detach(), eager.detach()) and alike(_size(p.grad for p in parameters), norm)):
            raise RuntimeError("a CUDA graph computes something else")

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.loss.detach()


def graphed_loss(
    compute: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], parameters: Iterable[nn.Parameter]
) -> Callable[..., torch.Tensor]:
    """Return GraphedGradients, or `compute` itself where no graph can be made that computes the same."""
    parameters = list(parameters)
    try:
        return GraphedGradients(compute, inputs, parameters)
    except Exception as error:
        logger.warning("no CUDA graph (%s: %s): each kernel is started by itself", type(error).__name__, error)
        torch.cuda.synchronize()
        _clear(parameters)
        return compute


def _clear(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _size(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """The norm of all gradients together."""
    return torch.stack([one.float().norm() for one in gradients if one is not None]).norm()


class _UNetGraphs:
    """A UNet's forward pass and its backward pass, a graph each; `run` is a differentiable call of them.

    Args:
        network: returns a tuple of tensors, all with gradients, of the inputs.
        inputs: tensors of the shapes and types that all calls have.
        parameters: what gets gradients beside the inputs that ask for them.
    """

    def __init__(
        self,
        network: Callable[..., tuple[torch.Tensor, ...]],
        inputs: Sequence[torch.Tensor],
        parameters: Iterable[nn.Parameter],
    ):
        self.inputs = [value.detach().clone().requires_grad_(value.requires_grad) for value in inputs]
        self.parameters = list(parameters)
        wanted = [value for value in (*self.inputs, *self.parameters) if value.requires_grad]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                outputs = network(*self.inputs)
                ones = [torch.ones_like(one) for one in outputs]
                gradients = torch.autograd.grad(outputs, wanted, ones, allow_unused=True)
            self.eager = outputs[0].detach().float(), _size(gradients)
            del outputs, gradients
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, capture_error_mode=CAPTURE):
            self.outputs = network(*self.inputs)
        self.grad_outputs = [torch.empty_like(one) for one in self.outputs]
        with torch.cuda.graph(self.backward, pool=self.forward.pool(), capture_error_mode=CAPTURE):
            self.gradients = torch.autograd.grad(self.outputs, wanted, self.grad_outputs, allow_unused=True)

    def same_as_eager(self) -> bool:
        """Whether the graphs compute what the network did before they were made, gradients included."""
        for own in self.grad_outputs:
            own.fill_(1)
        self.forward.replay()
        self.backward.replay()
        return alike(self.outputs[0].detach().float(), self.eager[0]) and alike(_size(self.gradients), self.eager[1])

    def run(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the network's results for inputs; they are valid until the next call."""
        return _Replay.apply(self, *inputs, *self.parameters)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs: _UNetGraphs, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.graphs = graphs
        for own, given in zip(graphs.inputs, tensors, strict=False):
            own.copy_(given)
        graphs.forward.replay()
        return tuple(one.detach() for one in graphs.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: torch.Tensor):
        graphs = ctx.graphs
        for own, given in zip(graphs.grad_outputs, gradients, strict=True):
            own.copy_(given)
        graphs.backward.replay()
        found = iter(graphs.gradients)
        asked = [next(found) if one.requires_grad else None for one in (*graphs.inputs, *graphs.parameters)]
        return None, *(None if one is None else one.detach() for one in asked)


def graph_denoiser(denoiser: nn.Module) -> nn.Module:
    """Make the UNet of a TextDenoiser or SubjectDenoiser run as graphs from its first training step on; return the denoiser.

    All batches must have the shapes of the first one. One batch makes one step: gradients do not add up.
    """
    unet = denoiser.unet
    recorder: AttentionMaps | None = (
        getattr(denoiser, "_attention", None) if getattr(denoiser, "_localizes", False) else None
    )
    eager = unet.forward
    run: Callable[..., tuple[torch.Tensor, ...]] | None = None

    def network(noisy: torch.Tensor, times: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if recorder is None:
            return (eager(noisy, times, text).sample,)
        recorder.maps = []
        return (eager(noisy, times, text).sample, *recorder.maps)

    def forward(noisy: torch.Tensor, times: torch.Tensor, text: torch.Tensor):
        nonlocal run
        if not torch.is_grad_enabled():
            return eager(noisy, times, text)
        if run is None:
            run = _captured(network, unet, (noisy, times, text))
        predicted, *maps = run(noisy, times, text)
        if recorder is not None:
            recorder.maps = maps
        return UNet2DConditionOutput(sample=predicted)

    unet.forward = forward
    return denoiser


def _captured(
    network: Callable[..., tuple[torch.Tensor, ...]], unet: nn.Module, inputs: Sequence[torch.Tensor]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The network as graphs, or the network itself where no graph can be made that computes the same."""
    try:
        # The cache of autocast's copies would keep tensors of one graph for another.
        with torch.autocast("cuda", torch.bfloat16, torch.is_autocast_enabled("cuda"), cache_enabled=False):
            graphs = _UNetGraphs(network, inputs, unet.parameters())
        if graphs.same_as_eager():
            return graphs.run
        logger.warning("a CUDA graph computes something else: each kernel is started by itself")
    except Exception as error:
        logger.warning("no CUDA graph (%s: %s): each kernel is started by itself", type(error).__name__, error)
        torch.cuda.synchronize()
    return network
