"""Facts that estimates and plans stand on: GPUs from their data sheets, published runs, counted models. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32, BFLOAT16, FLOAT16 = 4, 2, 2
"""Bytes of a number."""


@dataclass(frozen=True)
class Gpu:
    """``peak`` is dense bf16 FLOP/s, ``memory_gb`` as sold, ``nvlink_gb_s`` what NVLink carries in one direction (half of what
    is advertised), ``host_gb_s`` the same of PCIe x16 to the host, ``memory_gb_s`` what the GPU reads and writes of its own
    memory together: NVIDIA's data sheets, the SXM variants. ``node_gb_s`` is one GPU's network card in NVIDIA's own eight-GPU
    machine. ``cuda_gb`` is what CUDA reports as total memory, about.

    ``usd_per_hour`` is a round figure for planning and nobody's offer.
    """

    title: str
    peak: float
    memory_gb: float
    cuda_gb: float
    memory_gb_s: float
    nvlink_gb_s: float
    node_gb_s: float
    host_gb_s: float
    usd_per_hour: float


GPUS: dict[str, Gpu] = {
    "a100": Gpu(
        "A100 80 GB", 312e12, 80, 85, 2000, nvlink_gb_s=300, node_gb_s=25, host_gb_s=32, usd_per_hour=2.0
    ),
    "h100": Gpu(
        "H100 80 GB", 989e12, 80, 85, 3350, nvlink_gb_s=450, node_gb_s=50, host_gb_s=64, usd_per_hour=3.0
    ),
    "h200": Gpu(
        "H200 141 GB", 989e12, 141, 150, 4800, nvlink_gb_s=450, node_gb_s=50, host_gb_s=64, usd_per_hour=3.5
    ),
}

PAGEABLE_GB_S = 3.0
"""What one process copies from a GPU into memory that is fresh and can be paged out, a tensor at a time (`checkpoint.py`): its
pages are made and zeroed as they are first written, and CUDA goes by way of a buffer of its own. A guess until it is measured;
memory that is pinned and kept would come near ``host_gb_s``."""
STORAGE_GB_S = 1.0
"""What one worker writes to an object store: ours, for planning."""
PROCESS_GB = 4.0
"""What a worker takes of the host's memory beside checkpoints: torch, CUDA, Ray, rows that are read ahead. Ours, for planning.
Weights are read from files that are mapped, which the workers of a node have in common."""

ADAMW_BYTES = {"adamw": 28, "adamw_8bit": 16}
"""Read and written for each trained parameter in a step, in one pass: weight, gradient and two moments are read, all but the
gradient are written; each is of 4 bytes, 8-bit Adam's moments of 1."""
CLIPPING_BYTES, AVERAGE_BYTES = 12, 32
"""The same of clipping (the norm reads gradients, scaling reads and writes them), and of the running average, which diffusers
computes in three passes: a difference (8 read, 4 written), times the rate (4, 4), taken off the average (8, 4)."""


@dataclass(frozen=True)
class Published:
    """A run of Diffusion-DPO (arXiv 2311.12908) on 16 A100s, from the launch scripts of its repository
    (SalesforceAIResearch/DiffusionDPO). ``passes`` are the U-Net forwards that a sample cost there: 1 + 2 backward + 1
    reference, and 1 more with gradient checkpointing, which its README says is on for SDXL alone. Pictures went through the VAE
    and captions through the text encoders in every step."""

    gpu_hours: float
    steps: int
    passes: int
    batch_size: int = 2048


@dataclass(frozen=True)
class Precompute:
    """MosaicML's encoding of a training set by VAE and CLIP, before it trained Stable Diffusion 2: its A100-hours are
    published, what they were spent on is told in two ways. ``pictures_per_s`` of one A100; the size is our reading."""

    title: str
    pictures_per_s: float
    vae_flops: float
    gpu_hours: float = 3784


@dataclass(frozen=True)
class Facts:
    """One model at its own resolution. Counts and FLOPs are recounted by `tests/core/test_estimate.py`, on tensors without
    storage: parameters, multiply-adds times two of one forward of one sample (a picture for the VAE's encoder, a caption for
    the text encoders), and the bytes that live at once beyond weights and gradients in forward and backward of one sample, by
    precision and gradient checkpointing.

    ``blocks`` has for each width of the U-Net the number of its transformer blocks. FSDP2 gathers resnets and transformer
    blocks one by one (`dde_core/models/parallel.py`): ``largest_block`` is the largest's parameters, ``outside_blocks`` those
    of no block, which are gathered together and stay until the backward pass is done.
    """

    title: str
    parameters: int
    largest_block: int
    outside_blocks: int
    text_encoder_parameters: int
    forward_flops: float
    vae_flops: float
    text_flops: float
    activation_bytes: dict[tuple[str, bool], float]
    latent_shape: tuple[int, int, int]
    text_shape: tuple[int, int]
    tokenizers: int
    blocks: dict[int, int]
    published: Published


FACTS: dict[str, Facts] = {
    "sd15": Facts(
        title="Stable Diffusion 1.5 at 512 px",
        parameters=859_520_964,
        largest_block=49_164_800,
        outside_blocks=79_441_924,
        text_encoder_parameters=123_060_480,  # CLIP ViT-L/14
        forward_flops=0.8033e12,
        vae_flops=1.1167e12,
        text_flops=13.30e9,
        activation_bytes={
            ("bf16", False): 1.261e9,
            ("bf16", True): 0.281e9,
            ("fp32", False): 1.903e9,
            ("fp32", True): 0.483e9,
        },
        latent_shape=(4, 64, 64),
        text_shape=(77, 768),
        tokenizers=1,
        blocks={320: 5, 640: 5, 1280: 6},
        published=Published(gpu_hours=384, steps=2000, passes=4),  # "~24 hours / 2000 steps"
    ),
    "sdxl": Facts(
        title="SDXL at 1024 px",
        parameters=2_567_463_684,
        largest_block=49_164_800,
        outside_blocks=54_163_204,
        text_encoder_parameters=123_060_480 + 694_659_840,  # CLIP ViT-L/14 and OpenCLIP ViT-bigG/14
        forward_flops=6.761e12,
        vae_flops=4.879e12,
        text_flops=13.30e9 + 97.86e9,
        activation_bytes={
            ("bf16", False): 8.726e9,
            ("bf16", True): 0.892e9,
            ("fp32", False): 13.82e9,
            ("fp32", True): 1.449e9,
        },
        latent_shape=(4, 128, 128),
        text_shape=(77, 2048),
        tokenizers=2,
        blocks={640: 10, 1280: 60},
        published=Published(gpu_hours=4800, steps=2000, passes=5),  # "~30 hours / 200 steps"
    ),
}

PRECOMPUTES = (
    Precompute("MosaicML's precompute, read as 58 pictures/s of 512 px", 58, FACTS["sd15"].vae_flops),
    Precompute("MosaicML's precompute, read as 210 pictures/s of 256 px", 210, 0.2727e12),
)


@dataclass(frozen=True)
class Benched:
    """FLOPs of the models that `make bench` trains, as in Facts; without gradient checkpointing."""

    forward_flops: float
    vae_flops: float
    text_flops: float


BENCHED: dict[str, Benched] = {
    "": Benched(forward_flops=112.7e6, vae_flops=107.2e6, text_flops=2.1e6),
    ", SD1.5-kind mid-size": Benched(forward_flops=17.54e9, vae_flops=17.55e9, text_flops=0.59e6),
}
"""By what follows the name of a result: the shapes model, and Stable Diffusion 1.5's U-Net at 3/10 of its width with its VAE
at 1/4."""
