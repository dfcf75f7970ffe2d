"""Time and memory of a large training run, predicted from counted FLOPs and assumed rates; nothing is trained.

    python eval/scale.py configs/paper_id_128_large.yaml --gpus 8 64
    python eval/scale.py configs/paper_id_128_large.yaml train.batch_size=2048 --gpus 64 --share 0.3

A config's own step is counted on the CPU for one image (ebt_vision/benchmark/training_cost.py). The rest is arithmetic on the
options: the accelerator's published peak, the share of it that is assumed, the link that gradients are summed over.
"""

import argparse
import sys
from collections.abc import Sequence

from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.benchmark.training_cost import TrainingCost, training_cost
from ebt_vision.core.arguments import number
from ebt_vision.training.config import ExperimentConfig, load_config

BYTES_PER_PARAMETER = 4 + 4 + 8 + 4 + 4
"""float32 weights, gradients, AdamW's two moments, averaged weights, DDP's buckets."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 success, 2 bad input."""
    settings = _parser().parse(arguments)
    try:
        config = load_config(settings.config, settings.overrides)
        cost = training_cost(config)
        print(report(settings, config, cost))
    except ValueError as error:
        print(f"scale: {error}", file=sys.stderr)
        return 2
    return 0


def report(settings: argparse.Namespace, config: ExperimentConfig, cost: TrainingCost) -> str:
    """Return counted figures and a table of predictions as Markdown. Raises ValueError if the GPUs cannot share the batch."""
    train = config.train
    images = train.batch_size * train.num_updates
    lines = [
        f"Counted: {cost.num_parameters:,} parameters, {cost.flops / 1e9:,.1f} GFLOPs of products and "
        f"{cost.kept_bytes / 2**20:,.0f} MiB of kept activations (float32) an image.",
        f"The run: {train.num_updates:,} updates of {train.batch_size:,} images, {images / settings.images:,.1f} epochs of "
        f"{settings.images:,}, {images * cost.flops:.3g} FLOPs.",
        f"Assumed: {settings.peak / 1e12:,.0f} TFLOP/s a GPU at the share given, {settings.node_bandwidth / 1e9:,.0f} "
        f"GB/s a GPU to sum gradients in a node of {settings.node_gpus} and {settings.bandwidth / 1e9:,.0f} between nodes, no "
        "overlap, a loader that keeps up.",
        "",
        "| GPUs | images a GPU and update | share of peak | compute, s | summing, s | images/s | hours | GiB a GPU |",
        "|" + "---|" * 8,
    ]
    for gpus in settings.gpus:
        if train.batch_size % (gpus * train.num_accumulation):
            raise ValueError(
                f"train.batch_size={train.batch_size} is not divisible by {gpus} GPUs times train.num_accumulation="
                f"{train.num_accumulation}; use a multiple of {gpus * train.num_accumulation}"
            )
        each = train.batch_size // gpus
        memory = cost.num_parameters * BYTES_PER_PARAMETER + cost.kept_bytes * each // train.num_accumulation
        bandwidth = settings.node_bandwidth if gpus <= settings.node_gpus else settings.bandwidth
        summing = 2 * (gpus - 1) / gpus * 4 * cost.num_parameters / bandwidth  # a ring, float32
        for share in settings.share:
            compute = each * cost.flops / (share * settings.peak)
            seconds = compute + summing
            lines.append(
                f"| {gpus} | {each} | {share:.0%} | {compute:.4f} | {summing:.4f} | {train.batch_size / seconds:,.0f} | "
                f"{seconds * train.num_updates / 3600:,.1f} | {memory / 2**30:.1f} |"
            )
    return "\n".join(lines)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="scale", description="Predict time and memory of a training run; nothing is trained.")
    add, positive = parser.add_argument, number(float, 0)
    add("config")
    add("overrides", nargs="*", default=[], metavar="SECTION.KEY=VALUE")
    add("--gpus", type=number(int, 1), nargs="+", default=[8, 64])
    add("--share", type=positive, nargs="+", default=[0.2, 0.35, 0.5], help="of the peak that products reach (assumed)")
    add("--peak", type=positive, default=989e12, help="FLOPs/s of one GPU (default: H100's published dense bfloat16)")
    add("--node-gpus", type=number(int, 1), default=8)
    add(
        "--node-bandwidth",
        type=positive,
        default=450e9,
        help="bytes/s of a GPU each way in a node (default: NVLink of an H100)",
    )
    add("--bandwidth", type=positive, default=50e9, help="bytes/s of a GPU each way between nodes (default: 400 Gbit/s)")
    add("--images", type=number(int, 1), default=1_281_167, help="in the training set (default: ImageNet-1k)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
