"""Time and memory of one forward and backward for the maps of T tasks, against T models with one task each.

    python benchmark/dense.py --tasks 1,2,4,8

Both sides run in one process. The one model is a Swin-T with MTLoRA, whose trunk runs once; a model of one task is the
same Swin-T with LoRA of the shared rank. In both, every task has a decoder of 21 classes. The weights are random,
because they change neither figure. A second line leaves out the decoders: it shows the cost of the streams, which end
there.

Memory is the peak of all tensor bytes during a forward and its backward, including gradients and all weights. Separate
models are trained one after the other, so their memory is that of one model and their time the sum over all models.
"""

import sys

import torch
from footprint import megabytes, tensor_bytes
from measure import count, counts, keep, markdown_table, parser, ratio, rounds, shown, shown_ratio, spread
from torch import nn
from transformers import SwinConfig, SwinModel

import mtl_lora
from mtl_lora import AdapterConfig
from mtl_lora.base_model import device_for_this_process
from mtl_lora.dense.backbones import with_streams
from mtl_lora.dense.model import DenseModel, placed
from mtl_lora.dense.tasks import Task, TaskSet
from mtl_lora.errors import user_errors_to_exit_code


def main() -> None:
    flags = parser(__doc__)
    flags.add_flag("tasks", "numbers of tasks to measure, as a,b", type=counts, default=[1, 2, 4, 8])
    flags.add_flag("config", "folder with the config.json of another Swin; none: Swin-T", default="none")
    flags.add_flag("rank", "rank of the part that tasks share; each task's own rank is 4", type=count, default=16)
    flags.add_flag("image_size", "height and width of the images, in pixels", type=count, default=224)
    flags.add_flag("batch_size", "images per step", type=count, default=2)
    flags.add_flag("rounds", "rounds of each side, in turns", type=count, default=5)
    arguments = flags.parse_args()
    lines, records = [], []
    for tasks in arguments.tasks:
        names = [f"task{index}" for index in range(tasks)]
        sides = {
            "one": [built("mtlora", names, arguments)],
            "separate": [built("lora", [name], arguments) for name in names],
        }
        for decoders in (True, False):
            found = measured(sides, decoders, arguments)
            records.append({"tasks": tasks, "decoders": decoders, **found})
            gain = found["ratio"]
            lines.append(
                [
                    f"{tasks}" + ("" if decoders else ", without decoders"),
                    *(shown(found[side]["images"]) for side in ("one", "separate")),
                    *shown_ratio(gain)[:2],
                    *(megabytes(found[side]["peak_bytes"]) for side in ("one", "separate")),
                    *(f"{found[side]['trained']:,}" for side in ("one", "separate")),
                ]
            )
            print(lines[-1], file=sys.stderr, flush=True)
    titles = ("one model", "T models")
    head = ["tasks", *(f"images/s, {side}" for side in titles), "ratio", "95 % interval"]
    head += ["MB, one model", "MB, each of T"] + [f"trained, {side}" for side in titles]
    keep(__file__, markdown_table(head, lines), {"results": records}, arguments)


def measured(sides: dict[str, list[nn.Module]], decoders: bool, arguments) -> dict:
    """Return images a second and peak bytes of both sides, and the ratio of their speeds."""
    size, device = arguments.image_size, device_for_this_process()
    pixels = torch.randn(arguments.batch_size, 3, size, size, device=device)

    def work(models: list[nn.Module]):
        def step() -> float:
            for model in models:
                forward(model, pixels, decoders).backward()
                model.zero_grad(set_to_none=True)
            return len(pixels)

        return step

    rates = rounds({name: work(models) for name, models in sides.items()}, arguments.rounds)
    found: dict = {"ratio": ratio(rates["one"], rates["separate"])}
    for name, models in sides.items():
        weights = sum(weight.numel() * weight.element_size() for weight in models[0].parameters())
        peak = weights + tensor_bytes(work(models[:1]))[1]
        trained = sum(mtl_lora.trainable_parameters(model)[0] for model in models)
        found[name] = {"images": spread(rates[name]), "peak_bytes": peak, "weight_bytes": weights, "trained": trained}
    return found


def built(method: str, names: list[str], arguments) -> nn.Module:
    """Build a Swin-T with an adapter and a decoder of 21 classes per task."""
    tasks = TaskSet(tuple(Task(name, index, kind="semantic", classes=21) for index, name in enumerate(names)))
    torch.manual_seed(0)
    config = SwinConfig() if arguments.config == "none" else SwinConfig.from_pretrained(arguments.config)
    model = DenseModel(with_streams(SwinModel(config)), tasks)
    adapter = AdapterConfig(method, arguments.rank, 4 * arguments.rank, 0.05, "all-linear", names)
    return mtl_lora.inject(model, placed(adapter, model)).to(device_for_this_process()).train()


def forward(model: nn.Module, pixels: torch.Tensor, decoders: bool) -> torch.Tensor:
    """Return the sum of all outputs of the decoders, or of the backbone without them."""
    if decoders:
        return sum(output.sum() for output in model(pixels).values())
    stages = model.backbone(pixels)
    return sum((stage.shared if stage.tasks is None else stage.tasks).sum() for stage in stages)


if __name__ == "__main__":
    with user_errors_to_exit_code():
        main()
