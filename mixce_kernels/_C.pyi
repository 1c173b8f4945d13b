"""The native extension: pointers as integers, strides in elements; see csrc/params.h."""

class RowLayout:
    def __init__(self, inner: int, outer_stride: int, inner_stride: int) -> None: ...

class RowParams:
    def __init__(
        self,
        logits: int,
        logits_rows: RowLayout,
        targets: int,
        targets_int64: bool,
        rows: int,
        vocab_size: int,
        dtype: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        logit_scale: float,
        grad_logits: int,
        grad_rows: RowLayout,
        grad_loss: int,
        grad_loss_stride: int,
        state: int,
        threads: int,
        stream: bool,
    ) -> None: ...

class ForwardParams:
    def __init__(self, eta: int, eta_stride: int, eta_value: float, loss: int, stats: int, correct: int) -> None: ...

def supported_isas() -> list[str]: ...
def cpu_forward(isa: str, params: RowParams, forward: ForwardParams) -> int: ...
def cpu_logits_grad(isa: str, params: RowParams) -> None: ...
def cpu_scale_rows(isa: str, params: RowParams) -> None: ...

# Only in an extension that was built with CUDA.

class CudaLaunch:
    def __init__(
        self, device: int, stream: int, parts: int, shared_bytes: int, from_shared: bool, partials: int
    ) -> None: ...

def cuda_device(device: int) -> tuple[int, int, int, int, int]: ...
def cuda_state_bytes(dtype: int) -> int: ...
def cuda_partial_bytes(dtype: int) -> int: ...
def cuda_forward(params: RowParams, forward: ForwardParams, launch: CudaLaunch) -> None: ...
def cuda_logits_grad(params: RowParams, launch: CudaLaunch) -> None: ...
def cuda_scale_rows(params: RowParams, launch: CudaLaunch) -> None: ...
