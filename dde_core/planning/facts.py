"""Constants for planning: GPUs from data sheets, published runs, counted models. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT16 = 2
"""Bytes of a number."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, from NVIDIA's data sheet of its SXM variant.

    ``peak`` is dense bf16 FLOP/s. ``memory_gb`` is the memory as sold, ``cuda_gb`` about what CUDA reports as
    total. ``memory_gb_s`` is the bandwidth of that memory, reads and writes together. ``nvlink_gb_s`` and
    ``host_gb_s`` (PCIe x16) are bandwidths in one direction, NVLink's half of what is advertised.
    ``node_gb_s`` is one GPU's network card in NVIDIA's own eight-GPU machine. ``usd_per_hour`` is a round
    figure for planning, not an offer.
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
"""Rate at which one process copies tensors from a GPU into newly allocated pageable memory (`checkpoint.py`):
the kernel zeroes each page at its first write, and CUDA copies through a staging buffer. A guess until it is
measured. Pinned memory that is reused would come near ``host_gb_s``."""
STORAGE_GB_S = 1.0
"""Rate at which one worker writes to an object store: our figure for planning."""
PROCESS_GB = 4.0
"""A worker's host memory without checkpoints: torch, CUDA, Ray, prefetched rows. Our figure for planning.
Weights are read from memory-mapped files, which the workers of a node share."""

OPTIMIZER_BYTES = {"adamw": 28, "adamw_8bit": 16, "adafactor": 92}
"""Bytes that the optimizer reads and writes for each trained parameter. AdamW, in one pass, reads weight,
gradient and two moments and writes all but the gradient; each takes 4 bytes, a moment of 8-bit Adam 1.
transformers' Adafactor makes a pass for each operation: gradient squared (8), eps added (8), mean by row and
by column (8), their product (4), times the gradient (12), its root mean square (4), clipped (8), times the
rate (8), the weight's root mean square (4), weight decay (12: the weight is read twice), subtracted (12), and
the averages (about 4)."""
CLIPPING_BYTES = 12
"""The same for gradient clipping: the norm reads gradients, scaling reads and writes them."""
AVERAGE_BYTES = 32
"""The same for the running average, which diffusers computes in three passes: difference (8 read, 4 written),
times the rate (4, 4), subtracted from the average (8, 4)."""


VAE_PARAMETERS = 83_653_863
"""Of the VAE of both families."""


@dataclass(frozen=True)
class ScorerFacts:
    """A scorer, counted as Facts are: FLOPs of one image with its caption."""

    title: str
    parameters: int
    flops: float


SCORER = ScorerFacts("a scorer on CLIP ViT-H/14, as PickScore's", 986_109_441, 381.7e9)
"""What a reward is taken for in plans: the largest of the usual scorers."""


@dataclass(frozen=True)
class Published:
    """A run of Diffusion-DPO (arXiv 2311.12908) on 16 A100s, from the launch scripts of its repository
    (SalesforceAIResearch/DiffusionDPO).

    ``passes`` is the cost of a sample in U-Net forwards: 1 + 2 for the backward + 1 for the reference, and 1
    more with gradient checkpointing, which its README enables for SDXL only. That run encoded images and
    captions in every step.
    """

    gpu_hours: float
    steps: int
    passes: int
    batch_size: int = 2048


@dataclass(frozen=True)
class Precompute:
    """MosaicML's encoding of a training set with VAE and CLIP, before it trained Stable Diffusion 2.

    Its A100-hours are published; the publication allows two readings of its ``images_per_s`` on one A100. The
    image size is our reading.
    """

    title: str
    images_per_s: float
    vae_flops: float
    gpu_hours: float = 3784


@dataclass(frozen=True)
class Facts:
    """One model at its own resolution. `tests/core/test_estimate.py` recounts every number on meta tensors.

    FLOPs are two for each multiply-add of one forward of one sample: an image for the VAE's encoder and
    decoder, a caption for the text encoders. ``activation_bytes`` is the peak beyond weights and gradients in
    forward and backward of one sample, by (precision, gradient checkpointing); ``decode_bytes`` is that of
    the float32 decoder, back to the latents. ``blocks`` maps each width of the U-Net to its number of
    transformer blocks. ``averages`` are the numbers that Adafactor keeps for all of its parameters.

    FSDP2 gathers resnets and transformer blocks one by one (`dde_core/models/parallel.py`): ``largest_block``
    is the parameters of the largest, ``outside_blocks`` those outside of all blocks, which stay gathered
    until the backward pass ends.
    """

    title: str
    parameters: int
    averages: int
    largest_block: int
    outside_blocks: int
    text_encoder_parameters: int
    forward_flops: float
    vae_flops: float
    decode_flops: float
    decode_bytes: float
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
        averages=457_589_700,
        largest_block=49_164_800,
        outside_blocks=79_441_924,
        text_encoder_parameters=123_060_480,  # CLIP ViT-L/14
        forward_flops=0.8033e12,
        vae_flops=1.1167e12,
        decode_flops=2.5145e12,
        decode_bytes=6.105e9,
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
        averages=244_330_500,
        largest_block=49_164_800,
        outside_blocks=54_163_204,
        text_encoder_parameters=123_060_480 + 694_659_840,  # CLIP ViT-L/14 and OpenCLIP ViT-bigG/14
        forward_flops=6.761e12,
        vae_flops=4.879e12,
        decode_flops=10.470e12,
        decode_bytes=24.42e9,
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
    Precompute("MosaicML's precompute, read as 58 images/s of 512 px", 58, FACTS["sd15"].vae_flops),
    Precompute("MosaicML's precompute, read as 210 images/s of 256 px", 210, 0.2727e12),
)


@dataclass(frozen=True)
class Benched:
    """FLOPs of the models that `make bench` trains without gradient checkpointing, counted as in Facts."""

    forward_flops: float
    vae_flops: float
    text_flops: float


BENCHED: dict[str, Benched] = {
    "": Benched(forward_flops=112.7e6, vae_flops=107.2e6, text_flops=2.1e6),
    ", SD1.5-kind mid-size": Benched(forward_flops=17.54e9, vae_flops=17.55e9, text_flops=0.59e6),
}
"""Keyed by the suffix of a result's name: the shapes model, and Stable Diffusion 1.5's U-Net at 3/10 of its
width with its VAE at 1/4."""
