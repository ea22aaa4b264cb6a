"""The kernels of `two_kernels`; imports the DSL."""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32


class SumOfScaledRows:
    """out [columns] = the sum over x [rows, columns] times scale; part [rows, columns] is a workspace."""

    def __init__(self, columns: int, cluster: int) -> None:
        self.columns = columns
        self.cluster = cluster

    @cute.jit
    def __call__(
        self, x: cute.Tensor, part: cute.Tensor, out: cute.Tensor, scale: Float32, stream: cuda.CUstream
    ):
        rows = x.shape[0]
        threads = (self.columns, 1, 1)
        self.scale_rows(x, part, scale).launch(
            grid=(rows, 1, 1), block=threads, cluster=(self.cluster, 1, 1), stream=stream
        )
        self.add_rows(part, out, rows).launch(grid=(1, 1, 1), block=threads, stream=stream, use_pdl=True)

    @cute.kernel
    def scale_rows(self, x: cute.Tensor, part: cute.Tensor, scale: Float32):
        row, _, _ = cute.arch.block_idx()
        column, _, _ = cute.arch.thread_idx()
        cute.arch.griddepcontrol_launch_dependents()
        part[row, column] = x[row, column] * scale

    @cute.kernel
    def add_rows(self, part: cute.Tensor, out: cute.Tensor, rows: Int32):
        column, _, _ = cute.arch.thread_idx()
        cute.arch.griddepcontrol_wait()
        total = Float32(0.0)
        for row in range(rows):
            total += part[row, column]
        out[column] = total
