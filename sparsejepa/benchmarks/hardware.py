"""What processors can do, from their makers' data sheets; and this machine's CPU, measured.

Rates of matrix products are *dense* (data sheets print twice as much, "with sparsity"), bf16 with
sums in fp32. Links are bytes per second in one direction (data sheets print both added up).
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsejepa.errors import UserError, nearest


@dataclass(frozen=True)
class Processor:
    """A GPU, or a CPU taken as one."""

    name: str
    bf16: float | None
    """Operations per second of dense bf16 products; None if it has none in hardware."""
    fp32: float
    """The same of fp32 products, without TF32 (this package does not use it)."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second from and to its memory."""
    link: float
    """Bytes per second to the others in its machine, one direction."""
    linked_by: str

    def peak(self, precision: str = "auto") -> tuple[str, float]:
        """Return the compute type of `--precision` and its operations per second.

        Raises UserError for bf16 on a processor that has none.
        """
        if precision == "bf16" and self.bf16 is None:
            raise UserError(f"--precision bf16: {self.name} has none; use --precision fp32")
        if self.bf16 is not None and precision in ("auto", "bf16"):
            return "bf16", self.bf16
        return "fp32", self.fp32


T, G = 1e12, 1e9

GPUS: dict[str, Processor] = {
    # NVIDIA A100 Tensor Core GPU data sheet (June 2021): BF16 312 | 624 with sparsity, FP32 19.5;
    # 40 GB: 1,555 GB/s; 80 GB SXM: 2,039 GB/s; NVLink 600 GB/s both ways.
    "a100-40gb": Processor(
        "A100 40 GB SXM", 312 * T, 19.5 * T, 40 * G, 1555 * G, 300 * G, "NVLink 3"
    ),
    "a100-80gb": Processor(
        "A100 80 GB SXM", 312 * T, 19.5 * T, 80 * G, 2039 * G, 300 * G, "NVLink 3"
    ),
    # NVIDIA H100 Tensor Core GPU data sheet (SXM5): BF16 1,979 with sparsity, FP32 67; 80 GB,
    # 3.35 TB/s; NVLink 900 GB/s both ways. Dense: H100 architecture white paper, table 2: 989.4.
    "h100": Processor("H100 SXM", 989.4 * T, 67 * T, 80 * G, 3350 * G, 450 * G, "NVLink 4"),
    # NVIDIA H200 Tensor Core GPU data sheet (SXM): BF16 1,979 with sparsity, FP32 67; 141 GB,
    # 4.8 TB/s; NVLink 900 GB/s both ways.
    "h200": Processor("H200 SXM", 989.4 * T, 67 * T, 141 * G, 4800 * G, 450 * G, "NVLink 4"),
    # NVIDIA HGX B200 data sheet, an eighth of the board: BF16 36 PFLOPS with sparsity, FP32 600
    # TFLOPS, 1.44 TB, 62 TB/s; NVLink 1.8 TB/s both ways per GPU.
    "b200": Processor("B200 (HGX)", 2250 * T, 75 * T, 180 * G, 7700 * G, 900 * G, "NVLink 5"),
    # NVIDIA L40S data sheet: BF16 362.05 | 733 with sparsity, FP32 91.6; 48 GB, 864 GB/s; PCIe
    # Gen4 x16, 64 GB/s both ways.
    "l40s": Processor("L40S", 362.05 * T, 91.6 * T, 48 * G, 864 * G, 32 * G, "PCIe 4 x16"),
    # NVIDIA Ada GPU architecture white paper, table of the RTX 4090: BF16 tensor with FP32
    # accumulate 165.2 | 330.4 with sparsity, FP32 82.6; 24 GB, 1,008 GB/s; PCIe Gen4 x16.
    "rtx4090": Processor(
        "GeForce RTX 4090", 165.2 * T, 82.6 * T, 24 * G, 1008 * G, 32 * G, "PCIe 4 x16"
    ),
    # NVIDIA T4 data sheet: FP16 65, FP32 8.1, no BF16; 16 GB, 320 GB/s; PCIe Gen3 x16, 32 GB/s
    # both ways.
    "t4": Processor("T4", None, 8.1 * T, 16 * G, 320 * G, 16 * G, "PCIe 3 x16"),
}


def processor(name: str) -> Processor:
    """Return a GPU by name, or ``cpu``: this machine's, measured in about a second.

    Raises UserError naming --gpu for an unknown one.
    """
    name = name.lower()
    if name == "cpu":
        return measured_cpu()
    if name not in GPUS:
        known = ", ".join([*GPUS, "cpu"])
        raise UserError(f"--gpu {name}: unknown{nearest(name, [*GPUS, 'cpu'])}; there are {known}")
    return GPUS[name]


def measured_cpu() -> Processor:
    """Measure the rates of square products and of a large copy on this machine's CPU."""
    import torch

    from sparsejepa.benchmarks.products import bandwidth, multiply
    from sparsejepa.benchmarks.settings import available_memory
    from sparsejepa.benchmarks.timing import interleave
    from sparsejepa.environment import has_bf16
    from sparsejepa.model.costs import Product

    square = Product("square", 1024, 1024, 1024, 1, "forward")
    kinds = ["fp32", "bf16"] if has_bf16("cpu") else ["fp32"]
    times = interleave({kind: multiply(square, kind, "cpu") for kind in kinds}, rounds=5)
    rates = {kind: square.flops / times[kind].median for kind in kinds}
    moved = bandwidth("cpu")
    threads = torch.get_num_threads()
    name = f"this CPU, {threads} thread{'s' if threads > 1 else ''}"
    return Processor(
        name, rates.get("bf16"), rates["fp32"], available_memory("cpu"), moved, moved / 2, "memory"
    )
